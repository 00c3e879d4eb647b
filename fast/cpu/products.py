"""Products of encoded rows with quantised inputs, on the blocks where they lie.

Sixteen rows are decoded, some blocks at a time, to a scratch that stays in the first cache, and meet panels of up
to 12 columns. Of the commonest encodings they are decoded in registers, 16 rows for each panel, one for each column
that is alone.
"""

import numpy as np

from assay.fast.cpu import dots, lanes
from assay.fast.cpu.groups import Groups
from assay.fast.cpu.jit import Address, get_num_threads, kernel, leaf, leaf_kernel, parallel_kernel, piece, prange
from assay.fast.cpu.layouts import BIASED, LAYOUTS
from assay.fast.cpu.phases import call_at, new_counters, take
from assay.fast.cpu.quantise import BLOCK, GRAINS, LINE, PANEL, Panels, panel_width
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
CHUNK = 32

STORED = np.zeros(max(LAYOUTS) + 1, np.int64)  # bytes of a stored block
STORED_BLOCKS = np.ones(max(LAYOUTS) + 1, np.int64)  # blocks of 32 in it
for _kind, _layout in LAYOUTS.items():
    STORED[_kind] = _layout.nbytes
for _kind in (Q4_K, Q5_K, Q6_K):
    STORED_BLOCKS[_kind] = 8
REGISTERS = (MXFP4_SPLIT, Q8_0, Q4_1)  # the kinds that are decoded there
IN_REGISTERS = np.isin(np.arange(max(LAYOUTS) + 1), REGISTERS)
FEWEST = max(LAYOUTS[kind].together for kind in REGISTERS)  # blocks that such a tile has at least
TILES = 12  # of 16 rows that a thread takes at a time
NEAR = 8  # panels that stay in the second cache while the rows pass by
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

mxfp4_row = dots.row_product(17, dots.mxfp4_parts, dots.mxfp4_whole)
q8_0_row = dots.row_product(34, dots.q8_0_parts, dots.q8_0_whole)
q4_1_row = dots.row_product(20, dots.q4_1_parts, dots.q4_1_whole)
tile_times_panel_in_registers = dots.tile_product({kind: LAYOUTS[kind] for kind in REGISTERS}, (2, 4, 8, 12))
plain_1, plain_2, plain_4, plain_8, plain_12 = (dots.panel_product(C, 8, False) for C in (1, 2, 4, 8, 12))
biased_1, biased_2, biased_4, biased_8, biased_12 = (dots.panel_product(C, 8, True) for C in (1, 2, 4, 8, 12))
short_1, short_2, short_4, short_8, short_12 = (dots.panel_product(C, 4, False) for C in (1, 2, 4, 8, 12))


@piece
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


@piece
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


