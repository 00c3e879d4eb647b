"""Inputs of a quantised product in panels of up to 12 columns, rounded to int8 as ggml's CPU path rounds them.

Blocks of 32 (Q8_0, Q8_1): the scale is max|x| / 127 in float16, the integers are x 127 / max|x| to nearest even.
For K-quants blocks of 256 (Q8_K): the scale 1 / f in float32, the integers x f for f = -127 over the first element
of largest magnitude. The twins are in `reference.precision`. A block that holds NaN or infinity has the scale NaN.
"""

import itertools
from typing import NamedTuple

import numpy as np

from assay.fast.cpu import rounders
from assay.fast.cpu.decode import float_of_bits
from assay.fast.cpu.groups import Groups
from assay.fast.cpu.jit import kernel, parallel_kernel, piece, prange
from assay.fast.cpu.layouts import ADJACENT, LAYOUTS, OFFSET, SUPERBLOCKS, UNIT
from assay.fast.cpu.rows import Q6_K

BLOCK = 32
SUPERBLOCK = 256
PANEL = 12  # columns at most
LINE = 64  # bytes of a cache line, and of a vector
STRIP = 8  # blocks of 32 that are rounded at a time: a superblock
MANY = 1 << 15  # inputs from which on several threads share the rounding

MAGNITUDE = np.int32(0x7FFFFFFF)
NO_ROWS = np.zeros(64, np.int64)  # of a lone column: its input and its result are row 0
INFINITE = np.int32(0x7F800000)


KINDS = range(max(LAYOUTS) + 1)
SUPER, APART = np.isin(KINDS, SUPERBLOCKS), np.isin(KINDS, ADJACENT)
GRAINS = np.where(np.equal(KINDS, Q6_K), 2, 1)  # scales to a block of 32 weights
OFFSETS = np.array([OFFSET.get(kind, 0) for kind in KINDS], np.int32)
UNITS = np.array([UNIT.get(kind, 1.0) for kind in KINDS], np.float32)


class Panels(NamedTuple):
    """Columns of rounded inputs side by side: panel k has the columns from column[k] to column[k + 1], in C places,

    where C is 1, 2, 4, 8 or 12, and the last stands for those that are missing. From place at[k] on there are, for
    each block of 32, C values of `scale`, `correction` (for the codes' offset) and `sums` (of the rounded inputs);
    and from 32 at[k] on, for each of its 8 words, four int8 of each of the C columns. Rows with a scale to 16 weights
    have such values for each half block, from place 2 at[k] on. For the others a column alone lies in groups of
    four blocks, filled up with zeros: the first word of each block, then the second ones.
    `first_panel` of each group of products, and the number of panels.
    """

    codes: np.ndarray  # uint8 that are int8
    scale: np.ndarray  # float32
    correction: np.ndarray  # int32
    sums: np.ndarray  # float32
    column: np.ndarray  # int64
    at: np.ndarray  # int64
    first_panel: np.ndarray  # int64


