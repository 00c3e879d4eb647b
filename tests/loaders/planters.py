"""Ways to plant one fault into a copied checkpoint; each answers where `assay verify` must say it is.

Places are worked out by other means than the readers': the header parsed by hand, or gguf-py.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from tests.checkpoint_files import edit_json, edit_tensors, read_entries, write_gguf

ONE, GGUF, INDEX = "model.safetensors", "model.gguf", "model.safetensors.index.json"
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBED, K_PROJ, NORM = "model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"


class Place(NamedTuple):
    """Where a fault is: the tensor, the file, the byte; None where there is no such thing."""

    tensor: str | None
    file: str | None
    byte: int | None


def poke(path: Path, byte: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        file.write(content)


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors header and where the data starts."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


def begin(path: Path, name: str) -> int:
    header, start = header_of(path)
    return start + header[name]["data_offsets"][0]


def quoted(path: Path, name: str) -> int:
    """Where the header names a tensor."""
    return path.read_bytes().index(f'"{name}"'.encode())


# --- safetensors ---


def code(file: str, name: str, at: int, content: bytes) -> Callable[[Path], Place]:
    """Overwrite bytes `at` from the start of a tensor's data."""

    def plant(folder: Path) -> Place:
        byte = begin(folder / file, name) + at
        poke(folder / file, byte, content)
        return Place(name, file, byte)

    return plant


def entry(
    name: str, change: Callable[[dict[str, Any]], object], place: str, file: str = ONE
) -> Callable[[Path], Place]:
    """Change a header entry, the data as it was; the place is where the entry or the data is."""

    def plant(folder: Path) -> Place:
        path = folder / file
        header, start = header_of(path)
        data = path.read_bytes()[start:]
        change(header[name])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return Place(name, file, quoted(path, name) if place == "entry" else begin(path, name))

    return plant


def shifted(by: int) -> Callable[[dict[str, Any]], object]:
    return lambda e: e.__setitem__("data_offsets", [offset + by for offset in e["data_offsets"]])


def hole(folder: Path) -> Place:
    """A tensor two bytes later than the end of the one before, which is where the hole is."""
    place = entry(K_PROJ, shifted(2), "data")(folder)
    return place._replace(byte=begin(folder / ONE, K_PROJ) - 2)


def zeroed(file: str, name: str) -> Callable[[Path], Place]:
    def plant(folder: Path) -> Place:
        length = len(read_entries(folder / file)[0][name][2])
        return code(file, name, 0, bytes(length))(folder)

    return plant


def replaced(name: str, dtype: str, shape: list[int], file: str = ONE) -> Callable[[Path], Place]:
    """A tensor of small numbers in place of what was there."""
    size = {"BF16": 2, "F32": 4, "I32": 4}[dtype] * int(np.prod(shape))

    def plant(folder: Path) -> Place:
        edit_tensors(folder / file, lambda t: t.__setitem__(name, (dtype, shape, b"\1" * size)))
        return Place(name, file, begin(folder / file, name))

    return plant


def without(name: str, file: str = ONE) -> Callable[[Path], Place]:
    def plant(folder: Path) -> Place:
        edit_tensors(folder / file, lambda t: t.pop(name))
        return Place(name, folder.name, None)

    return plant


def cut(file: str, by: int) -> Callable[[Path], Place]:
    """The end of a file missing: seen at its last tensor."""

    def plant(folder: Path) -> Place:
        path = folder / file
        header, start = header_of(path)
        header.pop("__metadata__", None)
        last = max(header, key=lambda name: header[name]["data_offsets"])
        path.write_bytes(path.read_bytes()[:-by])
        return Place(last, file, start + header[last]["data_offsets"][0])

    return plant


def lengthened(file: str, by: int) -> Callable[[Path], Place]:
    def plant(folder: Path) -> Place:
        raw = (folder / file).read_bytes()
        (folder / file).write_bytes(raw + bytes(by))
        return Place(None, file, len(raw))

    return plant


def twice_in_two_shards(folder: Path) -> Place:
    second, _ = read_entries(folder / SHARD_2)
    edit_tensors(folder / SHARD_1, lambda t: t.__setitem__(NORM, second[NORM]))
    return Place(NORM, SHARD_2, begin(folder / SHARD_2, NORM))


def index_names_the_wrong_shard(folder: Path) -> Place:
    edit_json(folder / INDEX, lambda i: i["weight_map"].__setitem__(NORM, SHARD_1))
    return Place(NORM, INDEX, None)


# --- settings and vocabulary of a directory ---


def settings(change: Callable[[dict[str, Any]], object], file: str = "config.json") -> Callable[[Path], Place]:
    def plant(folder: Path) -> Place:
        edit_json(folder / file, change)
        return Place(None, file, None)

    return plant


