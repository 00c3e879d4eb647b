"""Products of encoded rows with quantised inputs, on the blocks where they lie.

Sixteen rows are decoded, some blocks at a time, to a scratch that stays in the first cache, and meet panels of up
to 12 columns. Of the encodings whose speed is that of the memory a row is decoded in registers for up to 4 columns.
"""

import numpy as np

from assay.fast.cpu import dots, lanes
from assay.fast.cpu.groups import Groups
from assay.fast.cpu.jit import get_num_threads, kernel, leaf, parallel_kernel, prange
from assay.fast.cpu.layouts import BIASED, LAYOUTS
from assay.fast.cpu.quantise import BLOCK, FEW, GRAINS, NO_ROWS, PANEL, Panels, panel_width
from assay.fast.cpu.rows import (
    AFFINE4,
    AFFINE8,
    BF16,
    F32,
    MXFP4_ADJACENT,
    MXFP4_SPLIT,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Rows,
)

ROWS = lanes.ROWS  # of a tile: the lanes of a vector
LINE = 64  # bytes of a cache line, and of a vector
CHUNK = 32  # blocks of 32 weights that a tile decodes at a time: 16 KB

STORED = np.zeros(max(LAYOUTS) + 1, np.int64)  # bytes of a stored block
STORED_BLOCKS = np.ones(max(LAYOUTS) + 1, np.int64)  # blocks of 32 in it
for _kind, _layout in LAYOUTS.items():
    STORED[_kind] = _layout.nbytes
for _kind in (Q4_K, Q5_K, Q6_K):
    STORED_BLOCKS[_kind] = 8
HAS_BIAS = np.isin(np.arange(max(LAYOUTS) + 1), BIASED)

decode_mxfp4_split = lanes.decoder(LAYOUTS[MXFP4_SPLIT])
decode_mxfp4_adjacent = lanes.decoder(LAYOUTS[MXFP4_ADJACENT])
decode_q8_0, decode_q4_0, decode_q4_1 = (lanes.decoder(LAYOUTS[kind]) for kind in (Q8_0, Q4_0, Q4_1))
decode_q5_0, decode_q5_1 = (lanes.decoder(LAYOUTS[kind]) for kind in (Q5_0, Q5_1))
decode_q4_k, decode_q5_k, decode_q6_k = (lanes.decoder(LAYOUTS[kind]) for kind in (Q4_K, Q5_K, Q6_K))
decode_affine4, decode_affine8 = (lanes.decoder(LAYOUTS[kind]) for kind in (AFFINE4, AFFINE8))
powers_of_two = lanes.side_decoder(1, lanes.EMITTED.power_of_two)
halves = lanes.side_decoder(2, lanes.EMITTED.half)
bfloats = lanes.side_decoder(2, lanes.EMITTED.bfloat)
floats = lanes.side_decoder(4, lanes.EMITTED.float32)

mxfp4_row_1, mxfp4_row_2, mxfp4_row_3, mxfp4_row_4 = (dots.row_product(C, 17, dots.mxfp4_group) for C in (1, 2, 3, 4))
q4_1_row_1, q4_1_row_2, q4_1_row_3, q4_1_row_4 = (dots.row_product(C, 20, dots.q4_1_group) for C in (1, 2, 3, 4))
q8_0_row_1, q8_0_row_2, q8_0_row_3, q8_0_row_4 = (dots.row_product(C, 34, dots.q8_0_group) for C in (1, 2, 3, 4))
plain_1, plain_2, plain_4, plain_8, plain_12 = (dots.panel_product(C, 8, False) for C in (1, 2, 4, 8, 12))
biased_1, biased_2, biased_4, biased_8, biased_12 = (dots.panel_product(C, 8, True) for C in (1, 2, 4, 8, 12))
short_1, short_2, short_4, short_8, short_12 = (dots.panel_product(C, 4, False) for C in (1, 2, 4, 8, 12))


@kernel
def decode_sides(rows, place, last, data, begin, n, out):
    """The scales (or biases) of 16 rows' blocks begin .. begin + n, of the encodings that keep them apart."""
    stride = rows.scales_stride
    for b in range(n):
        if rows.kind == MXFP4_ADJACENT:
            powers_of_two(data, place + begin + b, stride, last, out, 16 * b)
            continue
        group = (begin + b) * BLOCK * rows.groups // rows.columns
        if rows.side_kind == F32:
            floats(data, place + 4 * group, stride, last, out, 16 * b)
        elif rows.side_kind == BF16:
            bfloats(data, place + 2 * group, stride, last, out, 16 * b)
        else:
            halves(data, place + 2 * group, stride, last, out, 16 * b)


