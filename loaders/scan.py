"""Values and scales that are not finite, found on the encoded bytes: nothing is decoded.

Whether a number is finite shows in its exponent bits alone, so one mask and one comparison a number are enough, and
of a block format only its scales need looking at: every integer and every 4-bit code is a finite number.
"""

import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from assay.loaders.errors import CheckpointError
from assay.loaders.file_bytes import Pieces, file_bytes
from assay.loaders.gguf_file import GGML_TYPES, GgufFile
from assay.loaders.mapped_file import DAMAGED
from assay.loaders.safetensors_file import SafeTensor, SafetensorsFile

Item = TypeVar("Item")
Result = TypeVar("Result")
STRETCH = 1 << 24  # bytes that one thread scans at a time
MOST_PIECES = 256  # of small tensors in a stretch
MANY = 256  # a matrix of fewer elements may be all zeros by chance


class Code(NamedTuple):
    """A number format: `code & mask` is its magnitude, finite below `finite`, infinite at `finite` if it has that."""

    name: str
    dtype: str
    mask: int
    finite: int
    mantissa: int
    has_infinity: bool = True

    def greatest(self, numbers: np.ndarray) -> int:
        """The greatest magnitude of some codes, one or more."""
        last = int(numbers.max())
        if last <= self.mask:
            return last
        # that was the negative number of greatest magnitude: the sign is the highest bit, as it is an integer's
        return max(last & self.mask, int(numbers.view(numbers.dtype.str.replace("u", "i")).max()))


F64 = Code("float64", "<u8", 2**63 - 1, 0x7FF << 52, 52)
F32 = Code("float32", "<u4", 2**31 - 1, 0x7F800000, 23)
F16 = Code("float16", "<u2", 0x7FFF, 0x7C00, 10)
BF16 = Code("bfloat16", "<u2", 0x7FFF, 0x7F80, 7)
E4M3 = Code("E4M3", "u1", 0x7F, 0x7F, 3, has_infinity=False)
E5M2 = Code("E5M2", "u1", 0x7F, 0x7C, 2)
E8M0 = Code("E8M0", "u1", 0xFF, 0xFF, 0, has_infinity=False)
OVERFLOWS = (F64, F32, BF16, E8M0)  # whose largest scale times an element leaves the range of float32


class Field(NamedTuple):
    """Numbers at a byte offset of every `stride` bytes; elements below 2^headroom are multiplied by them."""

    what: str
    code: Code
    stride: int
    offset: int = 0
    headroom: int = 0

    @property
    def limit(self) -> int:
        """The smallest magnitude that is wrong: a scale may be finite and its product with an element not."""
        return self.code.finite - (self.headroom << self.code.mantissa if self.code in OVERFLOWS else 0)


def _plain(code: Code) -> tuple[Field, ...]:
    room = 0x7FF - (1023 + 128) if code is F64 else 0  # 2^128 is beyond float32, which is what we decode to
    return (Field("value", code, np.dtype(code.dtype).itemsize, 0, room),)


PLAIN = {"F64": F64, "F32": F32, "F16": F16, "BF16": BF16, "F8_E4M3": E4M3, "F8_E5M2": E5M2, "F8_E8M0": E8M0}