def at_tensor(
    name: str, change: Callable[[dict[str, Any]], object], file: str = "config.json"
) -> Callable[[Path], Place]:
    """A setting or vocabulary that does not fit a stored tensor: said at the tensor."""

    def plant(folder: Path) -> Place:
        edit_json(folder / file, change)
        return Place(name, ONE, begin(folder / ONE, name))

    return plant


def ghost_module(config: dict[str, Any]) -> None:
    for key in ("quantization", "quantization_config"):
        config[key]["model.layers.9.mlp.router"] = {"group_size": 32, "bits": 4}


def more_tokens(tokenizer: dict[str, Any]) -> None:
    """One token more than the embedding has rows, of the llama checkpoint with its 384."""
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 384, "content": "<|one too many|>"})


def taken_id(tokenizer: dict[str, Any]) -> None:
    """An added token with the id of the first one."""
    tokenizer["added_tokens"][-1]["id"] = tokenizer["added_tokens"][0]["id"]


def coarser(config: dict[str, Any]) -> None:
    for key in ("quantization", "quantization_config"):
        config[key]["group_size"] = 64


# --- GGUF ---


def reader_tensor(path: Path, name: str) -> Any:
    return next(t for t in gguf.GGUFReader(path).tensors if t.name == name)


def block(name: str, at: int, content: bytes) -> Callable[[Path], Place]:
    """Overwrite bytes `at` from the start of a GGUF tensor's data."""

    def plant(folder: Path) -> Place:
        byte = int(reader_tensor(folder / GGUF, name).data_offset) + at
        poke(folder / GGUF, byte, content)
        return Place(name, GGUF, byte)

    return plant


def info(name: str, part: int, change: Callable[[int], int], place: str) -> Callable[[Path], Place]:
    """Change a number of a tensor's info, counted from the end: -1 the offset, -2 the ggml type, -3 the row length."""

    def plant(folder: Path) -> Place:
        path = folder / GGUF
        tensor = reader_tensor(path, name)
        field, start = tensor.field, int(tensor.data_offset)
        byte = field.offset + sum(p.nbytes for p in field.parts[: len(field.parts) + part])
        old, width = int(field.parts[part][0]), field.parts[part].itemsize  # read now: they are views of the file
        new = change(old)
        poke(path, byte, new.to_bytes(width, "little"))
        info_at = path.read_bytes().index(len(name).to_bytes(8, "little") + name.encode())
        return Place(name, GGUF, info_at if place == "info" else start + new - old)

    return plant


def gguf_with(place: Callable[[Path], Place], **changes: Any) -> Callable[[Path], Place]:
    """The file written anew by gguf-py with other metadata or tensors."""

    def plant(folder: Path) -> Place:
        (folder / GGUF).rename(folder / "whole")
        write_gguf(folder / "whole", folder / GGUF, **changes)
        (folder / "whole").unlink()
        return place(folder)

    return plant


def whole_file(tensor: str | None = None) -> Callable[[Path], Place]:
    return lambda folder: Place(tensor, GGUF, None)


def at_data(name: str) -> Callable[[Path], Place]:
    return lambda folder: Place(name, GGUF, int(reader_tensor(folder / GGUF, name).data_offset))


def gguf_cut(folder: Path) -> Place:
    path = folder / GGUF
    last = max(gguf.GGUFReader(path).tensors, key=lambda t: t.data_offset)
    place = Place(last.name, GGUF, int(last.data_offset))
    size = int(last.data_offset) + int(last.n_bytes)
    del last
    path.write_bytes(path.read_bytes()[: size - 1])
    return place


def gguf_gap(folder: Path) -> Place:
    """The last tensor 32 bytes later, over zeros."""
    last = max(gguf.GGUFReader(folder / GGUF).tensors, key=lambda t: t.data_offset).name
    path = folder / GGUF
    content = bytes(reader_tensor(path, last).data.tobytes())
    path.write_bytes(path.read_bytes() + bytes(32))
    place = info(last, -1, lambda offset: offset + 32, "data")(folder)
    assert place.byte is not None
    poke(path, place.byte, content)
    return place


def gguf_bad_text(folder: Path) -> Place:
    """A byte that UTF-8 does not have at the start of a merge, which the tokenizer alone reads."""
    field = gguf.GGUFReader(folder / GGUF).fields["tokenizer.ggml.merges"]
    byte = field.offset + sum(part.nbytes for part in field.parts[: field.data[7]])
    poke(folder / GGUF, byte, b"\xff")
    return Place(None, GGUF, byte)


def gguf_name_twice(folder: Path) -> Place:
    path = folder / GGUF
    raw = path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight")
    path.write_bytes(raw)
    return Place("blk.0.ffn_up.weight", GGUF, raw.rindex(b"blk.0.ffn_up.weight") - 8)
