"""Exact products with encoded weights: float32 sums of decoded weights times inputs.

A few columns: rows of the common encodings are decoded in registers. More: tiles of rows are decoded into panels, and
multiplied with panels of columns. Both take the sum in the same order, so that the bits are the same.
"""

import numpy as np

from assay.fast.cpu import panels, simd
from assay.fast.cpu.decode import decode_row_at
from assay.fast.cpu.groups import Groups, one_group
from assay.fast.cpu.jit import Address, inlined, kernel, leaf, parallel_kernel, piece, prange
from assay.fast.cpu.phases import call_at
from assay.fast.cpu.rows import BF16, F16, F32, MXFP4_SPLIT, Q4_0, Q4_1, Q8_0, Rows

TILE = 16  # rows decoded at a time: an input vector is read from the cache once for all of them
SHARES = 8  # of a group's inputs, to be laid out by any thread


@leaf
def dot(x, y):
    """Sum of x y: element i goes to the partial sum i % 64, those beyond the last 16 to one of their own."""
    a = b = c = d = simd.zeros()
    whole = len(x) // 16
    for v in range(0, whole - 3, 4):
        i = 16 * v
        a = simd.multiply_add(simd.load_floats(x, i), simd.load_floats(y, i), a)
        b = simd.multiply_add(simd.load_floats(x, i + 16), simd.load_floats(y, i + 16), b)
        c = simd.multiply_add(simd.load_floats(x, i + 32), simd.load_floats(y, i + 32), c)
        d = simd.multiply_add(simd.load_floats(x, i + 48), simd.load_floats(y, i + 48), d)
    v = whole // 4 * 4
    if v < whole:
        a = simd.multiply_add(simd.load_floats(x, 16 * v), simd.load_floats(y, 16 * v), a)
    if v + 1 < whole:
        b = simd.multiply_add(simd.load_floats(x, 16 * v + 16), simd.load_floats(y, 16 * v + 16), b)
    if v + 2 < whole:
        c = simd.multiply_add(simd.load_floats(x, 16 * v + 32), simd.load_floats(y, 16 * v + 32), c)
    total = simd.sum_floats(simd.add(simd.add(a, b), simd.add(c, d)))
    for i in range(16 * whole, len(x)):
        total += x[i] * y[i]
    return total


@inlined
def plain16(kind, data, place):
    """16 plain elements from a byte on."""
    if kind == F32:
        return simd.load_floats(data, place)
    if kind == BF16:
        return simd.bfloats_to_floats(simd.load_16_halfwords(data, place))
    return simd.halves_to_floats(simd.load_16_halfwords(data, place))


@inlined
def nibbles16(codes, place):
    """The low and the high halves of 16 bytes, as floats."""
    both = simd.load_16_unsigned(codes, place)
    low, high = simd.low_nibbles_of_ints(both), simd.high_nibbles_of_ints(both)
    return simd.ints_to_floats(low), simd.ints_to_floats(high)


@inlined
def weights32(kind, codes, block):
    """The first and the second 16 weights of a block, as `decode_row` has them."""
    if kind == MXFP4_SPLIT:
        both, scale = simd.load_16_unsigned(codes, block + 1), simd.load_power_of_two(codes, block)
        low = simd.e2m1_to_floats(simd.low_nibbles_of_ints(both))
        high = simd.e2m1_to_floats(simd.high_nibbles_of_ints(both))
        return simd.multiply(scale, low), simd.multiply(scale, high)
    scale = simd.load_half(codes, block)
    if kind == Q8_0:
        low = simd.ints_to_floats(simd.load_16_signed(codes, block + 2))
        high = simd.ints_to_floats(simd.load_16_signed(codes, block + 18))
        return simd.multiply(scale, low), simd.multiply(scale, high)
    if kind == Q4_0:
        low, high = nibbles16(codes, block + 2)
        offset = simd.splat(np.float32(-8))
        return simd.multiply(scale, simd.add(low, offset)), simd.multiply(scale, simd.add(high, offset))
    low, high = nibbles16(codes, block + 4)
    bias = simd.load_half(codes, block + 2)
    return simd.add(simd.multiply(scale, low), bias), simd.add(simd.multiply(scale, high), bias)


