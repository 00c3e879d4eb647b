"""Hugging Face and MLX directories as checkpoints: config.json, safetensors, tokenizer.json.

The two differ in how quantised weights are stored and in gpt-oss's experts; everything else is shared.
Which one a directory is follows from its content: MLX writes {"format": "mlx"} into the files' metadata
or a `quantization` entry into the config.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.loaders.checkpoint import Checkpoint, Stored, assemble
from assay.loaders.config import config_from_hf
from assay.loaders.errors import CheckpointError, Report, refuse, reporting
from assay.loaders.json_text import read_json
from assay.loaders.names import safetensors_targets
from assay.loaders.safetensors_file import SafeTensor, SafetensorsFile, open_safetensors_set
from assay.reference.formats import BF16, F16, F32, MLX_BITS, MLX_MODES, MXFP4, AffineGroups, Microscaled

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FLOATS = {"F32": F32, "F16": F16, "BF16": BF16}
Reading = Iterator[tuple[str, Callable[[], Stored]]]  # the name that a stored tensor's targets are known by, its reader


def _settings(values: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    """A JSON object under a key that may be absent or null."""
    settings = values.get(key) or {}
    if not isinstance(settings, dict):
        raise CheckpointError(f"key {key!r} has the wrong type", where=where, expected="an object", got=repr(settings))
    return settings


def open_directory(directory: Path) -> Checkpoint:
    """Open a directory with config.json and safetensors; raises CheckpointError."""
    values = read_json(directory / "config.json")
    return directory_checkpoint(directory, values, open_safetensors_set(directory), set())


def directory_checkpoint(
    directory: Path,
    values: Mapping[str, Any],
    files: Mapping[str, tuple[SafetensorsFile, SafeTensor]],
    faulty: set[str],
    report: Report = refuse,
) -> Checkpoint:
    """The checkpoint of a config.json's values and stored tensors.

    Without the tensors at fault: those `faulty` by themselves, and others if `report` returns from what is wrong.
    """
    is_mlx = "quantization" in values or any(f.metadata.get("format") == "mlx" for f, _ in files.values())
    config = config_from_hf(values, str(directory / "config.json"))
    raw = _Raw(files, directory, faulty)
    readers = _mlx_tensors(raw, _settings(values, "quantization", directory)) if is_mlx else _hf_tensors(raw, values)
    stored: dict[str, Stored | None] = {}
    for name, read in readers:
        stored[name] = None
        with reporting(report):
            stored[name] = read()
    targets = {name: safetensors_targets(name) for name in stored}
    # old Llama files carry this table; it follows from rope_theta and is recomputed
    derived = {name: "derived from the config" for name in stored if name.endswith("rotary_emb.inv_freq")}
    stored = {name: value for name, value in stored.items() if name not in derived}
    tensors, unused = assemble(config, directory, targets, stored, derived, report)

    def load_tokenizer() -> "Tokenizer":
        from assay.loaders.tokenizer import tokenizer_from_file

        return tokenizer_from_file(directory / "tokenizer.json")

    format, stop = "mlx" if is_mlx else "safetensors", _stop_tokens(directory, values)
    return Checkpoint(directory, format, config, tensors, unused, lambda: stop, load_tokenizer)


def _stop_tokens(directory: Path, values: Mapping[str, Any]) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, which overrides config.json's: an id or several."""
    generation = directory / "generation_config.json"
    eos = (read_json(generation) if generation.exists() else {}).get("eos_token_id", values.get("eos_token_id"))
    ids = eos if isinstance(eos, list) else [eos]
    return tuple(token for token in ids if isinstance(token, int))


class _Raw:
    """The stored arrays of a directory, by the files' own names."""

    def __init__(self, files: Mapping[str, tuple[SafetensorsFile, SafeTensor]], directory: Path, faulty: set[str]):
        self.files, self.where, self.names = files, directory, [*files, *sorted(faulty)]
        self.known = set(self.names)

    def array(self, name: str, *dtypes: str) -> np.ndarray:
        """A view of a stored array, its dtype checked against those allowed."""
        if name not in self.files:
            raise CheckpointError(f"tensor {name!r} is missing", where=self.where, tensors=(name,))
        file, tensor = self.files[name]
        if tensor.dtype not in dtypes:
            what, expected = f"tensor {name!r} has the wrong dtype", " or ".join(dtypes)
            raise CheckpointError(what, where=file.path, tensors=(name,), expected=expected, got=tensor.dtype)
        return file.array(tensor)

    def plain(self, name: str) -> Stored:
        """An unquantised tensor."""
        values = self.array(name, *FLOATS)
        return FLOATS[self.files[name][1].dtype], {"values": values}, (name,)

    def microscaled(self, encoding: Microscaled, blocks_name: str, blocks: np.ndarray, scales_name: str) -> Stored:
        """A microscaled tensor from its blocks uint8 [..., n, group_bytes] and the name of its scales."""
        scales = self.array(scales_name, "U8")
        if blocks.shape != (*scales.shape, encoding.group_bytes):
            raise CheckpointError(
                f"{blocks_name!r} and {scales_name!r} do not fit together",
                where=self.where,
                tensors=(blocks_name,),
                expected=f"one scale for each {encoding.group} values: {[*scales.shape, encoding.group_bytes]}",
                got=list(blocks.shape),
            )
        return encoding, {"blocks": blocks, "scales": scales}, (blocks_name, scales_name)


