"""safetensors files, read strictly and lazily: the header is checked whole at opening, nothing is copied.

The layout (huggingface/safetensors, README "Format"): uint64 length of the header, little-endian; the header, a
JSON object of {name: {"dtype", "shape", "data_offsets": [begin, end]}} and "__metadata__" {text: text}; then the
data, from where the offsets count, which the tensors must fill without overlaps, holes or bytes left over.
"""

import json
import math
import mmap
import re
import reprlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from assay.loaders.errors import CheckpointError, Report, refuse, reporting
from assay.loaders.json_text import ROOM, parse_object
from assay.loaders.mapped_file import DAMAGED, map_file

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
MAX_AXES = 64  # NumPy's
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# NumPy has no bfloat16 and no 8-bit floats: their codes are given as unsigned integers
# fmt: off
DTYPES = {
    name: np.dtype(code) for name, code in {
        "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
        "I64": "<i8", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
        "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1", "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1",
    }.items()
}
# fmt: on


@dataclass(frozen=True)
class SafeTensor:
    """Where a tensor lies: bytes `begin` to `end` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class SafetensorsFile:
    """An open safetensors file: its metadata, and where each tensor lies; `faulty` names those left out."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, SafeTensor]
    faulty: set[str]
    _bytes: np.ndarray = field(repr=False)

    def view(self, tensor: SafeTensor) -> np.ndarray:
        """The tensor's stored bytes, uint8 [end - begin]: a read-only view of the mapped file."""
        return self._bytes[tensor.begin : tensor.end]

    def array(self, tensor: SafeTensor) -> np.ndarray:
        """A read-only typed view [shape]; BF16 as uint16 codes, 8-bit floats as uint8 codes.

        Raises CheckpointError for a BOOL tensor with a byte that is neither 0 nor 1.
        """
        raw = self.view(tensor)
        if tensor.dtype == "BOOL" and (wrong := np.flatnonzero(raw > 1)).size:
            at = tensor.begin + int(wrong[0])
            raise _error(self.path, at, f"tensor {tensor.name!r} holds a bool that is neither 0 nor 1", tensor.name)
        return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def read_safetensors(path: str | Path, report: Report = refuse) -> SafetensorsFile:
    """Open a safetensors file; raises CheckpointError for one that is not whole and consistent.

    What is wrong with one tensor or with the metadata goes to `report`; after any other fault nothing more can be read.
    """
    path = Path(path)
    data = map_file(path)
    header, start = _header(path, data)
    metadata = header.pop("__metadata__", {})
    if not _is_text_map(metadata):
        report(_error(path, 8, "__metadata__ must map text to text", got=reprlib.repr(metadata)))
        metadata = {}
    tensors: dict[str, SafeTensor] = {}
    for name, entry in header.items():
        with reporting(report):
            tensors[name] = _tensor(path, name, entry, start, data)
    for name in _misplaced(path, header, tensors, start, len(data), report):
        del tensors[name]
    return SafetensorsFile(path, metadata, tensors, header.keys() - tensors.keys(), np.frombuffer(data, np.uint8))


def open_safetensors_set(directory: str | Path) -> dict[str, tuple[SafetensorsFile, SafeTensor]]:
    """Every tensor of a directory's model.safetensors, or of the shards that its index names; opens no other file.

    Raises CheckpointError if index and shards do not agree exactly, or if shards lie about without an index.
    """
    return read_safetensors_set(directory, refuse)[0]