@kernel
def decode_tile(rows, first, count, begin, n, codes, scales, biases):
    """Blocks begin .. begin + n of 32 of `count` rows, 16 at most, as `dots.panel_product` wants them."""
    kind, stride, last = rows.kind, rows.codes_stride, count - 1
    stored = n // STORED_BLOCKS[kind]
    at = first * stride + begin // STORED_BLOCKS[kind] * STORED[kind]
    if kind == MXFP4_SPLIT:
        decode_mxfp4_split(rows.codes, at, stride, last, codes, scales, biases, stored)
    elif kind == Q8_0:
        decode_q8_0(rows.codes, at, stride, last, codes, scales, biases, stored)
    elif kind == Q4_0:
        decode_q4_0(rows.codes, at, stride, last, codes, scales, biases, stored)
    elif kind == Q4_1:
        decode_q4_1(rows.codes, at, stride, last, codes, scales, biases, stored)
    elif kind == Q5_0:
        decode_q5_0(rows.codes, at, stride, last, codes, scales, biases, stored)
    elif kind == Q5_1:
        decode_q5_1(rows.codes, at, stride, last, codes, scales, biases, stored)
    elif kind == Q4_K:
        decode_q4_k(rows.codes, at, stride, last, codes, scales, biases, stored)
    elif kind == Q5_K:
        decode_q5_k(rows.codes, at, stride, last, codes, scales, biases, stored)
    elif kind == Q6_K:
        decode_q6_k(rows.codes, at, stride, last, codes, scales, biases, stored)
    else:
        if kind == MXFP4_ADJACENT:
            decode_mxfp4_adjacent(rows.codes, at, stride, last, codes, scales, biases, stored)
        elif kind == AFFINE4:
            decode_affine4(rows.codes, at, stride, last, codes, scales, biases, stored)
        else:
            decode_affine8(rows.codes, at, stride, last, codes, scales, biases, stored)
        decode_sides(rows, first * rows.scales_stride, last, rows.scales, begin, n, scales)
        if HAS_BIAS[kind]:
            decode_sides(rows, first * rows.biases_stride, last, rows.biases, begin, n, biases)


