"""Products with weights in an encoding that has no kernel: decoded by the tensor itself, a tile of rows at a time."""

from math import prod

import numpy as np

from assay.fast.cpu.groups import Groups
from assay.fast.cpu.linear import grouped_linear
from assay.fast.cpu.rows import encoded_rows
from assay.reference.formats import F32
from assay.reference.weights import Tensor

TILE = 1 << 19  # elements decoded at a time: 2 MB, and some times that on the way


def by_rows(tensor: Tensor) -> Tensor:
    """A tensor [..., I] as [R, I], of which rows can be chosen undecoded: only what is permuted is copied, encoded."""
    R = prod(tensor.shape[:-1])
    parts = {key: _rows_of(part, R) for key, part in tensor.parts.items()}
    return Tensor(tensor.name, (R, tensor.shape[-1]), tensor.encoding, parts, tensor.stored_as, tensor.layout)


def _rows_of(part: np.ndarray, R: int) -> np.ndarray:
    """A part whose leading axes, R in all, are one."""
    axes = next(n for n in range(1, part.ndim + 1) if prod(part.shape[:n]) == R)
    return part.reshape(R, *part.shape[axes:])


def tiled_linear(tensor: Tensor, groups: Groups, x: np.ndarray, bias_NO: np.ndarray) -> np.ndarray:
    """`linear.grouped_linear` with the rows [N*O,I] of a tensor: [P,O], to the bit what it gives on them in float32."""
    O = bias_NO.shape[1]  # noqa: E741
    y = np.empty((len(groups.y_row), O), np.float32)
    step = max(1, TILE // tensor.shape[1])
    for e, matrix in enumerate(groups.matrix):
        pairs = slice(groups.start[e], groups.start[e + 1])
        P = pairs.stop - pairs.start
        alone = Groups(np.zeros(1, np.int64), np.array([0, P]), groups.x_row[pairs], np.arange(P))
        for begin in range(0, O, step):
            end = min(begin + step, O)
            values = tensor[matrix * O + begin : matrix * O + end].decode()
            rows = encoded_rows(Tensor(tensor.name, values.shape, F32, {"values": values}))
            y[groups.y_row[pairs], begin:end] = grouped_linear(rows, alone, x, bias_NO[None, matrix, begin:end])
    return y