@piece
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
def rows_by_tile(rows, first_row, first, count, panels, begin, end, y_row, bias, y):
    """Outputs first .. first + count of the products of panels begin .. end with one matrix, by way of a scratch."""
    blocks, grains = rows.columns // BLOCK, GRAINS[rows.kind]
    size = min(blocks, CHUNK)
    # from a cache line's beginning on, so that no vector lies in two: codes, scales, biases and results
    room = np.empty((size * (9 + grains) + (end - begin) * PANEL + 1) * LINE, np.uint8)
    room = room[-room.ctypes.data % LINE :]
    codes, floats = room[: 8 * size * LINE], room[8 * size * LINE : len(room) // LINE * LINE].view(np.float32)
    sides, biases, out = floats, floats[ROWS * size * grains :], floats[ROWS * size * (grains + 1) :]
    for start in range(first, first + count, ROWS):
        n = min(ROWS, first + count - start)
        for i in range((end - begin) * PANEL * ROWS):
            out[i] = 0
        for block in range(0, blocks, CHUNK):
            some = min(CHUNK, blocks - block)
            decode_tile(rows, first_row + start, n, block, some, codes, sides, biases)
            for k in range(begin, end):
                C = panel_width(panels.column[k + 1] - panels.column[k])
                at, place = (panels.at[k] + block * C) * grains, (k - begin) * PANEL * ROWS
                tile_times_panel(rows.kind, some * grains, codes, sides, biases, panels, C, at, out, place)
        for k in range(begin, end):
            p = panels.column[k]
            for c in range(panels.column[k + 1] - p):
                y_O, place = y[y_row[p + c]], ((k - begin) * PANEL + c) * ROWS
                for r in range(n):
                    y_O[start + r] = out[place + r] + bias[start + r]


@leaf_kernel
def rows_in_registers(rows, first_row, first, count, p, k, bias, y):
    """Outputs first .. first + count of one matrix for the column k alone, of the encodings in `IN_REGISTERS`."""
    at, blocks = p.at[k], rows.columns // BLOCK
    for r in range(first, first + count):
        row = (first_row + r) * rows.codes_stride
        if rows.kind == MXFP4_SPLIT:
            mxfp4_row(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, y, r)
        elif rows.kind == Q4_1:
            q4_1_row(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, y, r)
        else:
            q8_0_row(rows.codes, row, blocks, p.codes, p.scale, p.correction, p.sums, at, y, r)
        y[r] += bias[r]


@leaf_kernel
def rows_by_panel(rows, first_row, first, count, p, begin, end, y_row, bias, y):
    """`rows_by_tile` of the encodings in `IN_REGISTERS`, of a matrix of 16 rows at least."""
    blocks, stride = rows.columns // BLOCK, rows.codes_stride
    for start in range(first, first + count, ROWS):
        at = min(start, len(bias) - ROWS)  # the last tile ends where the matrix does
        tile = (rows.codes, (first_row + at) * stride, stride, blocks)
        stored = (start - at, min(ROWS, first + count - at))
        for k in range(begin, end):
            column = p.column[k]
            n = p.column[k + 1] - column
            if n == 1:
                rows_in_registers(rows, first_row, at + stored[0], stored[1] - stored[0], p, k, bias, y[y_row[column]])
            else:
                x = (p.codes, p.scale, p.correction, p.sums, p.at[k])
                results = (bias, y, y_row, column, n, at)
                tile_times_panel_in_registers(rows.kind, panel_width(n), *tile, *x, *results, *stored)


ROWS_BY_TILE, ROWS_BY_PANEL, ROWS_IN_REGISTERS = map(Address, (rows_by_tile, rows_by_panel, rows_in_registers))


@leaf
def some_shares(at, rows, groups, panels, thread, threads, counters, bias, y):
    """What one thread does of a product: shares of the matrices' rows, first its own, which lie one behind the other.

    What the others have not begun by then it takes from them: a thread may be slow, or come late.
    """
    O = y.shape[1]  # noqa: E741
    tiles = (O + ROWS - 1) // ROWS
    shares = (tiles + TILES - 1) // TILES
    jobs = shares * len(groups.matrix)
    for turn in range(threads):
        owner = (thread + turn) % threads
        first_job, end_job = jobs * owner // threads, jobs * (owner + 1) // threads
        job = first_job + take(counters, owner)
        while job < end_job:
            e, share = job // shares, job % shares
            first, end = tiles * share // shares * ROWS, min(tiles * (share + 1) // shares * ROWS, O)
            matrix, last_panel = groups.matrix[e], panels.first_panel[e + 1]
            for k in range(panels.first_panel[e], last_panel, NEAR):
                some = (panels, k, min(k + NEAR, last_panel))
                call_at(at, (rows, matrix * O, first, end - first, *some, groups.y_row, bias[matrix], y))
            job = first_job + take(counters, owner)


@parallel_kernel
def _product(at, rows, groups, panels, threads, counters, bias, y):
    for thread in prange(threads):
        some_shares(at, rows, groups, panels, np.int64(thread), threads, counters, bias, y)


def product(rows: Rows, groups: Groups, panels: Panels, bias_NO: np.ndarray) -> np.ndarray:
    """Each column of `quantise`'s panels through its group's matrix of the stack, bias added: float32 [P,O]."""
    y = np.empty((len(groups.y_row), bias_NO.shape[1]), np.float32)
    in_registers = IN_REGISTERS[rows.kind] and rows.columns // BLOCK >= FEWEST and y.shape[1] >= ROWS
    run = ROWS_BY_PANEL if in_registers else ROWS_BY_TILE
    at = run.of((rows, 0, 0, 0, panels, 0, 0, groups.y_row, bias_NO[0], y))
    threads = get_num_threads()
    _product(at, rows, groups, panels, threads, new_counters(threads), bias_NO, y)
    return y