@kernel
def tile_times_panel(kind, n, codes, scales, biases, p, C, at, out, place):
    """n blocks of a decoded tile times the C columns of a panel from slot `at` on, added to 16 C floats of `out`."""
    if kind == Q6_K:
        if C == 12:
            short_12(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
        elif C == 8:
            short_8(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
        elif C == 4:
            short_4(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
        elif C == 2:
            short_2(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
        else:
            short_1(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
    elif HAS_BIAS[kind]:
        if C == 12:
            biased_12(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
        elif C == 8:
            biased_8(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
        elif C == 4:
            biased_4(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
        elif C == 2:
            biased_2(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
        else:
            biased_1(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
    elif C == 12:
        plain_12(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
    elif C == 8:
        plain_8(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
    elif C == 4:
        plain_4(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
    elif C == 2:
        plain_2(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)
    else:
        plain_1(n, codes, scales, biases, p.codes, p.scale, p.correction, p.sums, at, out, place)


@kernel
def tile_product(rows, first_row, first, count, panels, begin, end, y_row, bias, y):
    """Outputs first .. first + count, 16 at most, of the products of panels begin .. end with one matrix."""
    blocks, grains = rows.columns // BLOCK, GRAINS[rows.kind]
    size = min(blocks, CHUNK)
    # from a cache line's beginning on, so that no vector lies in two: codes, scales, biases and results
    room = np.empty((size * (9 + grains) + (end - begin) * PANEL + 1) * LINE, np.uint8)
    room = room[-room.ctypes.data % LINE :]
    codes, floats = room[: 8 * size * LINE], room[8 * size * LINE : len(room) // LINE * LINE].view(np.float32)
    sides, biases, out = floats, floats[ROWS * size * grains :], floats[ROWS * size * (grains + 1) :]
    for i in range((end - begin) * PANEL * ROWS):
        out[i] = 0
    for block in range(0, blocks, CHUNK):
        n = min(CHUNK, blocks - block)
        decode_tile(rows, first_row + first, count, block, n, codes, sides, biases)
        for k in range(begin, end):
            C = panel_width(panels.column[k + 1] - panels.column[k])
            at = (panels.at[k] + block * C) * grains
            tile_times_panel(
                rows.kind, n * grains, codes, sides, biases, panels, C, at, out, (k - begin) * PANEL * ROWS
            )
    for k in range(begin, end):
        p = panels.column[k]
        for c in range(panels.column[k + 1] - p):
            y_O, place = y[y_row[p + c]], ((k - begin) * PANEL + c) * ROWS
            for r in range(count):
                y_O[first + r] = out[place + r] + bias[first + r]


@kernel
def rows_times_columns(rows, first_row, first, count, panels, begin, end, y_row, bias, y):
    """Outputs first .. first + count of one matrix for one to four columns alone; of the encodings in `ROW_BY_ROW`."""
    p, at, blocks, columns = panels, panels.at[begin], rows.columns // BLOCK, end - begin
    step = (blocks + 3) // 4 * 4
    out = np.empty(FEW, np.float32)
    for r in range(first, first + count):
        row = (first_row + r) * rows.codes_stride
        if rows.kind == MXFP4_SPLIT:
            if columns == 1:
                mxfp4_row_1(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
            elif columns == 2:
                mxfp4_row_2(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
            elif columns == 3:
                mxfp4_row_3(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
            else:
                mxfp4_row_4(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
        elif rows.kind == Q4_1:
            if columns == 1:
                q4_1_row_1(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
            elif columns == 2:
                q4_1_row_2(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
            elif columns == 3:
                q4_1_row_3(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
            else:
                q4_1_row_4(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
        elif columns == 1:
            q8_0_row_1(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
        elif columns == 2:
            q8_0_row_2(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
        elif columns == 3:
            q8_0_row_3(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
        else:
            q8_0_row_4(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, out, 0)
        for c in range(columns):
            y[y_row[p.column[begin + c]], r] = out[c] + bias[r]


@kernel
def outputs(rows, first_row, first, count, panels, begin, end, y_row, bias, y):
    """Outputs first .. first + count, 16 at most, of one group's products, those of panels begin .. end."""
    alone = panels.column[end] - panels.column[begin] == end - begin
    if alone and (rows.kind == MXFP4_SPLIT or rows.kind == Q8_0 or rows.kind == Q4_1):
        rows_times_columns(rows, first_row, first, count, panels, begin, end, y_row, bias, y)
    else:
        tile_product(rows, first_row, first, count, panels, begin, end, y_row, bias, y)


@leaf
def rows_in_registers(rows, first_row, first, count, p, k, bias, y):
    """`rows_times_column` of the encodings in `ROW_BY_ROW`; allocates nothing."""
    at, blocks = p.at[k], rows.columns // BLOCK
    step = (blocks + 3) // 4 * 4
    for r in range(first, first + count):
        row = (first_row + r) * rows.codes_stride
        if rows.kind == MXFP4_SPLIT:
            mxfp4_row_1(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, y, r)
        elif rows.kind == Q4_1:
            q4_1_row_1(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, y, r)
        else:
            q8_0_row_1(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, step, y, r)
        y[r] += bias[r]


@kernel
def rows_times_column(rows, first_row, first, count, panels, k, bias, y):
    """Outputs first .. first + count of one matrix for column k of `quantise.empty_columns`, to the vector y."""
    if rows.kind == MXFP4_SPLIT or rows.kind == Q8_0 or rows.kind == Q4_1:
        rows_in_registers(rows, first_row, first, count, panels, k, bias, y)
        return
    y_1O = y.reshape((1, len(y)))
    for start in range(first, first + count, ROWS):
        n = min(ROWS, first + count - start)
        outputs(rows, first_row, start, n, panels, k, k + 1, NO_ROWS, bias, y_1O)


@parallel_kernel
def _product(rows, groups, panels, shares, bias, y):
    E, O = len(groups.matrix), y.shape[1]  # noqa: E741
    # each thread has an equal share of every group, and in it rows that follow each other
    tiles = (O + ROWS - 1) // ROWS
    size = (tiles + shares - 1) // shares
    for job in prange(shares * E * size):
        e, tile = np.int64(job) // size % E, np.int64(job) // size // E * size + np.int64(job) % size
        if tile < tiles:
            matrix, begin, end = groups.matrix[e], panels.first_panel[e], panels.first_panel[e + 1]
            first = tile * ROWS
            count = min(ROWS, O - first)
            outputs(rows, matrix * O, first, count, panels, begin, end, groups.y_row, bias[matrix], y)


def product(rows: Rows, groups: Groups, panels: Panels, bias_NO: np.ndarray) -> np.ndarray:
    """Each column of `quantise`'s panels through its group's matrix of the stack, bias added: float32 [P,O]."""
    y = np.empty((len(groups.y_row), bias_NO.shape[1]), np.float32)
    _product(rows, groups, panels, get_num_threads(), bias_NO, y)
    return y