@inlined
def block_row_dot(kind, nbytes, codes, at, x):
    """`dot` with a row of blocks at a place of the codes, decoded in registers."""
    a = b = c = d = simd.zeros()
    blocks = len(x) // 32
    for n in range(0, blocks - 1, 2):
        i = 32 * n
        low, high = weights32(kind, codes, at + n * nbytes)
        a = simd.multiply_add(simd.load_floats(x, i), low, a)
        b = simd.multiply_add(simd.load_floats(x, i + 16), high, b)
        low, high = weights32(kind, codes, at + (n + 1) * nbytes)
        c = simd.multiply_add(simd.load_floats(x, i + 32), low, c)
        d = simd.multiply_add(simd.load_floats(x, i + 48), high, d)
    if blocks % 2:
        low, high = weights32(kind, codes, at + (blocks - 1) * nbytes)
        a = simd.multiply_add(simd.load_floats(x, 32 * (blocks - 1)), low, a)
        b = simd.multiply_add(simd.load_floats(x, 32 * (blocks - 1) + 16), high, b)
    return simd.sum_floats(simd.add(simd.add(a, b), simd.add(c, d)))


@inlined
def plain_row_dot(kind, width, codes, at, x):
    """`dot` with a row of plain elements, their number a multiple of 16."""
    a = b = c = d = simd.zeros()
    whole = len(x) // 16
    for v in range(0, whole - 3, 4):
        i, place = 16 * v, at + 16 * v * width
        a = simd.multiply_add(simd.load_floats(x, i), plain16(kind, codes, place), a)
        b = simd.multiply_add(simd.load_floats(x, i + 16), plain16(kind, codes, place + 16 * width), b)
        c = simd.multiply_add(simd.load_floats(x, i + 32), plain16(kind, codes, place + 32 * width), c)
        d = simd.multiply_add(simd.load_floats(x, i + 48), plain16(kind, codes, place + 48 * width), d)
    v = whole // 4 * 4
    if v < whole:
        a = simd.multiply_add(simd.load_floats(x, 16 * v), plain16(kind, codes, at + 16 * v * width), a)
    if v + 1 < whole:
        b = simd.multiply_add(simd.load_floats(x, 16 * v + 16), plain16(kind, codes, at + 16 * (v + 1) * width), b)
    if v + 2 < whole:
        c = simd.multiply_add(simd.load_floats(x, 16 * v + 32), plain16(kind, codes, at + 16 * (v + 2) * width), c)
    return simd.sum_floats(simd.add(simd.add(a, b), simd.add(c, d)))


@leaf
def in_registers(rows):
    """Whether `row_dot` does without its scratch."""
    plain = rows.kind == BF16 or rows.kind == F16 or rows.kind == F32
    blocks = rows.kind == MXFP4_SPLIT or rows.kind == Q8_0 or rows.kind == Q4_1 or rows.kind == Q4_0
    return blocks or (plain and rows.columns % 16 == 0)


@leaf
def row_dot(decode_at, rows, r, x, scratch):
    """`dot` of row r with x; rows that are not decoded in registers are decoded to the scratch, [columns].

    `decode_at` is where `decode_row` lies: it is too much to hold a copy of.
    """
    kind, at = rows.kind, r * rows.codes_stride
    if kind == MXFP4_SPLIT:
        return block_row_dot(MXFP4_SPLIT, 17, rows.codes, at, x)
    if kind == Q8_0:
        return block_row_dot(Q8_0, 34, rows.codes, at, x)
    if kind == Q4_1:
        return block_row_dot(Q4_1, 20, rows.codes, at, x)
    if kind == Q4_0:
        return block_row_dot(Q4_0, 18, rows.codes, at, x)
    if kind == BF16 and rows.columns % 16 == 0:
        return plain_row_dot(BF16, 2, rows.codes, at, x)
    if kind == F16 and rows.columns % 16 == 0:
        return plain_row_dot(F16, 2, rows.codes, at, x)
    if kind == F32 and rows.columns % 16 == 0:
        return plain_row_dot(F32, 4, rows.codes, at, x)
    call_at(decode_at, (rows, r, scratch))
    return dot(x, scratch)


@kernel
def rows_times_one(decode_at, rows, first_row, first, count, x, bias, y):
    """Outputs first .. first + count of one product; `first_row` is the matrix's own first row in the stack."""
    registers_rows_times_one(decode_at, rows, first_row, first, count, x, bias, y, np.empty(rows.columns, np.float32))