def _hf_tensors(raw: _Raw, values: Mapping[str, Any]) -> Reading:
    method = _settings(values, "quantization_config", raw.where).get("quant_method")
    if method not in (None, "mxfp4"):
        raise CheckpointError(
            "quantisation is not supported", where=raw.where, expected="none or mxfp4", got=f"quant_method {method!r}"
        )
    for name in raw.names:
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            yield f"{stem}_mx", partial(_hf_microscaled, raw, stem)
        elif not (name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in raw.known):
            yield name, partial(raw.plain, name)


def _hf_microscaled(raw: _Raw, stem: str) -> Stored:
    return raw.microscaled(MXFP4, f"{stem}_blocks", raw.array(f"{stem}_blocks", "U8"), f"{stem}_scales")


def _mlx_tensors(raw: _Raw, quantization: Mapping[str, Any]) -> Reading:
    for name in raw.names:
        module = re.sub(r"\.(weight|scales|biases)$", "", name)
        if name.endswith((".scales", ".biases")) and f"{module}.weight" in raw.known:
            continue
        quantised = name.endswith(".weight") and f"{module}.scales" in raw.known
        yield name, partial(_mlx_quantised, raw, module, quantization) if quantised else partial(raw.plain, name)


def _mlx_quantised(raw: _Raw, module: str, quantization: Mapping[str, Any]) -> Stored:
    """A quantised weight under its own module's settings, or under the defaults of the file."""
    own = quantization.get(module)
    settings = own if isinstance(own, dict) else quantization
    mode = settings.get("mode", "affine")
    bits, group_size = settings.get("bits"), settings.get("group_size")
    weight = raw.array(f"{module}.weight", "U32")
    encoding = MLX_MODES.get(mode) if isinstance(mode, str) else None
    if weight.ndim < 2 or (encoding and weight.shape[-1] * 4 % encoding.group_bytes):
        what, name = f"{module}.weight is not rows of whole groups", f"{module}.weight"
        raise CheckpointError(what, where=raw.where, tensors=(name,), got=list(weight.shape))
    if encoding and bits in (None, encoding.element.bits) and group_size in (None, encoding.group):
        blocks = weight.view(np.uint8).reshape(*weight.shape[:-1], -1, encoding.group_bytes)
        return raw.microscaled(encoding, f"{module}.weight", blocks, f"{module}.scales")
    if mode != "affine" or bits not in MLX_BITS or not isinstance(group_size, int) or group_size < 1:
        raise CheckpointError(
            f"quantisation of {module!r} is not supported",
            where=raw.where,
            tensors=(f"{module}.weight",),
            expected="mode affine with 2, 3, 4, 5, 6 or 8 bits and a group size, mxfp4, mxfp8 or nvfp4",
            got=f"mode {mode!r}, bits {bits!r}, group_size {group_size!r}",
        )
    scales = raw.array(f"{module}.scales", *FLOATS)
    scale_dtype = raw.files[f"{module}.scales"][1].dtype
    biases = raw.array(f"{module}.biases", scale_dtype)
    *rows, words = weight.shape
    groups, left = divmod(words * 32 // bits, group_size)
    if left or not scales.shape == biases.shape == (*rows, groups):
        raise CheckpointError(
            f"parts of {module!r} do not fit together",
            where=raw.where,
            tensors=(f"{module}.weight",),
            expected=f"a scale and a bias for each {group_size} values of {bits} bits",
            got=f"weight {list(weight.shape)}, scales {list(scales.shape)}, biases {list(biases.shape)}",
        )
    parts = {"weight": weight, "scales": scales, "biases": biases}
    return AffineGroups(bits, group_size, FLOATS[scale_dtype]), parts, tuple(f"{module}.{part}" for part in parts)
