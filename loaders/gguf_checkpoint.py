"""GGUF files as checkpoints: llama.cpp's names, blocks and metadata to canonical ones."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from assay.loaders.checkpoint import Checkpoint, Stored, assemble
from assay.loaders.delegated import DELEGATED
from assay.loaders.errors import CheckpointError, Report, refuse, reporting
from assay.loaders.gguf_config import ROPE_TENSORS, config_from_gguf
from assay.loaders.gguf_file import GgufFile, GgufTensor, read_gguf
from assay.loaders.names import gguf_targets
from assay.reference.formats import GGML_BLOCKS, GGML_PLAIN, NVFP4_BLOCKS, NVFP4_TWO_LEVEL
from assay.reference.weights import Encoding

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file; raises CheckpointError."""
    return gguf_checkpoint(read_gguf(path))


def gguf_checkpoint(file: GgufFile, report: Report = refuse) -> Checkpoint:
    """The checkpoint in a GGUF file; without the tensors at fault, if `report` returns from what is wrong with them."""
    path, stored = file.path, dict[str, Stored]()
    for name, tensor in file.tensors.items():
        with reporting(report):
            stored[name] = (*_parts(file, tensor), (name,))
    faulty = dict.fromkeys([*file.faulty, *(name for name in file.tensors if name not in stored)])
    derived = _join_nvfp4_scales(stored, path, report)
    arch = str(file.metadata.get("general.architecture"))
    rope = {name: stored.pop(name) for name in ROPE_TENSORS.get(arch, ()) if name in stored}
    config = config_from_gguf(
        file.metadata,
        {name: tensor.shape for name, tensor in file.tensors.items()} | file.faulty,
        {name: encoding.decode(parts) for name, (encoding, parts, _) in rope.items()},
        str(path),
    )
    targets = {name: gguf_targets(arch, name) for name in (*stored, *faulty)}
    tensors, unused = assemble(config, path, targets, {**stored, **faulty}, derived, report)

    def stop_tokens() -> tuple[int, ...]:
        from assay.loaders.tokenizer import stop_tokens_from_gguf

        return stop_tokens_from_gguf(file.metadata)

    def load_tokenizer() -> "Tokenizer":
        from assay.loaders.tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(file.metadata)

    return Checkpoint(path, "gguf", config, tensors, unused, stop_tokens, load_tokenizer)


def _parts(file: GgufFile, tensor: GgufTensor) -> tuple[Encoding, dict[str, np.ndarray]]:
    """The encoding of a stored tensor and its parts, views of the file."""
    *rows, columns = tensor.shape
    data = file.view(tensor)
    if tensor.ggml_type in GGML_PLAIN:
        plain = GGML_PLAIN[tensor.ggml_type]
        if plain.name.startswith("I"):
            raise CheckpointError(
                f"tensor {tensor.name!r} has the wrong type: weights are not integers without a scale",
                where=file.path,
                expected="floats or a quantised type",
                got=plain.name,
            )
        return plain, {"values": data.view(plain.stored).reshape(tensor.shape)}
    format = GGML_BLOCKS.get(tensor.ggml_type) or DELEGATED[tensor.ggml_type]
    return format, {"blocks": data.reshape(*rows, columns // format.elements, format.nbytes)}


def _join_nvfp4_scales(stored: dict[str, Stored], path: Path, report: Report) -> dict[str, str]:
    """Join X.scale to NVFP4's X.weight, as its second scale; answers the tensors that only activations need.

    llama.cpp's loader reads X.scale [1] or [N], one an expert, and X.input_scale, for quantised activations.
    """
    unused = {}
    for name in [name for name, (encoding, _, _) in stored.items() if encoding is NVFP4_BLOCKS]:
        stem = name.removesuffix("weight")
        if stored.pop(f"{stem}input_scale", None):
            unused[f"{stem}input_scale"] = "scales quantised activations"
        if found := stored.pop(f"{stem}scale", None):
            parts = stored[name][1]
            *experts, rows = parts["blocks"].shape[:-2]
            scale = found[0].decode(found[1])
            if scale.shape not in ((1,), (*experts,)):
                what, got = f"{stem}scale does not fit {name}", list(scale.shape)
                report(CheckpointError(what, where=path, tensors=(f"{stem}scale",), expected=experts or [1], got=got))
                continue
            per_row = np.broadcast_to(scale[..., None] if experts else scale, (*experts, rows))
            stored[name] = NVFP4_TWO_LEVEL, {**parts, "scale": per_row}, (name, f"{stem}scale")
    return unused