def read_safetensors_set(
    directory: str | Path, report: Report
) -> tuple[dict[str, tuple[SafetensorsFile, SafeTensor]], set[str]]:
    """The same, faults handed to `report`: the tensors that can be read, and the names of the others."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError("no such directory", where=directory)
    weight_map = _read_index(directory / INDEX) if (directory / INDEX).exists() else None
    present = {file.name for file in directory.glob("*.safetensors")}
    shards = {name for name in present if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)}
    used = {SINGLE} if weight_map is None else set(weight_map.values())
    if weight_map is None and SINGLE not in present:
        _raise_no_entry(directory, sorted(shards), sorted(present))
    if stray := sorted((shards | {SINGLE} & present) - used):
        error = CheckpointError(
            f"weights that are not part of the model: {_some(stray)}",
            where=directory,
            expected=f"only {_some(sorted(used))}",
            remedy="remove the files that do not belong, or fetch the right index",
        )
        report(error)
    if missing := sorted(used - present):
        error = CheckpointError(f"{INDEX} names a missing shard: {_some(missing)}", where=directory, remedy="fetch it")
        report(error)
    if weight_map is None:
        file = read_safetensors(directory / SINGLE, report)
        return {name: (file, tensor) for name, tensor in file.tensors.items()}, file.faulty
    files: list[SafetensorsFile] = []
    for name in sorted(used & present):
        with reporting(report):
            files.append(read_safetensors(directory / name, report))
    found = _collect(files, report)
    read = {file.path.name for file in files}
    faulty = {name for file in files for name in file.faulty}
    faulty |= {name for name, shard in weight_map.items() if shard not in read}
    held = {name: file.path.name for name, (file, _) in found.items()}
    faulty |= set(_check_agrees(directory / INDEX, weight_map, held, faulty, report))
    return found, faulty - found.keys()


def _error(
    path: Path,
    at: int,
    what: str,
    tensor: str | None = None,
    expected: object = None,
    got: object = None,
    remedy: str | None = None,
) -> CheckpointError:
    tensors = () if tensor is None else (tensor,)
    return CheckpointError(what, where=path, byte=at, tensors=tensors, expected=expected, got=got, remedy=remedy)


def _header(path: Path, data: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header and where the data starts."""
    if len(data) < 8:
        raise _error(path, 0, "the file ends inside the length of the header", None, "8 bytes", len(data), DAMAGED)
    (length,) = struct.unpack_from("<Q", data)
    if length > MAX_HEADER:
        what = "the header is too long, or this is no safetensors file"
        raise _error(path, 0, what, None, f"at most {MAX_HEADER} bytes", length)
    if 8 + length > len(data):
        raise _error(path, 8, "the file ends inside the header", None, f"{length} bytes", len(data) - 8, DAMAGED)
    header = parse_object(
        data[8 : 8 + length],
        lambda what, got=None: _error(path, 8, f"the header {what}", None, "a JSON object", got),
        len(data) + ROOM,
    )
    return header, 8 + length


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _are_sizes(value: object) -> bool:
    """Whether this is a list of integers from 0; bool is an int to Python, not to JSON."""
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _tensor(path: Path, name: str, entry: object, start: int, data: mmap.mmap) -> SafeTensor:
    """The tensor of a header entry, its fields and byte range checked."""

    def wrong(what: str, expected: object = None, got: object = None) -> CheckpointError:
        return _error(path, _entry_at(data, start, name), f"tensor {name!r} {what}", name, expected, reprlib.repr(got))

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("is described wrongly", "dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong("has an unknown dtype", ", ".join(DTYPES), dtype)
    if not _are_sizes(shape):
        raise wrong("has a wrong shape", "a list of integers from 0", shape)
    if len(shape) > MAX_AXES:
        raise wrong("has too many axes", f"at most {MAX_AXES}", len(shape))
    if math.prod(max(length, 1) for length in shape) >= 2**63:
        raise wrong("has an impossible shape: its size overflows", got=shape)
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise wrong("has wrong data_offsets", "two integers from 0", offsets)
    begin, end = start + offsets[0], start + offsets[1]
    if not begin <= end <= len(data):
        what = f"the data of tensor {name!r} lies beyond the file"
        raise _error(path, begin, what, name, f"within {len(data)} bytes", offsets, DAMAGED)
    if end - begin != (nbytes := math.prod(shape) * DTYPES[dtype].itemsize):
        what = f"tensor {name!r} has the wrong size for {dtype} {shape}"
        raise _error(path, begin, what, name, nbytes, end - begin)
    return SafeTensor(name, dtype, tuple(shape), begin, end)


def _entry_at(data: mmap.mmap, end: int, name: str) -> int:
    """Where the header, which ends at `end`, names a tensor; its start where the name is spelt in some other way."""
    spelt = (json.dumps(name, ensure_ascii=ascii_only).encode() for ascii_only in (False, True))
    return max(8, *(data.find(text, 8, end) for text in spelt))


def _misplaced(
    path: Path, header: dict[str, Any], tensors: dict[str, SafeTensor], start: int, file_size: int, report: Report
) -> Iterator[str]:
    """Overlaps, holes and bytes left over, which the format forbids too: nothing may hide in the file.

    A tensor may also begin where a misplaced one before it should have ended: what one fault moves is one fault.
    Around tensors that are faulty by themselves, whose place or length may be what is wrong, there is no hole.
    """
    offsets = {name: place for name, entry in header.items() if (place := _offsets(entry, file_size - start))}
    has_all = judges_hole = len(offsets) == len(header)
    end, intended, before = 0, 0, "the header"
    for name, (begin, stop) in sorted(offsets.items(), key=lambda item: item[1]):
        if name not in tensors:
            judges_hole = False
            continue
        should_begin = begin
        if begin < end and begin != intended:
            what, expected = f"tensor {name!r} overlaps {before}", f"a start at {start + end}"
            report(_error(path, start + begin, what, name, expected))
            yield name
            should_begin = end
        elif begin > end and begin != intended and judges_hole:
            report(_error(path, start + end, f"a hole of {begin - end} bytes before tensor {name!r}", name))
            yield name
            should_begin = end
        intended, judges_hole = should_begin + stop - begin, has_all
        if stop >= end:
            end, before = stop, f"tensor {name!r}"
    covered = start + max(end, intended)
    if covered < file_size and judges_hole:
        report(_error(path, covered, f"{file_size - covered} trailing bytes after {before}"))


def _offsets(entry: object, room: int) -> tuple[int, int] | None:
    """The data_offsets of a header entry, if they lie in `room` bytes of data."""
    offsets: Any = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        return None
    return offsets[0], offsets[1]


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map: {tensor name: name of a file in the same directory}."""
    data = map_file(path)
    if len(data) > MAX_HEADER:
        raise CheckpointError(
            "the index is too long", where=path, expected=f"at most {MAX_HEADER} bytes", got=len(data)
        )
    index = parse_object(
        bytes(data), lambda what, got=None: CheckpointError(f"the index {what}", where=path, got=got), len(data) + ROOM
    )
    weight_map = index.get("weight_map")
    if not _is_text_map(weight_map) or not weight_map:
        raise CheckpointError(
            "weight_map must map tensor names to file names", where=path, got=reprlib.repr(weight_map)
        )
    # only names of this directory's own files: an index must not reach elsewhere
    if bad := sorted({name for name in weight_map.values() if not re.fullmatch(r"[^/\\]+\.safetensors", name)}):
        raise CheckpointError(
            f"a shard's name is not a plain file name: {_some(bad)}", where=path, expected="NAME.safetensors"
        )
    return weight_map


def _raise_no_entry(directory: Path, shards: list[str], present: list[str]) -> None:
    if shards:
        raise CheckpointError(
            f"the index is missing: {_some(shards)} without {INDEX}", where=directory, remedy=f"fetch {INDEX} too"
        )
    expected = f"{SINGLE}, or {INDEX} and its shards"
    raise CheckpointError("no weights", where=directory, expected=expected, got=_some(present) or "no safetensors")


def _collect(files: list[SafetensorsFile], report: Report) -> dict[str, tuple[SafetensorsFile, SafeTensor]]:
    found: dict[str, tuple[SafetensorsFile, SafeTensor]] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in found:
                what = f"tensor {name!r} is also in {found[name][0].path.name}"
                report(CheckpointError(what, where=file.path, byte=tensor.begin, tensors=(name,)))
            found.setdefault(name, (file, tensor))
    return found


def _check_agrees(
    path: Path, weight_map: dict[str, str], held: dict[str, str], faulty: set[str], report: Report
) -> list[str]:
    """Whether the index says exactly which shard holds which tensor; answers those that it says wrongly."""
    if absent := [name for name, shard in weight_map.items() if held.get(name) != shard and name not in faulty]:
        shards = sorted({weight_map[name] for name in absent})
        what = f"{_some(shards)} does not hold what the index names: {_some(absent)}"
        report(CheckpointError(what, where=path, tensors=absent))
    if unnamed := [name for name in held if name not in weight_map]:
        shards = sorted({held[name] for name in unnamed})
        what = f"{_some(shards)} holds what the index does not name: {_some(unnamed)}"
        report(CheckpointError(what, where=path, tensors=unnamed))
    return absent


def _some(names: list[str]) -> str:
    """The first few names, quoted so that no odd character can upset a terminal."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
