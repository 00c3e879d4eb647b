"""The cast layer: a stored `Tensor` becomes rows of bytes that kernels read where they lie.

Every part, whatever its dtype, is passed to kernels as read-only bytes with a stride between rows, so that
there is one specialisation of each kernel and not one for every encoding. Rows of an interleaved matrix
(gate and up in Hugging Face files) are therefore used inside the mapped file; only a part whose rows are
permuted or not contiguous in themselves is copied, once.
"""

from math import prod
from typing import NamedTuple

import numpy as np

from assay.loaders.errors import CheckpointError
from assay.reference.weights import Tensor

F32, F16, BF16, Q8_0, Q4_0, Q4_1, MXFP4_SPLIT, MXFP4_ADJACENT, AFFINE4, AFFINE8 = range(10)
Q4_K, Q5_K, Q6_K, Q5_0, Q5_1 = range(10, 15)

# by the encoding's name and the parts it has: two layouts of MXFP4 share the name
KINDS = {
    ("F32", ("values",)): F32,
    ("F16", ("values",)): F16,
    ("BF16", ("values",)): BF16,
    ("Q8_0", ("blocks",)): Q8_0,
    ("Q4_0", ("blocks",)): Q4_0,
    ("Q4_1", ("blocks",)): Q4_1,
    ("Q5_0", ("blocks",)): Q5_0,
    ("Q5_1", ("blocks",)): Q5_1,
    ("Q4_K", ("blocks",)): Q4_K,
    ("Q5_K", ("blocks",)): Q5_K,
    ("Q6_K", ("blocks",)): Q6_K,
    ("MXFP4", ("blocks",)): MXFP4_SPLIT,
    ("MXFP4", ("blocks", "scales")): MXFP4_ADJACENT,
    ("affine4", ("biases", "scales", "weight")): AFFINE4,
    ("affine8", ("biases", "scales", "weight")): AFFINE8,
}
# bytes of codes, and the elements that they hold
BLOCK = {
    F32: (4, 1),
    F16: (2, 1),
    BF16: (2, 1),
    Q8_0: (34, 32),
    Q4_0: (18, 32),
    Q4_1: (20, 32),
    MXFP4_SPLIT: (17, 32),
    MXFP4_ADJACENT: (16, 32),
    AFFINE4: (1, 2),
    AFFINE8: (1, 1),
    Q5_0: (22, 32),
    Q5_1: (24, 32),
    Q4_K: (144, 256),
    Q5_K: (176, 256),
    Q6_K: (210, 256),
}


class Rows(NamedTuple):
    """A matrix, or a stack of them one below the other, in one of the encodings.

    Codes, scales and biases are bytes, uint8 [any]; row r has the `_bytes` from r * `_stride` on. Affine
    rows have `groups` scales, as many biases, and both in the plain format `side_kind`. The record is
    flat because a parallel loop takes no nested tuples.
    """

    kind: int
    columns: int
    groups: int
    side_kind: int
    codes: np.ndarray
    codes_stride: int
    codes_bytes: int
    scales: np.ndarray
    scales_stride: int
    scales_bytes: int
    biases: np.ndarray
    biases_stride: int
    biases_bytes: int


def encoded_rows(tensor: Tensor) -> Rows:
    """The rows of a tensor [..., I], flattened to [R, I], for `assay.fast.cpu.decode` and `.linear`.

    Raises CheckpointError for an encoding without a kernel and for parts that do not fit the shape:
    kernels do not check bounds.
    """
    kind = _kind(tensor)
    R, I = prod(tensor.shape[:-1]), tensor.shape[-1]  # noqa: E741
    groups, side_kind = _groups(tensor, I) if kind in (AFFINE4, AFFINE8) else (0, F32)
    if any(part.size % R for part in tensor.parts.values()):
        raise _misfit(tensor)
    codes_key = next(key for key in ("values", "blocks", "weight") if key in tensor.parts)
    none = np.zeros((R, 0), np.uint8)
    codes, scales, biases = (_part(tensor.parts.get(key, none), R) for key in (codes_key, "scales", "biases"))
    rows = Rows(kind, I, groups, side_kind, *codes, *scales, *biases)
    if (rows.codes_bytes, rows.scales_bytes, rows.biases_bytes) != _row_bytes(rows):
        raise _misfit(tensor)
    return rows


def has_kernel(tensor: Tensor) -> bool:
    """Whether `encoded_rows` takes the tensor's encoding."""
    return _known_kind(tensor) is not None


def no_rows() -> Rows:
    """What stands for the rows of a matrix that no kernel reads."""
    none = np.zeros(0, np.uint8)
    return Rows(F32, 0, 0, F32, none, 0, 0, none, 0, 0, none, 0, 0)


def _known_kind(tensor: Tensor) -> int | None:
    name = tensor.encoding.name.split("/")[0]  # "affine4/64": the group size is read from the scales
    return KINDS.get((name, tuple(sorted(tensor.parts))))


def _kind(tensor: Tensor) -> int:
    kind = _known_kind(tensor)
    if kind is None:
        raise CheckpointError(
            f"no CPU kernel for encoding {tensor.encoding.name} with parts {sorted(tensor.parts)}",
            where=tensor.name,
            expected=f"one of {', '.join(sorted({known for known, _ in KINDS}))}",
        )
    return kind


def _groups(tensor: Tensor, I: int) -> tuple[int, int]:  # noqa: E741
    """How many affine groups a row has, and the plain format of their scales."""
    groups = tensor.parts["scales"].shape[-1]
    # a group that ends within a byte would need its neighbour's scale: MLX has none
    whole = groups > 0 and I % (2 * groups) == 0
    side = tensor.encoding.scale_format.name if whole else None  # type: ignore[attr-defined]
    if side is None:
        raise _misfit(tensor)
    return groups, KINDS[side, ("values",)]


def _part(array: np.ndarray, R: int) -> tuple[np.ndarray, int, int]:
    """The bytes of R rows, the stride between rows and the bytes in each; a copy only if it must be."""
    rows = np.asarray(array).reshape(R, -1)
    in_place = rows.strides[1] == rows.itemsize and rows.strides[0] >= rows.shape[1] * rows.itemsize
    if not (in_place and rows.flags.aligned):
        rows = np.array(rows, order="C")
    stride, length = rows.strides[0], rows.shape[1] * rows.itemsize
    span = (R - 1) * stride + length if length else 0
    flat = np.lib.stride_tricks.as_strided(rows.view(np.uint8), (span,), (1,), writeable=False)
    return flat, stride, length


def _row_bytes(rows: Rows) -> tuple[int, int, int]:
    """Bytes of codes, scales and biases that a row must have; -1 for what cannot be."""
    nbytes, elements = BLOCK[rows.kind]
    codes = rows.columns // elements * nbytes if rows.columns % elements == 0 else -1
    if rows.kind == MXFP4_ADJACENT:
        return codes, rows.columns // 32, 0
    side = rows.groups * BLOCK[rows.side_kind][0]
    return codes, side, side


def _misfit(tensor: Tensor) -> CheckpointError:
    return CheckpointError(
        f"parts of {tensor.encoding.name} do not fit the shape",
        where=tensor.name,
        expected=f"the parts of a tensor {list(tensor.shape)}",
        got={key: part.shape for key, part in tensor.parts.items()},
    )
