"""Products of encoded rows with quantised inputs, on the blocks where they lie.

Up to four columns: a row is decoded in registers, four blocks at a time. More: 16 rows are decoded once to a
scratch that stays in the cache, and meet panels of up to 12 columns. Codes are made unsigned, since the machine's
dot product of bytes wants one unsigned side; the inputs' correction takes the offset back, exactly, in integers.
"""

# ruff: noqa: SIM109 - comparisons with one constant each are what Numba prunes branches by

from typing import NamedTuple

import numpy as np

from assay.fast.cpu import simd
from assay.fast.cpu.groups import Groups
from assay.fast.cpu.jit import inlined, kernel, parallel_kernel, prange
from assay.fast.cpu.quantise import GROUP, PANEL, Inputs, empty_inputs, quantise
from assay.fast.cpu.rows import AFFINE4, AFFINE8, BF16, BLOCK, F32, MXFP4_ADJACENT, MXFP4_SPLIT, Q4_0, Q4_1, Q8_0, Rows

ROWS = 16  # of a tile: the lanes of a vector
FEW = 4  # columns up to which a row is decoded in registers

NO_PANELS = np.zeros(1, np.int64)

# E2M1's values doubled, plus 12
E2M1_CODES = np.tile(np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]) + 12, 4).astype(np.uint8)
BLOCK_BYTES = np.array([32 * BLOCK[kind][0] // BLOCK[kind][1] for kind in range(len(BLOCK))])


@inlined
def halves(kind, codes, at):
    """Codes of 16 first and 16 second elements from each of four places, undecoded (for nibbles: the same bytes)."""
    a, b, c, d = at
    if kind == Q8_0 or kind == AFFINE8:
        return simd.load_4x16_bytes(codes, a, b, c, d), simd.load_4x16_bytes(codes, a + 16, b + 16, c + 16, d + 16)
    both = simd.load_4x16_bytes(codes, a, b, c, d)
    return both, both


@inlined
def unsigned(kind, low, high):
    """Unsigned codes of both halves, at most 255: the weight is scale * (code - offset) / unit."""
    if kind == AFFINE8:
        return low, high
    if kind == Q8_0:
        return simd.signed_to_unsigned(low), simd.signed_to_unsigned(high)
    low, high = simd.low_nibbles(low), simd.high_nibbles(high)
    if kind == MXFP4_SPLIT or kind == MXFP4_ADJACENT:
        table = simd.load_bytes(E2M1_CODES, 0)
        return simd.look_up(table, low), simd.look_up(table, high)
    return low, high


@inlined
def code_start(kind):
    """Bytes of a block before its codes."""
    if kind == MXFP4_SPLIT:
        return 1
    if kind == Q8_0 or kind == Q4_0:
        return 2
    return 4 if kind == Q4_1 else 0


@inlined
def plain4(kind, data, a, b, c, d):
    """Four floats of a plain format from four places."""
    if kind == F32:
        return simd.bits_to_floats4(simd.load_4_words(data, a, b, c, d))
    if kind == BF16:
        return simd.bfloats_to_floats4(simd.load_4_halfwords(data, a, b, c, d))
    return simd.halves_to_floats4(simd.load_4_halfwords(data, a, b, c, d))


@inlined
def halves4(data, at, offset):
    """The float16 at an offset from each of four places."""
    a, b, c, d = at
    return simd.halves_to_floats4(simd.load_4_halfwords(data, a + offset, b + offset, c + offset, d + offset))


@inlined
def scales4(kind, rows, at, side):
    """The scales of four blocks: `at` is where the blocks are in the codes, `side` in the scales."""
    if kind == MXFP4_SPLIT:
        a, b, c, d = at
        return simd.powers_of_two4(simd.load_4_bytes(rows.codes, a, b, c, d))
    if kind == MXFP4_ADJACENT:
        a, b, c, d = side
        return simd.powers_of_two4(simd.load_4_bytes(rows.scales, a, b, c, d))
    if kind == AFFINE4 or kind == AFFINE8:
        a, b, c, d = side
        return plain4(rows.side_kind, rows.scales, a, b, c, d)
    return halves4(rows.codes, at, 0)


@inlined
def biases4(kind, rows, at, side):
    """The biases of four blocks, of the encodings that have them."""
    if kind == Q4_1:
        return halves4(rows.codes, at, 2)
    a, b, c, d = side
    return plain4(rows.side_kind, rows.biases, a, b, c, d)


@inlined
def side_place(kind, rows, r, b):
    """Where block b of row r has its scale (and, as far from the beginning, its bias)."""
    if kind == MXFP4_ADJACENT:
        return r * rows.scales_stride + b
    if kind == AFFINE4 or kind == AFFINE8:
        width = 4 if rows.side_kind == F32 else 2
        return r * rows.scales_stride + b * 32 * rows.groups // rows.columns * width
    return 0


@inlined
def row_times_columns(kind, nbytes, rows, r, inputs, column, totals):
    """Row r times len(totals) columns from `column` on: 16 partial sums each."""
    last = rows.columns // 32 - 1
    row, start = r * rows.codes_stride, code_start(kind)
    for g in range(inputs.groups):
        # beyond a row's last block the inputs' scale is 0: read the last again, not what lies behind it
        n = (g * GROUP, min(g * GROUP + 1, last), min(g * GROUP + 2, last), min(g * GROUP + 3, last))
        at = (row + n[0] * nbytes, row + n[1] * nbytes, row + n[2] * nbytes, row + n[3] * nbytes)
        side = (
            side_place(kind, rows, r, n[0]),
            side_place(kind, rows, r, n[1]),
            side_place(kind, rows, r, n[2]),
            side_place(kind, rows, r, n[3]),
        )
        low, high = halves(kind, rows.codes, (at[0] + start, at[1] + start, at[2] + start, at[3] + start))
        low, high = unsigned(kind, low, high)
        place, stride = column * inputs.groups + g, inputs.groups
        scales = scales4(kind, rows, at, side)
        totals = simd.add_group(totals, low, high, scales, inputs.codes, inputs.scale, inputs.correction, place, stride)
        if kind == Q4_1 or kind == AFFINE4 or kind == AFFINE8:
            totals = simd.add_group_bias(totals, biases4(kind, rows, at, side), inputs.sums, place, stride)
    return totals


@inlined
def rows_times_few(kind, nbytes, rows, r, count, inputs, column, M, out):
    """`count` rows times M of 1 to 4 columns: out[row, column]."""
    for i in range(count):
        if M == 1:
            simd.store_sums(out[i], row_times_columns(kind, nbytes, rows, r + i, inputs, column, simd.zeros(1)))
        elif M == 2:
            simd.store_sums(out[i], row_times_columns(kind, nbytes, rows, r + i, inputs, column, simd.zeros(2)))
        else:
            simd.store_sums(out[i], row_times_columns(kind, nbytes, rows, r + i, inputs, column, simd.zeros(4)))


@kernel
def few(rows, r, count, inputs, column, M, out):
    """`rows_times_few` for the rows' kind; the two that matter most are compiled for themselves, and faster by half."""
    if rows.kind == MXFP4_SPLIT:
        rows_times_few(MXFP4_SPLIT, 17, rows, r, count, inputs, column, M, out)
    elif rows.kind == Q8_0:
        rows_times_few(Q8_0, 34, rows, r, count, inputs, column, M, out)
    else:
        rows_times_few(rows.kind, BLOCK_BYTES[rows.kind], rows, r, count, inputs, column, M, out)


@inlined
def decode_tile(kind, nbytes, rows, first, count, codes, scales, biases):
    """16 rows from `first` on as `simd.add_tile_block` wants them; for rows beyond `count` the last is repeated."""
    start = code_start(kind)
    for b in range(rows.columns // 32):
        for quarter in range(4):
            r = (
                first + min(4 * quarter, count - 1),
                first + min(4 * quarter + 1, count - 1),
                first + min(4 * quarter + 2, count - 1),
                first + min(4 * quarter + 3, count - 1),
            )
            at = (
                r[0] * rows.codes_stride + b * nbytes,
                r[1] * rows.codes_stride + b * nbytes,
                r[2] * rows.codes_stride + b * nbytes,
                r[3] * rows.codes_stride + b * nbytes,
            )
            side = (
                side_place(kind, rows, r[0], b),
                side_place(kind, rows, r[1], b),
                side_place(kind, rows, r[2], b),
                side_place(kind, rows, r[3], b),
            )
            simd.store_floats4(scales, 16 * b + 4 * quarter, scales4(kind, rows, at, side))
            if kind == Q4_1 or kind == AFFINE4 or kind == AFFINE8:
                simd.store_floats4(biases, 16 * b + 4 * quarter, biases4(kind, rows, at, side))
            low, high = halves(kind, rows.codes, (at[0] + start, at[1] + start, at[2] + start, at[3] + start))
            low, high = unsigned(kind, low, high)
            simd.store_bytes(codes, 512 * b + 64 * quarter, low)
            simd.store_bytes(codes, 512 * b + 256 + 64 * quarter, high)
        for half in range(2):
            place = 512 * b + 256 * half
            words = simd.transpose_16x4(
                simd.load_bytes(codes, place),
                simd.load_bytes(codes, place + 64),
                simd.load_bytes(codes, place + 128),
                simd.load_bytes(codes, place + 192),
            )
            for i in range(4):
                simd.store_bytes(codes, place + 64 * i, words[i])


@kernel
def tile(rows, first, count, codes, scales, biases):
    """`decode_tile` for the rows' kind."""
    if rows.kind == MXFP4_SPLIT:
        decode_tile(MXFP4_SPLIT, 17, rows, first, count, codes, scales, biases)
    else:
        decode_tile(rows.kind, BLOCK_BYTES[rows.kind], rows, first, count, codes, scales, biases)


@inlined
def tile_times_columns(blocks, biased, codes, scales, biases, panels, at, C, totals):
    """A tile times the C = len(totals) columns of a panel whose first block is at `at`."""
    for b in range(blocks):
        totals = simd.add_tile_block(
            totals, codes, scales, panels.codes, panels.scale, panels.correction, b, at + b * C
        )
        if biased:
            totals = simd.add_tile_bias(totals, biases, panels.sums, b, at + b * C)
    return totals


@kernel
def tile_times_panel(blocks, biased, codes, scales, biases, panels, at, C, out):
    """A tile times a panel of 4, 8 or 12 columns: out[16 column + row]."""
    if C == 12:
        simd.store_tuple(out, tile_times_columns(blocks, biased, codes, scales, biases, panels, at, 12, simd.zeros(12)))
    elif C == 8:
        simd.store_tuple(out, tile_times_columns(blocks, biased, codes, scales, biases, panels, at, 8, simd.zeros(8)))
    else:
        simd.store_tuple(out, tile_times_columns(blocks, biased, codes, scales, biases, panels, at, 4, simd.zeros(4)))


@inlined
def width(columns):
    """Columns of the panel that takes the next ones: a multiple of 4, at most 12."""
    return min(12, (columns + 3) // 4 * 4)


@kernel
def pack_panel(inputs, first, n, base, blocks, panels):
    """The n columns from `first` on, side by side, from place `base` on; the last stands for those that are missing."""
    codes, packed = inputs.codes.view(np.uint32), panels.codes.view(np.uint32)
    C = width(n)
    for b in range(blocks):
        for c in range(C):
            p, to = first + min(c, n - 1), base + b * C + c
            block = p * inputs.groups * GROUP + b
            panels.scale[to] = inputs.scale[block]
            panels.correction[to] = inputs.correction[block]
            panels.sums[to] = inputs.sums[block]
            word, out = 32 * (block // GROUP) + 4 * (block % GROUP), 8 * (base + b * C) + c
            for i in range(4):
                packed[out + C * i] = codes[word + i]
                packed[out + C * (4 + i)] = codes[word + 16 + i]


@parallel_kernel
def _pack(inputs, column, blocks, panels):
    for k in prange(len(column) - 1):
        n = column[k + 1] - column[k]
        pack_panel(inputs, column[k], n, np.int64(k) * blocks * PANEL, blocks, panels)


def pack(inputs: Inputs, column: np.ndarray, blocks: int) -> Inputs:
    """The inputs in panels; see `_pack`."""
    panels = empty_inputs((len(column) - 1) * blocks * PANEL, 0)
    _pack(inputs, column, blocks, panels)
    return panels


@kernel
def few_columns(rows, matrix, first, count, inputs, begin, end, y_row, bias, y):
    """Outputs first .. first + count of the products begin .. end of one matrix, four at most."""
    out = np.empty((count, 4), np.float32)
    O, M = y.shape[1], end - begin  # noqa: E741
    few(rows, matrix * O + first, count, inputs, begin, M, out)
    for m in range(M):
        for r in range(count):
            y[y_row[begin + m], first + r] = out[r, m] + bias[matrix, first + r]


@kernel
def many_columns(rows, matrix, first, count, panels, column, k, end, y_row, bias, y):
    """Outputs first .. first + count, 16 at most, of the panels from k to the one that ends at `end`."""
    blocks, O = rows.columns // 32, y.shape[1]  # noqa: E741
    codes, out = np.empty(blocks * 512, np.uint8), np.empty(16 * PANEL, np.float32)
    scales, biases = np.empty(blocks * 16, np.float32), np.empty(blocks * 16, np.float32)
    tile(rows, matrix * O + first, count, codes, scales, biases)
    biased = rows.kind == Q4_1 or rows.kind == AFFINE4 or rows.kind == AFFINE8
    while column[k] < end:
        n = column[k + 1] - column[k]
        tile_times_panel(blocks, biased, codes, scales, biases, panels, k * blocks * PANEL, width(n), out)
        for c in range(n):
            y_O = y[y_row[column[k] + c]]
            for r in range(count):
                y_O[first + r] = out[16 * c + r] + bias[matrix, first + r]
        k += 1


@parallel_kernel
def _product(rows, groups, inputs, panels, column, first_panel, bias, y):
    E, O = len(groups.matrix), y.shape[1]  # noqa: E741
    tiles = (O + ROWS - 1) // ROWS
    for job in prange(E * tiles):
        # neighbouring jobs belong to different groups: each thread gets an equal share of every group
        e, first = np.int64(job) % E, np.int64(job) // E * ROWS
        begin, end, matrix = groups.start[e], groups.start[e + 1], groups.matrix[e]
        count = min(ROWS, O - first)
        if end - begin <= FEW:
            few_columns(rows, matrix, first, count, inputs, begin, end, groups.y_row, bias, y)
        else:
            many_columns(rows, matrix, first, count, panels, column, first_panel[e], end, groups.y_row, bias, y)


def panel_columns(start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where panels of at most 12 columns begin, and the first panel of each group; groups of few have none.

    Panels are numbered through; a group of few columns stands as one empty panel's boundary.
    """
    begins: list[int] = []
    first_panel = np.zeros(len(start) - 1, np.int64)
    for e, (begin, end) in enumerate(zip(start[:-1].tolist(), start[1:].tolist(), strict=True)):
        first_panel[e] = len(begins)
        begins += range(begin, end, PANEL if end - begin > FEW else end - begin or 1)
    return np.array([*begins, start[-1]], np.int64), first_panel


class Columns(NamedTuple):
    """The inputs of the products of some groups, quantised, and in panels where a group has more than a few."""

    inputs: Inputs
    panels: Inputs
    column: np.ndarray
    first_panel: np.ndarray


def columns(x: np.ndarray, groups: Groups, kind: int) -> Columns:
    """Inputs x [.,I] as the groups' products with rows of this kind take them."""
    inputs = quantise(x, groups.x_row, kind)
    if len(groups.x_row) <= FEW:
        return Columns(inputs, inputs, NO_PANELS, NO_PANELS)
    column, first_panel = panel_columns(groups.start)
    return Columns(inputs, pack(inputs, column, x.shape[1] // 32), column, first_panel)


def product(rows: Rows, groups: Groups, columns: Columns, bias_NO: np.ndarray) -> np.ndarray:
    """Each column through its group's matrix of the stack, bias added: float32 [P,O]."""
    y = np.empty((len(groups.y_row), bias_NO.shape[1]), np.float32)
    inputs, panels, column, first_panel = columns
    _product(rows, groups, inputs, panels, column, first_panel, bias_NO, y)
    return y
