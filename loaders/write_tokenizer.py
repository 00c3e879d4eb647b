"""Tokenizers and chat templates carried from one container to another.

Between Hugging Face and MLX the files are copied. From GGUF a tokenizer.json is built by `tokenizer_from_gguf`. To
GGUF goes what llama.cpp reads: tokens, their types, merges or scores, and the name of a pre-tokenizer, found by
splitting a text with tokenizer.json's own rules and with each of `loaders.pretokenizers`. What is written is read
back and must give the same ids for that text.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.loaders.chat import ADDITIONAL, template_entry, templates_of
from assay.loaders.errors import CheckpointError
from assay.loaders.json_text import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}  # ggml's own spelling
# Letters with case outside ASCII and combining marks are left out: llama.cpp splits those its own way, see
# `loaders.pretokenizers`.
PROBE = (
    "Hello world, it's I'M we've WE'LL he'd they'RE don't 'tis rock'n'roll HTTPServer camelCaseWord SHOUTING mixedUP\n"
    "1 12 123 1234 12345 3.14159 1,000,000 x86 v2.0 a1b2 0x1F\t\ttabs  two   three    \n\n\n  indent\r\n\r\n end  "
    'path/to/file.py //comment /* c */ <tag attr="v">&amp; #1 $5 100% a+b=c -- --- ... ?! @user _under_ ~tilde^ '
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \u0661\u0662\u0663 "
    "\U0001f600\U0001f680 \u2014 \u2026 \u00a0nbsp\u3000wide (parens)[brackets]{braces}\n/slash-after-newline .\n/."
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files, chat templates and generation config of a directory."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for template in (source / ADDITIONAL).glob("*.jinja"):
        (target / ADDITIONAL).mkdir(exist_ok=True)
        shutil.copyfile(template, target / ADDITIONAL / template.name)


def token_ids(directory: Path) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id of a directory's config.json."""
    values = read_json(directory / "config.json")
    return {key: values[key] for role in ("bos", "eos", "pad") if (key := f"{role}_token_id") in values}


def gguf_token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The same from GGUF metadata."""
    found = {role: metadata.get(f"tokenizer.ggml.{ROLES[role]}_token_id") for role in ("bos", "eos", "pad")}
    return {f"{role}_token_id": value for role, value in found.items() if isinstance(value, int)}


def write_tokenizer_files(metadata: Mapping[str, Any], tokenizer: "Tokenizer", target: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json (chat template included) and generation_config.json from a GGUF's."""
    tokenizer.save(str(target / "tokenizer.json"))
    ids, tokens = gguf_token_ids(metadata), metadata["tokenizer.ggml.tokens"]
    roles = {role: metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in ROLES.items()}
    config: dict[str, Any] = {f"{role}_token": tokens[i] for role, i in roles.items() if isinstance(i, int)}
    config |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if (templates := template_entry(metadata)) is not None:
        config["chat_template"] = templates
    for name, values in (("tokenizer_config.json", config), ("generation_config.json", ids)):
        (target / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def gguf_tokenizer(directory: Path, vocab_size: int, pre: str | None) -> dict[str, Any]:
    """`tokenizer.*` metadata of a directory with tokenizer.json, for an embedding of `vocab_size` rows.

    `pre` is the user's own name for how words are cut, taken as it is.
    Supported are byte-level BPE and SentencePiece-like BPE with byte fallback. Raises CheckpointError for any other
    kind, for a pre-tokenizer that no name stands for, and if the metadata read back give other ids.
    """
    from assay.loaders.tokenizer import TokenType, tokenizer_from_file, tokenizer_from_gguf

    path = directory / "tokenizer.json"
    tokenizer, content = tokenizer_from_file(path), read_json(path, 1 << 28, 1 << 31)  # vocabularies are long
    model = content["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            "no tokenizer that GGUF can hold", where=path, expected="model type BPE", got=model.get("type")
        )
    values: dict[str, Any] = _vocabulary(tokenizer, content, vocab_size, path)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        values |= {"model": "llama", "scores": _scores(values["tokens"], merges)}
        values["token_type"][[t.startswith("<0x") and len(t) == 6 for t in values["tokens"]]] = TokenType.BYTE
        values["add_space_prefix"] = tokenizer.encode("a", add_special_tokens=False).tokens[0] != "a"
    else:
        values |= {"model": "gpt2", "pre": pre or _pre_tokenizer_name(tokenizer, model, path), "merges": merges}
    values |= _ends(tokenizer, directory)
    if model.get("byte_fallback") and (unknown := values.get("unknown_token_id")) is not None:
        values["token_type"][unknown] = TokenType.UNKNOWN
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if pre is None:
        _check_same(tokenizer, tokenizer_from_gguf(metadata), path)
    return metadata | templates_of(directory)


def _vocabulary(tokenizer: "Tokenizer", content: dict[str, Any], vocab_size: int, path: Path) -> dict[str, Any]:
    """Tokens and their types for every row of the embedding."""
    from assay.loaders.tokenizer import TokenType

    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(by_id) >= vocab_size:
        raise CheckpointError(
            "more tokens than the embedding has rows", where=path, expected=f"ids below {vocab_size}", got=max(by_id)
        )
    types = np.array([TokenType.NORMAL if i in by_id else TokenType.UNUSED for i in range(vocab_size)], np.int32)
    for added in content.get("added_tokens", ()):
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return {"tokens": [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)], "token_type": types}


