"""GGUF files, read strictly and lazily: every count and byte range is checked at opening, nothing is copied.

The layout of versions 2 and 3 (ggml's docs/gguf.md; what readers enforce: ggml/src/gguf.cpp), little-endian:

    header        "GGUF", uint32 version, uint64 tensor count, uint64 metadata count
    metadata      key, uint32 value type, value                  (a string: uint64 length, UTF-8)
    tensor infos  name, uint32 axes, uint64 lengths (fastest axis first), uint32 ggml type, uint64 offset
    data          starts at the next multiple of general.alignment, from where the offsets count

A vocabulary holds hundreds of thousands of strings; they are stepped over here and decoded when first asked for.
"""

import math
import mmap
import reprlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from assay.loaders.errors import CheckpointError, Report, refuse, reporting
from assay.loaders.mapped_file import DAMAGED, map_file

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
STRING, ARRAY = 8, 9  # gguf.h `enum gguf_type`, as are the keys of SCALARS
# fmt: off
SCALARS = {
    number: np.dtype(code) for number, code in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}
# fmt: on
HEADER_BYTES, SMALLEST_ENTRY, SMALLEST_INFO = 24, 8 + 4 + 1, 8 + 4 + 4 + 8
MAX_AXES = 4  # ggml.h GGML_MAX_DIMS
MAX_NAME = 65535  # bytes; the format's limit for keys


class GgmlType(NamedTuple):
    """A tensor type: its name and the elements and bytes of one block."""

    name: str
    elements: int
    nbytes: int


# The numbers are ggml.h's `enum ggml_type`, the sizes ggml-common.h's block structs. gguf-py's table would cost
# its import, lacks Q2_0 in 0.19, and gives Q8_1 the 40 bytes that it had before its two floats became halves.
# fmt: off
GGML_TYPES = {
    number: GgmlType(*block) for number, block in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
        10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
        26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
    }.items()
}
# fmt: on
OLLAMA_MXFP4 = 4  # ggml's own type 4 was removed before GGUF; see llama.cpp issue 15597


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: shape outermost axis first, `offset` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    type_name: str
    offset: int
    nbytes: int


class Metadata(Mapping[str, object]):
    """Metadata values: int, float, bool, str, NumPy views of numeric arrays, list[str] decoded on first access.

    A float32 becomes the float of the shortest decimal that rounds to it: 1e-05 as its author wrote it, not
    9.999999747378752e-06. Asking for strings that are not UTF-8 raises CheckpointError.
    """

    def __init__(self, values: dict[str, object]):
        self._values = values

    def __getitem__(self, key: str) -> object:
        value = self._values[key]
        if isinstance(value, _Strings):
            value = self._values[key] = value.decode()
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True, eq=False)
class GgufFile:
    """An open GGUF file: decoded metadata, and where each tensor lies.

    `order` has them as the file describes them, None for each that is left out; `faulty` has the shapes of those.
    """

    path: Path
    version: int
    metadata: Metadata
    tensors: dict[str, GgufTensor]
    order: tuple[GgufTensor | None, ...]
    faulty: dict[str, tuple[int, ...]]
    alignment: int
    data_start: int
    _bytes: np.ndarray = field(repr=False)

    def view(self, tensor: GgufTensor) -> np.ndarray:
        """The tensor's stored bytes, uint8 [nbytes]: a read-only view of the mapped file."""
        return self._bytes[tensor.offset : tensor.offset + tensor.nbytes]