# Offsets from the block structs of ggml-common.h. IQ1_M's scale is scattered over four bytes: not looked at.
_SCALE, _MINIMUM = ("scale", F16, 0, 0), ("minimum", F16, 2, 0)
# fmt: off
_GGML_NUMBERS: dict[str, tuple[tuple[str, Code, int, int], ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "Q1_0", "Q2_0", "IQ4_NL", "IQ4_XS", "IQ1_S"), (_SCALE,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (_SCALE,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (_SCALE, _MINIMUM)),
    "Q8_1": (_SCALE, ("sum", F16, 2, 0)),
    "Q2_K": (("scale", F16, 80, 0), ("minimum", F16, 82, 0)), "Q3_K": (("scale", F16, 108, 0),),
    "Q6_K": (("scale", F16, 208, 0),), "Q8_K": (("scale", F32, 0, 7),),
    "TQ1_0": (("scale", F16, 52, 0),), "TQ2_0": (("scale", F16, 64, 0),),
    "MXFP4": (("scale", E8M0, 0, 2),), "NVFP4": tuple(("scale", E4M3, i, 0) for i in range(4)),
}
# fmt: on


def _ggml_fields(type_name: str, nbytes: int) -> tuple[Field, ...]:
    if type_name in PLAIN:
        return _plain(PLAIN[type_name])
    return tuple(Field(what, code, nbytes, at, room) for what, code, at, room in _GGML_NUMBERS.get(type_name, ()))


@dataclass(frozen=True)
class Stored:
    """A tensor of a file as the scan sees it: where it lies, and the numbers in it that could be bad."""

    name: str
    file: Path
    begin: int
    nbytes: int
    shape: tuple[int, ...]
    stride_elements: int  # elements that one stride of its fields covers
    fields: tuple[Field, ...]


@dataclass
class Numbers:
    """What the scan saw of one field of a tensor: the wrong numbers, and the greatest magnitude of all."""

    stored: Stored
    field: Field
    greatest: int = 0
    count: dict[bool, int] = dataclasses.field(default_factory=lambda: {False: 0, True: 0})  # by: is it finite
    first: dict[bool, tuple[int, int]] = dataclasses.field(default_factory=dict)  # by the same: byte in the file, code

    @property
    def is_zero(self) -> bool:
        """Whether a matrix holds nothing but zeros."""
        shape, is_bias = self.stored.shape, self.stored.name.endswith(("bias", "biases"))  # those of a new model are 0
        return self.greatest == 0 and len(shape) > 1 and prod(shape) >= MANY and not is_bias

    def look(self, raw: np.ndarray, byte: int) -> None:
        """Look at the bytes of whole strides, uint8 [n*stride], which lie at `byte` of the file."""
        code, dtype = self.field.code, np.dtype(self.field.code.dtype)
        numbers = np.ndarray((len(raw) // self.field.stride,), dtype, raw, self.field.offset, (self.field.stride,))
        greatest = code.greatest(numbers)
        self.greatest = max(self.greatest, greatest)
        if greatest < self.field.limit:
            return
        magnitudes = numbers & dtype.type(code.mask)
        not_finite = magnitudes >= code.finite
        for is_finite, wrong in ((False, not_finite), (True, (magnitudes >= self.field.limit) & ~not_finite)):
            if (places := np.flatnonzero(wrong)).size:
                at = int(places[0])
                self.count[is_finite] += len(places)
                place = byte + at * self.field.stride + self.field.offset
                self.first.setdefault(is_finite, (place, int(numbers[at])))

    def join(self, later: "Numbers") -> None:
        """Take in what was seen of a later piece of the same tensor."""
        self.greatest = max(self.greatest, later.greatest)
        for is_finite, count in later.count.items():
            self.count[is_finite] += count
        self.first = later.first | self.first

    def index(self, byte: int) -> list[int]:
        """The index of the first element that the number at this byte of the file belongs to."""
        stride = (byte - self.stored.begin) // self.field.stride
        return [int(i) for i in np.unravel_index(stride * self.stored.stride_elements, self.stored.shape)]

    def text(self, code: int) -> str:
        """What a wrong code stands for."""
        kind, digits = self.field.code, 2 * np.dtype(self.field.code.dtype).itemsize
        magnitude = code & kind.mask
        if magnitude < kind.finite:
            value = "a finite number"
        elif kind.has_infinity and magnitude == kind.finite:
            value = "infinity" if code == magnitude else "-infinity"
        else:
            value = "NaN"
        return f"{value} ({kind.name} code 0x{code:0{digits}X})"


def gguf_stored(file: GgufFile) -> list[Stored]:
    """The tensors of a GGUF file."""
    found = []
    for t in file.tensors.values():
        block = GGML_TYPES[t.ggml_type]
        fields = _ggml_fields(t.type_name, block.nbytes)
        if t.name.endswith(".scale"):  # NVFP4's second one: times 448 (E4M3) times 6 (E2M1)
            fields = tuple(field._replace(what="scale", headroom=12) for field in fields)
        found.append(Stored(t.name, file.path, t.offset, t.nbytes, t.shape, block.elements, fields))
    return found


def safetensors_stored(
    files: Mapping[str, tuple[SafetensorsFile, SafeTensor]], quantization: Mapping[str, object]
) -> list[Stored]:
    """The tensors of a directory; `quantization` is MLX's entry of config.json, or empty."""
    return [
        Stored(name, file.path, t.begin, t.end - t.begin, t.shape, 1, _safetensors_fields(name, t, files, quantization))
        for name, (file, t) in files.items()
    ]


def _safetensors_fields(
    name: str, tensor: SafeTensor, names: Mapping[str, object], quantization: Mapping[str, object]
) -> tuple[Field, ...]:
    """The numbers of a tensor; scales are known by the codes that lie beside them."""
    if name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in names and tensor.dtype == "U8":
        return (Field("scale", E8M0, 1, 0, 2),)
    module = name.removesuffix(".scales")
    if module == name or f"{module}.weight" not in names:
        return _plain(PLAIN[tensor.dtype]) if tensor.dtype in PLAIN else ()
    own = quantization.get(module)
    return _mlx_scale(tensor.dtype, own if isinstance(own, Mapping) else quantization)


def _mlx_scale(dtype: str, settings: Mapping[str, object]) -> tuple[Field, ...]:
    if dtype == "U8":
        modes = {"mxfp4": (E8M0, 2), "mxfp8": (E8M0, 8), "nvfp4": (E4M3, 0)}
        code, room = modes.get(str(settings.get("mode")), (None, 0))
        return () if code is None else (Field("scale", code, 1, 0, room),)
    bits = settings.get("bits")
    room = bits if type(bits) is int and 1 <= bits <= 8 else 8
    return tuple(f._replace(what="scale", headroom=room) for f in _plain(PLAIN[dtype])) if dtype in PLAIN else ()


class Piece(NamedTuple):
    """Bytes of a tensor, whole strides of it, that are scanned in one go; `begin` counts from the start of the file."""

    tensor: Stored
    begin: int
    nbytes: int


def scan(tensors: Sequence[Stored], advance: Callable[[int], None]) -> Iterator[Numbers]:
    """Every field of every tensor with something wrong in it; `advance` is told the bytes done.

    Each thread has one stretch of a file at a time in its memory, whatever the file's size.
    Raises CheckpointError for a file that cannot be read to its end.
    """
    seen: list[Numbers] = []
    ordered = sorted(tensors, key=lambda tensor: (tensor.file, tensor.begin))
    files = {path: file_bytes(path) for path in {tensor.file for tensor in ordered}}
    for pieces in _side_by_side(partial(_scan_pieces, files), _stretches(ordered)):
        for piece, found in pieces:
            advance(piece.nbytes)
            if piece.begin == piece.tensor.begin:
                yield from _wrong(seen)
                seen = found
            else:
                for numbers, later in zip(seen, found, strict=True):
                    numbers.join(later)
    yield from _wrong(seen)


def _wrong(seen: list[Numbers]) -> list[Numbers]:
    return [numbers for numbers in seen if numbers.first or (numbers.is_zero and numbers is seen[0])]


def _stretches(tensors: Sequence[Stored]) -> Iterator[list[Piece]]:
    """The tensors in pieces, in order: one thread's work at a time."""
    stretch: list[Piece] = []
    room = STRETCH
    for tensor in tensors:
        stride = tensor.fields[0].stride if tensor.fields else 1
        most = STRETCH // stride * stride
        for done in range(0, max(tensor.nbytes, 1), most):
            piece = Piece(tensor, tensor.begin + done, min(most, tensor.nbytes - done))
            stretch.append(piece)
            room -= piece.nbytes
            if room <= 0 or len(stretch) == MOST_PIECES:
                yield stretch
                stretch, room = [], STRETCH
    yield stretch


def _side_by_side(work: Callable[[Item], Result], items: Iterator[Item]) -> Iterator[Result]:
    """The results in order, computed on all cores, a few items ahead; a single item without another thread."""
    ahead = list(itertools.islice(items, 2))
    if len(ahead) < 2:
        yield from map(work, ahead)
        return
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(work, item) for item in ahead)
        while waiting:
            waiting.extend(pool.submit(work, item) for item in itertools.islice(items, 2 * threads - len(waiting)))
            yield waiting.popleft().result()


def _scan_pieces(files: Mapping[Path, Pieces], pieces: list[Piece]) -> list[tuple[Piece, list[Numbers]]]:
    """Each piece with what was seen of it."""
    return [(piece, _scan_piece(files[piece.tensor.file], piece)) for piece in pieces]


def _scan_piece(bytes_of: Pieces, piece: Piece) -> list[Numbers]:
    tensor, at = piece.tensor, piece.begin
    seen = [Numbers(tensor, field) for field in tensor.fields]
    if not seen or not piece.nbytes:
        return []
    try:
        for raw in bytes_of(piece.begin, piece.nbytes, tensor.fields[0].stride):
            for numbers in seen:
                numbers.look(raw, at)
            at += len(raw)
    except EOFError as error:
        what = f"the file ended inside tensor {tensor.name!r} while it was read"
        raise CheckpointError(what, where=tensor.file, tensors=(tensor.name,), remedy=DAMAGED) from error
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=tensor.file) from error
    return seen