@leaf
def registers_rows_times_one(decode_at, rows, first_row, first, count, x, bias, y, scratch):
    """`rows_times_one` with a scratch for a decoded row."""
    for r in range(first, first + count):
        y[r] = row_dot(decode_at, rows, first_row + r, x, scratch) + bias[r]


@inlined
def lay_out_plain(kind, width, codes, at, columns, to, panel):
    """`panels.lay_out` of a row of plain elements."""
    for part in range(panels.PARTS):
        for v in range(part, columns // 16, panels.PARTS):
            simd.store_floats(panel, to, plain16(kind, codes, at + 16 * v * width))
            to += 16 * panels.ROWS


@inlined
def lay_out_blocks(kind, nbytes, codes, at, columns, to, panel):
    """`panels.lay_out` of a row of blocks: the even ones make parts 0 and 1, the odd ones 2 and 3."""
    blocks, step = columns // 32, 16 * panels.ROWS
    for odd in range(2):
        steps = (blocks - odd + 1) // 2
        for n in range(steps):
            low, high = weights32(kind, codes, at + (2 * n + odd) * nbytes)
            simd.store_floats(panel, to + n * step, low)
            simd.store_floats(panel, to + (steps + n) * step, high)
        to += 2 * steps * step


@leaf
def lay_out_row(decode_at, rows, r, to, panel, scratch):
    """Row r decoded and laid out; those that are not decoded in registers are decoded to the scratch, [columns]."""
    kind, at, columns = rows.kind, r * rows.codes_stride, rows.columns
    if kind == MXFP4_SPLIT:
        lay_out_blocks(MXFP4_SPLIT, 17, rows.codes, at, columns, to, panel)
    elif kind == Q8_0:
        lay_out_blocks(Q8_0, 34, rows.codes, at, columns, to, panel)
    elif kind == Q4_1:
        lay_out_blocks(Q4_1, 20, rows.codes, at, columns, to, panel)
    elif kind == Q4_0:
        lay_out_blocks(Q4_0, 18, rows.codes, at, columns, to, panel)
    elif kind == BF16 and columns % 16 == 0:
        lay_out_plain(BF16, 2, rows.codes, at, columns, to, panel)
    elif kind == F16 and columns % 16 == 0:
        lay_out_plain(F16, 2, rows.codes, at, columns, to, panel)
    elif kind == F32 and columns % 16 == 0:
        lay_out_plain(F32, 4, rows.codes, at, columns, to, panel)
    else:
        call_at(decode_at, (rows, r, scratch))
        panels.lay_out(scratch, to, panels.ROWS, 0, panel)


@leaf
def store_totals(totals, x, x_row, y_row, ends, begin, r, bias, y, first):
    """The results of a panel's rows, from r on, and a panel of columns, from one on: the last elements are added."""
    I = x.shape[1]  # noqa: E741
    for row in range(r, min(r + panels.ROWS, y.shape[1] - first)):
        for p in range(begin, min(begin + panels.COLUMNS, len(x_row))):
            total = totals[(row - r) * panels.COLUMNS + p - begin]
            for i in range(I // 16 * 16, I):
                total += x[x_row[p], i] * ends[row, i % 16]
            y[y_row[p], first + row] = total + bias[first + row]


@leaf
def rows_times_few(decode_at, rows, first_row, first, count, x, x_row, bias, y, y_row, scratch):
    """Outputs first .. first + count of a few products; `first_row` is the matrix's own first row in the stack."""
    decodes = not in_registers(rows)
    for r in range(first, first + count):
        if decodes:
            call_at(decode_at, (rows, first_row + r, scratch))
        for p in range(len(x_row)):
            x_I = x[x_row[p]]
            total = dot(x_I, scratch) if decodes else row_dot(decode_at, rows, first_row + r, x_I, scratch)
            y[y_row[p], r] = total + bias[r]


@kernel
def linear_tile(decode_at, rows, groups, e, x, columns_at, columns, biases, y, first):
    """Outputs first .. first + TILE of a group's products.

    Inputs that are worth it stand in panels too, from place `columns_at` of `columns` on.
    """
    matrix, begin, end = groups.matrix[e], groups.start[e], groups.start[e + 1]
    x_row, y_row, bias, first_row = (
        groups.x_row[begin:end],
        groups.y_row[begin:end],
        biases[matrix],
        matrix * y.shape[1],
    )
    count, I, many = min(TILE, y.shape[1] - first), rows.columns, panels.in_panels(len(x_row))  # noqa: E741
    row, whole, panel = np.empty(I, np.float32), I // 16, 16 * (I // 16) * panels.ROWS
    if many < len(x_row):
        rows_times_few(decode_at, rows, first_row, first, count, x, x_row[many:], bias, y, y_row[many:], row)
    if many == 0:
        return
    tile, ends = np.empty(TILE // panels.ROWS * panel, np.float32), np.empty((TILE, 16), np.float32)
    for r in range(TILE):  # beyond the last row that again
        to = r // panels.ROWS * panel + 16 * (r % panels.ROWS)
        lay_out_row(decode_at, rows, first_row + first + min(r, count - 1), to, tile, row)
        for i in range(16 * whole, I):
            ends[r, i % 16] = row[i]
    sums = np.empty(TILE * panels.COLUMNS * panels.PARTS * 16, np.float32)
    totals = np.empty((panels.ROWS * panels.COLUMNS + 15) // 16 * 16, np.float32)
    for begin in range(0, many, panels.COLUMNS):
        panels.multiply_panels(tile, TILE // panels.ROWS, columns, columns_at + 16 * whole * begin, whole, sums)
        for n in range(TILE // panels.ROWS):
            panels.totals_of_panel(n, sums, totals)
            store_totals(totals, x, x_row[:many], y_row[:many], ends, begin, n * panels.ROWS, bias, y, first)


LINEAR_TILE = Address(linear_tile)


@leaf
def lay_out_group(groups, e, x, columns_at, share, columns):
    """A share of a group's inputs as panels."""
    begin, many = groups.start[e], panels.in_panels(groups.start[e + 1] - groups.start[e])
    x_row = groups.x_row[begin : begin + many]
    panels.lay_out_columns(x, x_row, x.shape[1] // 16, columns_at, share, SHARES, columns)


@piece
def places_of_panels(groups, whole):
    """Where each group's inputs begin among the panels, and where the last one's end: int64 [E+1]."""
    places = np.zeros(len(groups.start), np.int64)
    for e in range(len(groups.matrix)):
        many = panels.in_panels(groups.start[e + 1] - groups.start[e])
        places[e + 1] = places[e] + 16 * whole * ((many + panels.COLUMNS - 1) // panels.COLUMNS * panels.COLUMNS)
    return places


@parallel_kernel
def _grouped_linear(tile_at, decode_at, rows, groups, x, bias, y):
    E = len(groups.matrix)
    tiles = (y.shape[1] + TILE - 1) // TILE
    places = places_of_panels(groups, x.shape[1] // 16)
    columns = np.empty(places[E], np.float32)
    for job in prange(E * SHARES):
        e = np.int64(job) % E
        lay_out_group(groups, e, x, places[e], np.int64(job) // E, columns)
    for job in prange(E * tiles):
        # neighbouring jobs belong to different groups: each thread gets an equal share of every group
        e = np.int64(job) % E
        first = np.int64(job) // E * TILE
        call_at(tile_at, (decode_at, rows, groups, e, x, places[e], columns, bias, y, first))


def grouped_linear(rows: Rows, groups: Groups, x: np.ndarray, bias_NO: np.ndarray) -> np.ndarray:
    """Each product's input, x [.,I], through its group's matrix of the stack `rows` [N*O,I], bias added: [P,O].

    Inputs, biases and results are float32; sums are float32 in many partial sums. Twin of
    `reference.gpt_oss.per_expert`.
    """
    assert x.shape[1] == rows.columns
    y = np.empty((len(groups.y_row), bias_NO.shape[1]), np.float32)
    tile_at = LINEAR_TILE.of((0, rows, groups, 0, x, 0, y[0], bias_NO, y, 0))
    _grouped_linear(tile_at, decode_row_at(), rows, groups, x, bias_NO, y)
    return y


def linear(rows: Rows, x_TI: np.ndarray, bias_1O: np.ndarray) -> np.ndarray:
    """x W^T + b; twin of `reference.ops.linear`: [T,I] -> [T,O]."""
    return grouped_linear(rows, one_group(len(x_TI)), x_TI, bias_1O)