def empty_panels(start: np.ndarray, blocks: int, kind: int) -> Panels:
    """Room for the columns of groups that begin and end at `start`, of so many blocks of 32, for rows of a kind."""
    column, at, first_panel, room = [], [], [], 0
    for begin, end in itertools.pairwise(start.tolist()):
        first_panel.append(len(column))
        for first in range(begin, end, PANEL):
            column.append(first)
            at.append(room)
            room += -(-blocks * width(min(PANEL, end - first)) // 4) * 4
    n = len(column)
    places = np.array([*column, start[-1], *at, *first_panel, n], np.int64)
    return _room(room, int(GRAINS[kind]), places[: n + 1], places[n + 1 : 2 * n + 1], places[2 * n + 1 :])


def empty_columns(P: int, size: int) -> Panels:
    """Room for P columns alone of up to so many inputs, for rows of any kind."""
    slots = -(-size // (4 * BLOCK)) * 4
    return _room(P * slots, 2, np.arange(P + 1), slots * np.arange(P), np.array([0, P]))


def _room(blocks: int, grains: int, *places: np.ndarray) -> Panels:
    # from a cache line's beginning on, so that a vector of codes does not lie in two
    room = np.empty(BLOCK * blocks + LINE, np.uint8)
    codes = room[-room.ctypes.data % LINE :][: BLOCK * blocks]
    values = np.empty((3, blocks * grains), np.float32)
    return Panels(codes, values[0], values[1].view(np.int32), values[2], *places)


def width(n: int) -> int:
    """Columns of the panel that holds n."""
    return 12 if n > 8 else 8 if n > 4 else 4 if n > 2 else n


panel_width = piece(width)


@piece
def round_to_half(x):
    """The float32 nearest to x >= 0 that is a float16, ties to even."""
    if x >= np.float32(65520):
        return np.float32(np.inf)
    exponent = max(np.float32(x).view(np.int32) >> 23, 113)  # below 2^-14 the steps stay as they are
    rounder = float_of_bits(np.uint32((exponent + 13) << 23)) * np.float32(1.5)
    return np.float32(np.float32(x) + rounder) - rounder


@piece
def block_factor(x, place):
    """What 32 inputs are multiplied by, and the scale that takes it back."""
    largest = rounders.largest_32(x, place)
    if largest >= INFINITE:
        return np.float32(0), np.float32(np.nan)
    top = float_of_bits(np.uint32(largest))
    factor = np.float32(127) / top if largest > 0 else np.float32(0)
    return factor, round_to_half(top / np.float32(127))


@piece
def superblock_factor(x, place):
    """The same of 256 inputs."""
    largest = np.int32(0)
    for i in range(place, place + SUPERBLOCK, BLOCK):
        largest = max(largest, rounders.largest_32(x, i))
    if largest >= INFINITE:
        return np.float32(0), np.float32(np.nan)
    i = place
    bits = x.view(np.int32)
    while bits[i] & MAGNITUDE != largest:
        i += 1
    factor = np.float32(-127) / x[i]
    if np.isinf(factor):
        return np.float32(0), np.float32(0)
    return factor, np.float32(1) / factor


@piece
def round_blocks(x, place, kind, begin, end, C, c, at, panels):
    """Blocks begin .. end of 32, not beyond a superblock, of the inputs from `place` on: column c of C."""
    factor = scale = np.float32(0)
    if SUPER[kind]:
        factor, scale = superblock_factor(x, place + begin * BLOCK)
    for b in range(begin, end):
        if not SUPER[kind]:
            factor, scale = block_factor(x, place + b * BLOCK)
        to, step = BLOCK * (at + b * C) + 4 * c, 4 * C
        if C == 1 and GRAINS[kind] == 1:
            to, step = BLOCK * (at + b // 4 * 4) + 4 * (b % 4), 16
        low, high = rounders.round_32(x, place + b * BLOCK, factor, APART[kind], panels.codes, to, step)
        if GRAINS[kind] == 2:
            set_block(2 * (at + b * C) + c, kind, scale, low, panels)
            set_block(2 * (at + b * C) + C + c, kind, scale, high, panels)
        else:
            set_block(at + b * C + c, kind, scale, low + high, panels)


@piece
def set_block(i, kind, scale, total, panels):
    """The block's scale, correction and sum."""
    panels.scale[i] = scale * UNITS[kind]
    panels.correction[i] = -OFFSETS[kind] * total
    panels.sums[i] = scale * np.float32(total)


@piece
def fill_group(at, blocks, panels):
    """Zeros for the blocks that a column alone lacks to fours."""
    for b in range(blocks, (blocks + 3) // 4 * 4):
        panels.scale[at + b] = panels.sums[at + b] = 0
        panels.correction[at + b] = 0
        place = BLOCK * (at + b // 4 * 4) + 4 * (b % 4)
        for word in range(8):
            for i in range(4):
                panels.codes[place + 16 * word + i] = 0


@piece
def round_strip(x, x_row, columns, kind, k, begin, panels):
    """A strip of blocks of all columns of panel k."""
    blocks, n = columns // BLOCK, panels.column[k + 1] - panels.column[k]
    end, C, at = min(begin + STRIP, blocks), panel_width(n), panels.at[k]
    for c in range(C):
        place = x_row[panels.column[k] + min(c, n - 1)] * columns
        round_blocks(x, place, kind, begin, end, C, c, at, panels)
    if C == 1 and end == blocks and GRAINS[kind] == 1:
        fill_group(at, blocks, panels)


@kernel
def quantise_column(x, kind, k, panels):
    """One input vector, as rows of a kind take it, to column k of `empty_columns`."""
    for begin in range(0, len(x) // BLOCK, STRIP):
        round_strip(x, NO_ROWS, len(x), kind, k, begin, panels)


@kernel
def _round_all(x, x_row, columns, kind, panels):
    for k in range(len(panels.at)):
        for begin in range(0, columns // BLOCK, STRIP):
            round_strip(x, x_row, columns, kind, k, begin, panels)


@parallel_kernel
def _round_all_many(x, x_row, columns, kind, panels):
    strips, K = (columns // BLOCK + STRIP - 1) // STRIP, len(panels.at)
    for job in prange(strips * K):
        round_strip(x, x_row, columns, kind, np.int64(job) % K, np.int64(job) // K * STRIP, panels)


def quantise(x: np.ndarray, groups: Groups, kind: int) -> Panels:
    """Inputs x, float32 [.,I], as the groups' products with rows of this kind take them."""
    panels = empty_panels(groups.start, x.shape[1] // BLOCK, kind)
    run = _round_all if len(groups.x_row) * x.shape[1] < MANY else _round_all_many
    run(np.ascontiguousarray(x).reshape(-1), groups.x_row, x.shape[1], kind, panels)
    return panels