def _scores(tokens: list[str], merges: list[str]) -> np.ndarray:
    """SentencePiece scores float32 [V] that give back the order of the merges: minus the rank of a piece's first."""
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault(merge.replace(" ", ""), len(ranks))
    return np.array([-float(ranks.get(token, len(ranks))) for token in tokens], np.float32)


def _ends(tokenizer: "Tokenizer", directory: Path) -> dict[str, Any]:
    """Ids of the tokens that have a role, and whether BOS and EOS are added to a text."""
    from_file = directory / "tokenizer_config.json"
    named = read_json(from_file) if from_file.exists() else {}
    given = read_json(directory / "config.json")
    ids: dict[str, Any] = {}
    for role, name in ROLES.items():
        token = named.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.token_to_id(text) if isinstance(text, str) else None
        value = found if found is not None else given.get(f"{role}_token_id")
        if isinstance(value, list):  # several ends of generation: GGUF has room for one
            value = value[0] if value else None
        if isinstance(value, int):
            ids[f"{name}_token_id"] = value
    bare, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    before, after = whole[:at], whole[at + len(bare) :]
    for tokens, role in ((before, "bos"), (after, "eos")):
        if tokens and tokens != [ids.get(f"{role}_token_id")]:
            raise CheckpointError(
                f"the tokenizer adds tokens to a text that GGUF cannot say: {tokens}",
                where=directory / "tokenizer.json",
                expected=f"at most the {role.upper()} token",
            )
    return ids | {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _pre_tokenizer_name(tokenizer: "Tokenizer", model: dict[str, Any], path: Path) -> str:
    """The first name in the table whose pre-tokenizer cuts PROBE as the tokenizer's own does."""
    from assay.loaders.pretokenizers import PRE_TOKENIZERS, byte_level_splitter

    vocabulary = tokenizer.get_vocab()
    own = tokenizer.pre_tokenizer
    wanted = None if own is None else own.pre_tokenize_str(PROBE)
    for name, entry in PRE_TOKENIZERS.items():
        same_merging = entry.ignore_merges == bool(model.get("ignore_merges"))
        if same_merging and byte_level_splitter(entry, vocabulary).pre_tokenize_str(PROBE) == wanted:
            return name
    raise CheckpointError(
        "the way this tokenizer cuts text into words has no name in GGUF that is known here",
        where=path,
        expected=f"one of {', '.join(PRE_TOKENIZERS)}",
        remedy="give --pre NAME if you know llama.cpp's name for it",
    )


def _check_same(before: "Tokenizer", after: "Tokenizer", path: Path) -> None:
    """Raise if the tokenizer that a GGUF reader builds gives other ids than the one it was made from."""
    wanted, got = before.encode(PROBE).ids, after.encode(PROBE).ids
    if wanted != got:
        at = next((i for i, (w, g) in enumerate(zip(wanted, got, strict=False)) if w != g), min(len(wanted), len(got)))
        raise CheckpointError(
            f"the tokenizer cannot be said in GGUF: token {at} of a test text changes",
            where=path,
            expected=wanted[at : at + 5],
            got=got[at : at + 5],
        )