def read_gguf(path: str | Path, report: Report = refuse) -> GgufFile:
    """Open a GGUF file of version 2 or 3; raises CheckpointError for one that is not whole and consistent.

    What is wrong with one tensor, key or text goes to `report`; after any other fault nothing more can be read.
    """
    cursor = _Cursor(Path(path), map_file(Path(path)), report)
    version, n_tensors, n_entries = _header(cursor)
    values = _metadata(cursor, n_entries)
    infos = [_tensor_info(cursor, index) for index in range(n_tensors)]
    alignment = values.get("general.alignment", 32)
    assert isinstance(alignment, int)  # _check_special has seen to it
    data_start = -(-cursor.at // alignment) * alignment
    order = _tensors(cursor, infos, alignment, data_start)
    tensors = {tensor.name: tensor for tensor in order if tensor is not None}
    faulty = {info.name: info.shape for info in infos if info.name not in tensors}
    raw = np.frombuffer(cursor.data, np.uint8)
    return GgufFile(cursor.path, version, Metadata(values), tensors, order, faulty, alignment, data_start, raw)


class _Cursor:
    """A position in the mapped file; every step is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, report: Report):
        self.path, self.data, self.size, self.at, self.report = path, data, len(data), 0, report

    def error(
        self,
        at: int,
        what: str,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
        tensor: str | None = None,
    ) -> CheckpointError:
        tensors = () if tensor is None else (tensor,)
        return CheckpointError(
            what, where=self.path, byte=at, tensors=tensors, expected=expected, got=got, remedy=remedy
        )

    def step(self, nbytes: int, what: str) -> int:
        """Move past `nbytes` bytes; answers where they start."""
        start, left = self.at, self.size - self.at
        if nbytes > left:
            raise self.error(start, f"the file ends inside {what}", f"{nbytes} bytes", f"{left} bytes", DAMAGED)
        self.at += nbytes
        return start

    def uint32(self, what: str) -> int:
        return U32.unpack_from(self.data, self.step(4, what))[0]

    def uint64(self, what: str) -> int:
        return U64.unpack_from(self.data, self.step(8, what))[0]

    def text(self, what: str, of_tensor: bool = False) -> str:
        """A text; with the bytes that are not UTF-8 as \\xNN, if the report of them returns."""
        length = self.uint64(f"the length of {what}")
        start = self.step(length, what)
        raw = self.data[start : self.at]
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            shown, tensor = raw[:MAX_NAME].decode(errors="backslashreplace"), None
            if of_tensor:
                tensor = shown
            self.report(self.error(start + error.start, f"{what} is not valid UTF-8: {error.reason}", tensor=tensor))
            return shown

    def name(self, what: str, of_tensor: bool = False) -> str:
        """A text of 1 to MAX_NAME bytes."""
        length, start = self.uint64(f"the length of {what}"), self.at - 8
        if not 1 <= length <= MAX_NAME:
            raise self.error(start, f"{what} has an impossible length", f"1 to {MAX_NAME} bytes", length)
        self.at = start
        return self.text(what, of_tensor)

    def check_count(self, count: int, smallest: int, at: int, what: str) -> None:
        """Refuse a count of things of at least `smallest` bytes that cannot fit in the rest of the file."""
        if count > (most := (self.size - self.at) // smallest):
            raise self.error(at, f"{what} is more than the file can hold", f"at most {most}", count, DAMAGED)


def _header(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, tensor count, metadata count."""
    if (magic := cursor.data[:4]) != b"GGUF":
        raise cursor.error(0, "not a GGUF file", expected=b"GGUF", got=magic)
    cursor.step(HEADER_BYTES, "the header")
    version, n_tensors, n_entries = struct.unpack_from("<IQQ", cursor.data, 4)
    if version & 0xFFFF == 0 and version:
        raise cursor.error(
            4, "a big-endian GGUF file is not supported", remedy="convert again for a little-endian machine"
        )
    if version not in (2, 3):
        raise cursor.error(
            4, f"GGUF version {version} is not supported", "2 or 3", version, "convert the model again with llama.cpp"
        )
    cursor.check_count(n_tensors, SMALLEST_INFO, 8, "the tensor count")
    cursor.check_count(n_entries, SMALLEST_ENTRY, 16, "the metadata count")
    return version, n_tensors, n_entries


def _metadata(cursor: _Cursor, count: int) -> dict[str, object]:
    values: dict[str, object] = {}
    for index in range(count):
        start = cursor.at
        key = cursor.name(f"metadata key {index}")
        if key in values:
            cursor.report(cursor.error(start, f"metadata key {key!r} occurs twice"))
        kind = cursor.uint32(f"the type of metadata {key!r}")
        start = cursor.at
        value = _value(cursor, key, kind)
        _check_special(cursor, start, key, value)
        values.setdefault(key, value)
    return values


def _value(cursor: _Cursor, key: str, kind: int) -> object:
    what = f"the value of metadata {key!r}"
    if kind == STRING:
        return cursor.text(what)
    if kind == ARRAY:
        return _array(cursor, key)
    value = _numbers(cursor, kind, 1, what)[0]
    return float(str(value)) if kind == 6 else value.item()  # NumPy prints the shortest decimal


def _array(cursor: _Cursor, key: str) -> object:
    what = f"the array of metadata {key!r}"
    kind = cursor.uint32(what)
    if kind == ARRAY:  # the format allows it, no known writer or reader does it
        raise cursor.error(cursor.at - 4, f"metadata {key!r} is an array of arrays, which is not supported")
    count = cursor.uint64(what)
    if kind != STRING:
        return _numbers(cursor, kind, count, what)
    cursor.check_count(count, 8, cursor.at - 8, f"the number of strings of metadata {key!r}")
    start = cursor.at
    _skip_strings(cursor, count, key)
    return _Strings(cursor, key, start, count)


def _numbers(cursor: _Cursor, kind: int, count: int, what: str) -> np.ndarray:
    """`count` scalars of a value type, a read-only view [count]."""
    if kind not in SCALARS:
        raise cursor.error(cursor.at, f"{what} has the unknown type {kind}", expected="0 to 12")
    dtype = SCALARS[kind]
    start = cursor.step(count * dtype.itemsize, what)
    numbers = np.frombuffer(cursor.data, np.uint8)[start : cursor.at].view(dtype)
    if dtype == np.bool_ and (wrong := np.flatnonzero(numbers.view(np.uint8) > 1)).size:
        at = start + int(wrong[0])
        cursor.report(cursor.error(at, f"{what} holds a bool that is neither 0 nor 1", got=cursor.data[at]))
    return numbers


def _skip_strings(cursor: _Cursor, count: int, key: str) -> None:
    """Step over strings; 647,000 take 0.05 s so, and five times that with a Cursor.step for each."""
    data, size, at, length_at = cursor.data, cursor.size, cursor.at, U64.unpack_from
    for index in range(count):
        start = at
        if at + 8 > size or (at := at + 8 + length_at(data, at)[0]) > size:
            raise cursor.error(start, f"the file ends inside string {index} of metadata {key!r}", remedy=DAMAGED)
    cursor.at = at


@dataclass(frozen=True)
class _Strings:
    """An array of strings that has been stepped over, so its lengths are known to be good."""

    cursor: _Cursor
    key: str
    start: int
    count: int

    def decode(self) -> list[str]:
        data, at, texts = self.cursor.data, self.start, []
        try:
            for _ in range(self.count):
                end = at + 8 + U64.unpack_from(data, at)[0]
                texts.append(data[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError as error:
            what = f"string {len(texts)} of metadata {self.key!r} is not valid UTF-8: {error.reason}"
            raise self.cursor.error(at + 8 + error.start, what) from error
        return texts


def _check_special(cursor: _Cursor, at: int, key: str, value: object) -> None:
    """Refuse the values of the two keys that say how to read the file itself."""
    if key == "general.alignment" and (type(value) is not int or value < 1 or value & (value - 1)):
        raise cursor.error(at, f"metadata {key!r} must be a power of two", got=reprlib.repr(value))
    if key == "split.count" and isinstance(value, int) and value > 1:
        raise cursor.error(
            at,
            f"one shard of a model that is split into {value} files",
            remedy="merge them first: llama-gguf-split --merge NAME-00001-of-0000N.gguf MERGED.gguf",
        )


class _Info(NamedTuple):
    """A tensor info as stored: `offset` counts from the start of the data, `at` and `shape_at` from the file's."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    at: int
    shape_at: int


def _tensor_info(cursor: _Cursor, index: int) -> _Info:
    at = cursor.at
    name = cursor.name(f"the name of tensor {index}", of_tensor=True)
    what = f"the description of tensor {name!r}"
    n_axes = cursor.uint32(what)
    if n_axes > MAX_AXES:
        raise cursor.error(at, f"tensor {name!r} has too many axes", f"at most {MAX_AXES}", n_axes, tensor=name)
    start = cursor.step(8 * n_axes, what)
    shape = struct.unpack_from(f"<{n_axes}Q", cursor.data, start)[::-1]
    return _Info(name, shape, cursor.uint32(what), cursor.uint64(what), at, start)


def _tensors(cursor: _Cursor, infos: list[_Info], alignment: int, data_start: int) -> tuple[GgufTensor | None, ...]:
    """The tensor of each info, known to lie in the file and apart from the others; None in place of one at fault."""
    tensors: list[GgufTensor | None] = [None] * len(infos)
    names: set[str] = set()
    for i, info in enumerate(infos):
        with reporting(cursor.report):
            if info.name in names:
                raise cursor.error(info.at, f"tensor {info.name!r} occurs twice", tensor=info.name)
            names.add(info.name)
            tensors[i] = _placed(cursor, info, alignment, data_start)
    overlapping = set(_overlapping(cursor, [t for t in tensors if t is not None], alignment, data_start))
    return tuple(None if t is None or t.name in overlapping else t for t in tensors)


def _placed(cursor: _Cursor, info: _Info, alignment: int, data_start: int) -> GgufTensor:
    """The tensor of an info, its shape, type, row length and byte range checked."""
    name, shape, kind, offset, at, shape_at = info
    if math.prod(max(length, 1) for length in shape) >= 2**63:
        what = f"tensor {name!r} has an impossible shape: its size overflows"
        raise cursor.error(shape_at, what, got=list(shape), tensor=name)
    if offset % alignment:
        what = f"tensor {name!r} has a misaligned offset"
        raise cursor.error(at, what, f"a multiple of {alignment}", offset, tensor=name)
    if kind not in GGML_TYPES:
        hint = "Ollama's number for MXFP4: take a GGUF that llama.cpp converted" if kind == OLLAMA_MXFP4 else None
        raise cursor.error(at, f"tensor {name!r} has the unknown ggml type {kind}", remedy=hint, tensor=name)
    block = GGML_TYPES[kind]
    row = shape[-1] if shape else 1
    if row % block.elements:
        what = f"tensor {name!r} has rows of broken {block.name} blocks"
        raise cursor.error(at, what, f"a multiple of {block.elements}", row, tensor=name)
    nbytes = math.prod(shape) // block.elements * block.nbytes
    start = data_start + offset
    if (end := start + nbytes) > cursor.size:
        what = f"the data of tensor {name!r} ends beyond the end of the file"
        raise cursor.error(start, what, f"a file of at least {end} bytes", cursor.size, DAMAGED, name)
    return GgufTensor(name, shape, kind, block.name, start, nbytes)


def _overlapping(cursor: _Cursor, tensors: list[GgufTensor], alignment: int, data_start: int) -> Iterator[str]:
    """Of two tensors that overlap the one that does not begin where another ends; the later one if both do."""
    placed = sorted((t for t in tensors if t.nbytes), key=lambda t: t.offset)
    ends = {data_start} | {t.offset + -(-t.nbytes // alignment) * alignment for t in placed}
    before: GgufTensor | None = None
    for after in placed:
        if before is None or after.offset >= before.offset + before.nbytes:
            before = after
            continue
        wrong, other = (after, before) if before.offset in ends else (before, after)
        what = f"tensor {wrong.name!r} overlaps tensor {other.name!r}"
        expected = f"apart from bytes {other.offset} to {other.offset + other.nbytes}"
        cursor.report(cursor.error(wrong.offset, what, expected, tensor=wrong.name))
        yield wrong.name
        before = other
