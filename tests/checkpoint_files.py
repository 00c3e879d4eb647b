"""The checkpoints under tests/checkpoints, opened once, and the means to write copies with one thing wrong."""

import functools
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from assay.loaders.checkpoint import Checkpoint, open_checkpoint

CHECKPOINTS = Path(__file__).parent / "checkpoints"
Entry = tuple[str, list[int], bytes]  # dtype, shape, data


@functools.cache
def opened(name: str) -> Checkpoint:
    """A checkpoint of tests/checkpoints, e.g. `gpt_oss/hf`; `.gguf` is found in its folder."""
    return open_checkpoint(CHECKPOINTS / name)


@functools.cache
def expected(family: str) -> dict[str, np.ndarray]:
    """What transformers computes for `FAMILY/hf`, and the tokens it ran."""
    return load_file(CHECKPOINTS / family / "expected.safetensors")


def tokens_of(family: str) -> list[int]:
    """The tokens of `expected`."""
    return [int(token) for token in expected(family)["tokens"]]


def copied(name: str, target: Path) -> Path:
    """A writable copy of a checkpoint's folder."""
    shutil.copytree(CHECKPOINTS / name, target)
    return target


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply a change to a JSON object in place."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def read_entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and metadata of a safetensors file, read by nothing of ours."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    data = raw[8 + length :]
    return {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()}, metadata


def write_entries(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file byte by byte."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in entries.values()))


def edit_tensors(path: Path, change: Callable[[dict[str, Entry]], object]) -> None:
    """Apply a change to the tensors of a safetensors file in place."""
    entries, metadata = read_entries(path)
    change(entries)
    write_entries(path, entries, metadata)


def write_gguf(
    source: Path, target: Path, metadata: Mapping[str, Any] | None = None, tensors: Mapping[str, Any] | None = None
) -> Path:
    """Copy a GGUF by gguf-py with changed entries (None removes one); tensors are arrays or (bytes, type)."""
    import gguf

    reader = gguf.GGUFReader(source)
    metadata, tensors = dict(metadata or {}), dict(tensors or {})
    arch = metadata.get("general.architecture", reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, arch)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in metadata or key == "general.architecture":
            continue
        writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for key, value in metadata.items():
        if value is None or key == "general.architecture":
            continue
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(
            key, value, kind, gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
        )
    for tensor in reader.tensors:
        if tensor.name not in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, array in tensors.items():
        if isinstance(array, tuple):
            writer.add_tensor(name, array[0], raw_dtype=array[1])
        elif array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def with_weight(checkpoint: Checkpoint, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Checkpoint:
    """The checkpoint with one weight changed in memory, as float32."""
    from tests.fast.models import float_tensor

    changed = float_tensor(name, change(checkpoint.tensors[name].decode()), "F32")
    return replace(checkpoint, tensors={**checkpoint.tensors, name: changed})
