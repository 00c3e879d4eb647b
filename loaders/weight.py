"""Weights on their way from one container to another: canonical tensors, read a few megabytes at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod

import numpy as np

from assay.loaders.delegated import DelegatedBlocks
from assay.loaders.errors import CheckpointError
from assay.loaders.mapped_file import release
from assay.reference.formats import AffineGroups, BlockFormat, Microscaled
from assay.reference.formats.floats import FloatFormat
from assay.reference.weights import Encoding, Tensor

Parts = dict[str, np.ndarray]
Written = Callable[[int], None]  # told the bytes written since the last call
PIECE_BYTES = 16 << 20
WHOLE = 1 << 62  # rows: more than any tensor has


@dataclass(frozen=True)
class Weight:
    """A tensor under its canonical name: logical shape, encoding, and a source of its rows.

    `pieces(rows)` gives the parts of at most `rows` consecutive rows at a time, in order: every axis but the last
    is flattened, and no piece spans two experts. A vector is one piece.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    pieces: Callable[[int], Iterator[Parts]]

    @property
    def rows_at_a_time(self) -> int:
        """Rows that make a piece of about PIECE_BYTES once decoded."""
        return max(1, PIECE_BYTES // (4 * self.shape[-1]))

    @property
    def nbytes(self) -> int:
        """Bytes that the encoded tensor takes."""
        return encoded_bytes(self.encoding, prod(self.shape))

    @property
    def is_matrix(self) -> bool:
        """Whether quantising this is common practice: neither a vector (one a layer or one an expert) nor a router."""
        return self.name.endswith(".weight") and len(self.shape) > 1 and not self.name.endswith("router.weight")


def weight_of(tensor: Tensor) -> Weight:
    """A stored tensor, to be read piece by piece."""

    def pieces(rows: int) -> Iterator[Parts]:
        if len(tensor.shape) == 1:
            yield {name: part.reshape(tensor.shape) for name, part in tensor.parts.items()}
            return
        for matrix in (tensor[e] for e in range(tensor.shape[0])) if len(tensor.shape) == 3 else (tensor,):
            parts = {name: _rows(name, part, matrix.shape[0]) for name, part in matrix.parts.items()}
            for start in range(0, matrix.shape[0], rows):
                yield {name: np.ascontiguousarray(part[start : start + rows]) for name, part in parts.items()}
            for part in matrix.parts.values():
                release(part)

    return Weight(tensor.name, tensor.shape, tensor.encoding, pieces)


def _rows(name: str, part: np.ndarray, rows: int) -> np.ndarray:
    """A part of a matrix as [rows, ...]: a layout change may have split its row axis in several."""
    inner = {"blocks": 2, "scale": 0}.get(name, 1)
    return part.reshape(rows, *part.shape[part.ndim - inner :])


def encoded_bytes(encoding: Encoding, elements: int) -> int:
    """Bytes of that many elements."""
    match encoding:
        case FloatFormat(stored=stored):
            return elements * stored.itemsize
        case BlockFormat(elements=block, nbytes=nbytes) | DelegatedBlocks(elements=block, nbytes=nbytes):
            return elements // block * nbytes
        case AffineGroups(bits=bits, group_size=group, scale_format=scale):
            return elements * bits // 8 + elements // group * 2 * scale.stored.itemsize
        case Microscaled(group_bytes=packed, group=group, scale=scale):
            return elements // group * (packed + scale.stored.itemsize)
        case _:
            raise TypeError(f"{encoding.name} cannot be written")


def group_of(encoding: Encoding) -> int:
    """Elements of a row that are encoded together."""
    sizes = (getattr(encoding, size, None) for size in ("elements", "group_size", "group"))
    return next((size for size in sizes if size), 1)


FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def fused(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """phi-3's form: q, k and v as one matrix, gate and up as one, rows of the first before those of the next.

    Raises CheckpointError if the matrices to be joined have different encodings.
    """
    joined: dict[str, Weight] = {}
    for name, weight in weights.items():
        whole = next((w for w, parts in FUSED.items() if any(f".{part}." in name for part in parts)), None)
        if whole is None:
            joined[name] = weight
        elif f".{FUSED[whole][0]}." in name:
            members = [weights[name.replace(FUSED[whole][0], part)] for part in FUSED[whole]]
            joined[name.replace(FUSED[whole][0], whole)] = _chained(name.replace(FUSED[whole][0], whole), members)
    return joined


def _chained(name: str, members: list[Weight]) -> Weight:
    """Weights with their rows one behind the other."""
    first = members[0]
    if any(member.encoding != first.encoding for member in members):
        found = ", ".join(f"{member.name} {member.encoding.name}" for member in members)
        raise CheckpointError(f"{name} joins matrices of different encodings", got=found, remedy="give --quant")
    rows = sum(member.shape[0] for member in members)

    def pieces(count: int) -> Iterator[Parts]:
        return chain.from_iterable(member.pieces(count) for member in members)

    return Weight(name, (rows, *first.shape[1:]), first.encoding, pieces)
