"""A checkpoint written in another container: every value kept, or an error, unless quantising was asked for."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from assay.loaders.atomic import check_free, check_room, replacing_directory, replacing_file
from assay.loaders.checkpoint import Checkpoint, open_checkpoint
from assay.loaders.config import config_from_hf
from assay.loaders.errors import CheckpointError
from assay.loaders.gguf_config import config_from_gguf
from assay.loaders.gguf_file import GgufFile, read_gguf
from assay.loaders.plan import FLOATS, Choice, plan
from assay.loaders.quantise import Accuracy, Encoder
from assay.loaders.recode import Kept
from assay.loaders.weight import Weight, Written, fused, weight_of
from assay.loaders.write_config import (
    gguf_arch,
    gguf_config,
    hf_config,
    model_type_of,
    rope_tensors,
    said_in_gguf,
    said_in_hf,
)
from assay.loaders.write_gguf import gguf_name, is_gguf_vector, write_gguf
from assay.loaders.write_safetensors import hf_streams, mlx_quantization, mlx_streams, write_set
from assay.loaders.write_tokenizer import (
    copy_tokenizer,
    gguf_token_ids,
    gguf_tokenizer,
    token_ids,
    write_tokenizer_files,
)
from assay.reference.config import Config, GptOssConfig
from assay.reference.formats import MXFP4, MXFP4_BLOCKS
from assay.reference.formats.floats import FloatFormat
from assay.reference.weights import Encoding, Tensor

CONTAINERS = ("gguf", "safetensors", "mlx")
SHARD_BYTES = 5_000_000_000
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much
KEPT = {Kept.BITS: "bits", Kept.BUT_ZERO_SIGN: "values", Kept.NOT: "rounded"}


@dataclass(frozen=True)
class Change:
    """What became of one tensor.

    The layouts say how each file's form differs from the canonical tensor, as the loader undoes it.
    `kept` is "bits" if every decoded value has the same bits, "values" if some -0 became +0, else "rounded". Of a
    rounded tensor there are the signal-to-noise ratio in dB, None without noise, and the median and the worst
    relative error of an element, None where it is infinite: a zero became another number.
    """

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    layout_before: tuple[str, ...]
    layout_after: tuple[str, ...]
    kept: str
    sqnr_db: float | None = None
    median_relative_error: float | None = None
    worst_relative_error: float | None = None
    worst_index: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Conversion:
    """A written checkpoint and what became of each tensor."""

    path: Path
    format: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def convert(
    source: Checkpoint,
    target: Path,
    to: str,
    *,
    quant: Encoder | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    pre: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Conversion:
    """Write `source` at `target` as one of CONTAINERS: a GGUF file, or a directory.

    `quant` is for matrices that are in floats, or that the container can only hold so; `pre` names the pre-tokenizer
    for GGUF. Raises CheckpointError for what exists already (without `force`), for what the container cannot say,
    and if what was written does not read back; then nothing stays.
    """
    check_free(target, force)
    _check_apart(source.path, target)
    weights = {name: weight_of(tensor) for name, tensor in source.tensors.items()}
    chosen: dict[str, Choice] = {}
    for choice in plan(weights, to, quant, narrow_vectors=source.format == "gguf" and to != "gguf"):
        chosen[choice.before.name] = choice
        progress("choosing encodings", len(chosen), len(weights))
    outcome = {name: choice.after for name, choice in chosen.items()}
    total = sum(weight.nbytes for weight in outcome.values())
    check_room(target, total)
    done = 0

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("writing", done, total)

    model_type = model_type_of(source.config, source.is_phi3)
    if to == "gguf":
        metadata, notes = _gguf_metadata(source, model_type, pre)
        write_gguf_checkpoint(target, source.config, model_type, outcome, metadata, written)
    else:
        notes = _write_directory(source, target, model_type, to, outcome, shard_bytes, written)
    result = open_checkpoint(target)
    changes = tuple(_change(choice, source.tensors[n], result.tensors[n]) for n, choice in chosen.items())
    notes += _widened(changes, to) + _left_in_floats(chosen.values(), quant, to)
    return Conversion(target, to, changes, tuple(notes))


def _left_in_floats(choices: Iterable[Choice], quant: Encoder | None, to: str) -> list[str]:
    """The matrices that `quant` could not be applied to."""
    left = [c for c in choices if c.after.is_matrix and c.after.encoding.name in FLOATS]
    if quant is None or isinstance(quant.encoding, FloatFormat) or not left:
        return []
    names = ", ".join(choice.after.name for choice in left[:3]) + (", ..." if len(left) > 3 else "")
    why = "Hugging Face has a place for it in experts only" if to == "safetensors" else "their rows are no whole groups"
    return [f"{len(left)} matrices stayed floats, not {quant.encoding.name}, because {why}: {names}"]


def _widened(changes: Sequence[Change], to: str) -> list[str]:
    """What grew because the container has no place for its encoding, and how to have it smaller."""
    matrices = [change for change in changes if not is_gguf_vector(change.name)]
    grown = [c for c in matrices if c.after in FLOATS and c.before not in FLOATS and c.bytes_after > c.bytes_before]
    if not grown:
        return []
    before, after = (sum(getattr(change, key) for change in grown) for key in ("bytes_before", "bytes_after"))
    names = ", ".join(sorted({change.before for change in grown}))
    smaller = {"gguf": "Q8_0", "mlx": "affine8/64"}.get(to, "BF16")
    return [
        f"{to} has no place for the values of {names}: {len(grown)} matrices became floats, so that none changes, and "
        f"grew from {before / 1e6:,.1f} MB to {after / 1e6:,.1f} MB; --quant {smaller} keeps them small, rounded anew"
    ]


def _check_apart(source: Path, target: Path) -> None:
    """Refuse to replace the source, or a folder that holds it."""
    resolved = source.resolve()
    if target.resolve() in (resolved, *resolved.parents):
        raise CheckpointError("the target is the source, or holds it", where=target, remedy="name another place")


def write_gguf_checkpoint(
    target: Path,
    config: Config,
    model_type: str,
    weights: Mapping[str, Weight],
    metadata: Mapping[str, Any],
    written: Written,
) -> None:
    """Write a GGUF file whole or not at all, once it is sure that its metadata will say this config."""
    weights = fused(weights) if model_type == "phi3" else weights
    expected, arch = said_in_gguf(config), gguf_arch(model_type)
    said = {"general.architecture": arch, **gguf_config(config, model_type)}
    shapes = {gguf_name(arch, name): weight.shape for name, weight in weights.items()}
    _check_config(config_from_gguf(said, shapes, rope_tensors(config), str(target)), expected, "GGUF")
    with replacing_file(target) as temporary:
        write_gguf(temporary, config, model_type, list(weights.values()), metadata, written)
        _check_config(open_checkpoint(temporary).config, expected, "GGUF")


def write_directory(
    target: Path,
    config: Config,
    model_type: str,
    to: str,
    weights: Mapping[str, Weight],
    token_ids: Mapping[str, Any],
    shard_bytes: int,
    written: Written,
    write_tokenizer: Callable[[Path], None],
) -> None:
    """Write a Hugging Face or MLX directory whole or not at all; `write_tokenizer` adds the tokenizer's files."""
    weights = fused(weights) if model_type == "phi3" else weights
    expected = said_in_hf(config)
    floats = {w.encoding.name for w in weights.values() if isinstance(w.encoding, FloatFormat)}
    values = hf_config(config, model_type, floats.pop() if len(floats) == 1 else "F32", token_ids)
    if to == "mlx":
        streams = mlx_streams(weights)
        if quantization := mlx_quantization(weights):
            values |= {"quantization": quantization, "quantization_config": quantization}
    else:
        streams = hf_streams(weights)
        if isinstance(config, GptOssConfig) and any(w.encoding is MXFP4 for w in weights.values()):
            kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
            values["quantization_config"] = {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    _check_config(config_from_hf(values, str(target)), expected, "config.json")
    with replacing_directory(target) as temporary:
        (temporary / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        write_tokenizer(temporary)
        write_set(temporary, streams, {"format": "mlx" if to == "mlx" else "pt"}, shard_bytes, written)
        _check_config(open_checkpoint(temporary).config, expected, "config.json")


def _write_directory(
    source: Checkpoint,
    target: Path,
    model_type: str,
    to: str,
    weights: Mapping[str, Weight],
    shard_bytes: int,
    written: Written,
) -> list[str]:
    notes: list[str] = []
    if source.format == "gguf":
        file = read_gguf(source.path)
        ids = gguf_token_ids(file.metadata)

        def write_tokenizer(directory: Path) -> None:
            if "tokenizer.ggml.model" in file.metadata:
                write_tokenizer_files(file.metadata, source.tokenizer, directory)
            else:
                notes.append("the source has no tokenizer, so none was written")
    else:
        ids = token_ids(source.path)

        def write_tokenizer(directory: Path) -> None:
            copy_tokenizer(source.path, directory)

    write_directory(target, source.config, model_type, to, weights, ids, shard_bytes, written, write_tokenizer)
    return notes


def _gguf_metadata(source: Checkpoint, model_type: str, pre: str | None) -> tuple[dict[str, Any], list[str]]:
    """What a GGUF says beside the config: general.* and tokenizer.*."""
    if source.format == "gguf":
        return _carried(read_gguf(source.path)), []
    called = source.path.resolve().name
    if not (source.path / "tokenizer.json").exists():
        name = {"general.name": gguf_model_name(called, model_type, ())}
        return name, ["the source has no tokenizer.json, so no tokenizer was written"]
    tokenizer = gguf_tokenizer(source.path, source.config.vocab_size, pre)
    name = {"general.name": gguf_model_name(called, model_type, tokenizer["tokenizer.ggml.tokens"])}
    eos = tokenizer.get("tokenizer.ggml.eos_token_id")
    left = [token for token in source.stop_tokens if token != eos]
    notes = [f"a GGUF has room for one end of generation, here {eos}; left out: {', '.join(map(str, left))}"]
    return name | tokenizer, notes if left else []


def gguf_model_name(called: str, model_type: str, tokens: Collection[str]) -> str:
    """A model's name in a GGUF: "phi-3" in it where llama.cpp can act on that, and nowhere else.

    By this mark llama.cpp knows that special tokens swallow the space behind them; and it looks up four tokens then,
    without which it cannot load the file (llama-vocab.cpp).
    """
    if not {"</s>", "<s>", "<unk>", "<|endoftext|>"} <= set(tokens):
        return re.sub(r"(phi)-?3", r"\1 3", called, flags=re.IGNORECASE)
    is_marked = re.search(r"phi-?3", called, re.IGNORECASE)
    return called if is_marked or model_type != "phi3" else f"phi-3 {called}"


def _carried(file: GgufFile) -> dict[str, Any]:
    """The metadata of a GGUF that stay true in another GGUF."""
    renewed = ("general.alignment", "general.file_type", "general.quantization_version")
    return {
        key: value
        for key, value in file.metadata.items()
        if key.startswith(("general.", "tokenizer.")) and key not in renewed
    }


def _check_config(got: Config, expected: Config, container: str) -> None:
    """Raise CheckpointError, naming the fields, if a container does not say the config it was given."""
    if got == expected:
        return
    wanted, said = asdict(expected), asdict(got)
    fields = [name for name in wanted if wanted[name] != said.get(name)]
    raise CheckpointError(
        f"{container} cannot say this model's {', '.join(fields) or 'architecture'}",
        expected={name: wanted[name] for name in fields},
        got={name: said.get(name) for name in fields},
    )


def _change(choice: Choice, before: Tensor, after: Tensor) -> Change:
    return Change(
        name=before.name,
        shape=before.shape,
        before=before.encoding.name,
        after=after.encoding.name,
        bytes_before=before.nbytes,
        bytes_after=after.nbytes,
        layout_before=before.layout + _nibbles(before.encoding),
        layout_after=after.layout + _nibbles(after.encoding),
        kept=KEPT[choice.kept],
        **_figures(choice.rounding.accuracy),
    )


def _figures(accuracy: Accuracy | None) -> dict[str, Any]:
    """The fields of a Change that say how much was lost."""
    if accuracy is None:
        return {}
    figures = {
        "sqnr_db": accuracy.sqnr_db,
        "median_relative_error": accuracy.median_relative_error,
        "worst_relative_error": accuracy.worst_relative_error,
    }
    finite = {name: value if isfinite(value) else None for name, value in figures.items()}
    return finite | {"worst_index": accuracy.worst_index}


def _nibbles(encoding: Encoding) -> tuple[str, ...]:
    """MXFP4's order of elements, which its name does not tell."""
    return ("adjacent nibbles",) if encoding is MXFP4 else ("split-half nibbles",) if encoding is MXFP4_BLOCKS else ()
