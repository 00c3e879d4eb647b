"""Do the tokenizer, the special token ids and the embedding's rows belong together?"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from assay.loaders.checkpoint import Checkpoint
from assay.loaders.errors import CheckpointError
from assay.loaders.findings import Finding, from_error
from assay.loaders.json_text import read_json
from assay.loaders.tokenizer import KEY

EMBEDDING = "model.embed_tokens.weight"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TEXTS = ("bos_token", "eos_token", "pad_token", "unk_token")


def check_gguf(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> list[Finding]:
    """Findings about the `tokenizer.ggml.*` metadata of a GGUF file."""
    file, rows = str(checkpoint.path), checkpoint.config.vocab_size
    try:
        tokens = metadata.get(f"{KEY}tokens")
    except CheckpointError as error:
        return from_error(error, "vocabulary")
    if tokens is None:
        return [Finding("warning", "vocabulary", f"no tokenizer: no {KEY}tokens", None, file)]
    findings = []
    if isinstance(tokens, list) and len(tokens) != rows:
        what = "the vocabulary and the embedding differ in size, and llama.cpp refuses such a file"
        findings.append(_at_embedding(checkpoint, what, f"{rows} tokens", f"{len(tokens)}"))
    for key in metadata:
        if key.startswith(KEY) and key.endswith("_token_id"):
            findings += _check_id(key, metadata[key], rows, file)
    tokenizer = _tokenizer(checkpoint, findings)
    return findings + (_beyond(checkpoint, tokenizer) if tokenizer and not findings else [])


def check_directory(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[Finding]:
    """Findings about tokenizer.json, the ids in config.json and generation_config.json, and tokenizer_config.json."""
    directory, rows = checkpoint.path, checkpoint.config.vocab_size
    findings: list[Finding] = []
    sources = {"config.json": config, "generation_config.json": _json(directory / "generation_config.json", findings)}
    for name, values in sources.items():
        for key in IDS:
            ids = values.get(key)
            for value in ids if isinstance(ids, list) else [ids]:
                findings += _check_id(key, value, rows, str(directory / name))
    if not (directory / "tokenizer.json").is_file():
        what = "no tokenizer that can be read: no tokenizer.json"
        return [*findings, Finding("warning", "vocabulary", what, None, str(directory))]
    if tokenizer := _tokenizer(checkpoint, findings):
        findings += _beyond(checkpoint, tokenizer) + _added(directory / "tokenizer.json", tokenizer)
        findings += _texts(directory / "tokenizer_config.json", tokenizer, findings)
    return findings


def _json(path: Path, findings: list[Finding]) -> Mapping[str, Any]:
    """A JSON object from a file that need not be there."""
    try:
        return read_json(path) if path.exists() else {}
    except CheckpointError as error:
        findings += from_error(error, "vocabulary")
        return {}


def _check_id(key: str, value: object, rows: int, file: str) -> list[Finding]:
    is_none = value is None or (value == -1 and "pad" in key)  # -1 is how the first Llama configs said none
    if is_none or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows):
        return []
    return [
        Finding("error", "vocabulary", f"{key} is no token id", None, file, None, f"0 to {rows - 1}", f"{value!r:.80}")
    ]


def _tokenizer(checkpoint: Checkpoint, findings: list[Finding]) -> Tokenizer | None:
    try:
        return checkpoint.tokenizer
    except CheckpointError as error:
        findings += from_error(error, "vocabulary")
        return None


def _beyond(checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[Finding]:
    """Tokens that the embedding has no row for."""
    rows = checkpoint.config.vocab_size
    beyond = sorted((i, text) for text, i in tokenizer.get_vocab(with_added_tokens=True).items() if i >= rows)
    if not beyond:
        return []
    shown = ", ".join(repr(text) for _, text in beyond[:3])
    what = f"the embedding has no row for {len(beyond)} of the tokenizer's tokens: {shown}"
    return [_at_embedding(checkpoint, what, f"at least {beyond[-1][0] + 1} rows", str(rows))]


def _at_embedding(checkpoint: Checkpoint, what: str, expected: str, got: str) -> Finding:
    name = checkpoint.tensors[EMBEDDING].stored_as[0]
    return Finding("error", "vocabulary", what, name, str(checkpoint.path), None, expected, got)


def _added(path: Path, tokenizer: Tokenizer) -> list[Finding]:
    """Added tokens that the tokenizers library gives other ids: those already taken, or leaving a gap."""
    text = path.read_text("utf-8")
    start = re.search(r'"added_tokens"\s*:\s*(?=\[\s*\{)', text)  # only this list: all of the file would take long
    added = json.JSONDecoder().raw_decode(text, start.end())[0] if start else []
    findings = []
    for token in added:
        wanted, got = token.get("id"), tokenizer.token_to_id(str(token.get("content")))
        if got != wanted:
            what = f"added token {token.get('content')!r} does not get the id that the file gives it"
            findings.append(Finding("error", "vocabulary", what, None, str(path), None, str(wanted), str(got)))
    return findings


def _texts(path: Path, tokenizer: Tokenizer, findings: list[Finding]) -> list[Finding]:
    """Special tokens of tokenizer_config.json that the tokenizer does not have: transformers would add them."""
    values, found = _json(path, findings), []
    for key in TEXTS:
        token = values.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and tokenizer.token_to_id(text) is None:
            what = f"{key} {text!r} is not in tokenizer.json"
            found.append(Finding("error", "vocabulary", what, None, str(path)))
    return found
