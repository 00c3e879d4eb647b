"""Matrix products with encoded weights: tiles of rows are decoded into a scratch and dotted with every input.

One driver serves a single matrix and a mixture of experts: inputs come in groups, each with its own matrix.
"""

import numpy as np

from assay.fast.cpu.decode import decode_row
from assay.fast.cpu.groups import Groups, one_group
from assay.fast.cpu.jit import dot_kernel, kernel, parallel_kernel, prange
from assay.fast.cpu.rows import Rows

TILE = 16  # rows decoded at a time: an input vector is read from the cache once for all of them


@dot_kernel
def dot(x, y):
    """Sum of x y, in as many partial sums as the machine's vectors hold."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@kernel
def linear_tile(rows, first_row, x, x_row, bias, y, y_row, first):
    """Outputs first .. first + TILE of some products; `first_row` is the matrix's own first row in the stack."""
    count = min(TILE, y.shape[1] - first)
    tile = np.empty((count, rows.columns), np.float32)
    for r in range(count):
        decode_row(rows, first_row + first + r, tile[r])
    for p in range(len(x_row)):
        x_I, y_O = x[x_row[p]], y[y_row[p]]
        for r in range(count):
            y_O[first + r] = dot(x_I, tile[r]) + bias[first + r]


@parallel_kernel
def _grouped_linear(rows, groups, x, bias, y):
    E, O = len(groups.matrix), y.shape[1]  # noqa: E741
    tiles = (O + TILE - 1) // TILE
    for job in prange(E * tiles):
        # neighbouring jobs belong to different groups: each thread gets an equal share of every group
        e, first = np.int64(job) % E, np.int64(job) // E * TILE
        matrix, begin, end = groups.matrix[e], groups.start[e], groups.start[e + 1]
        x_row, y_row = groups.x_row[begin:end], groups.y_row[begin:end]
        linear_tile(rows, matrix * O, x, x_row, bias[matrix], y, y_row, first)


def grouped_linear(rows: Rows, groups: Groups, x: np.ndarray, bias_NO: np.ndarray) -> np.ndarray:
    """Each product's input, x [.,I], through its group's matrix of the stack `rows` [N*O,I], bias added: [P,O].

    Inputs, biases and results are float32; sums are float32 in many partial sums. Twin of
    `reference.gpt_oss.per_expert`.
    """
    assert x.shape[1] == rows.columns
    y = np.empty((len(groups.y_row), bias_NO.shape[1]), np.float32)
    _grouped_linear(rows, groups, x, bias_NO, y)
    return y


def linear(rows: Rows, x_TI: np.ndarray, bias_1O: np.ndarray) -> np.ndarray:
    """x W^T + b; twin of `reference.ops.linear`: [T,I] -> [T,O]."""
    return grouped_linear(rows, one_group(len(x_TI)), x_TI, bias_1O)
