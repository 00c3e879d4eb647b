"""Inputs of a quantised product: int8 in blocks of 32, rounded as ggml's CPU path rounds activations (Q8_0, Q8_1).

The scale is max|x| / 127 in float16, the integers are x 127 / max|x| to nearest even. The twin, which says it in
three lines, is `reference.precision.round_q8`. A block that holds NaN or infinity has the scale NaN.
"""

from typing import NamedTuple

import numpy as np

from assay.fast.cpu.decode import float_of_bits
from assay.fast.cpu.jit import kernel, parallel_kernel, prange
from assay.fast.cpu.rows import AFFINE4, AFFINE8, MXFP4_ADJACENT, MXFP4_SPLIT, Q4_0, Q4_1, Q8_0

BLOCK = 32
GROUP = 4  # blocks that a row's product takes at a time
SPARE = 3  # columns after the last that a product of four may read and drop
PANEL = 12  # columns that a product of many takes at a time

MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITE = np.int32(0x7F800000)
ROUNDER = np.float32(1.5 * 2**23)  # added, it rounds to an integer, nearest even, in the lowest bits

# what is added to a code to make it unsigned; whether elements 2j and 2j + 1 share a byte; what a code counts
CODE_OFFSET = {MXFP4_SPLIT: 12, MXFP4_ADJACENT: 12, Q8_0: 128, Q4_0: 8, Q4_1: 0, AFFINE4: 0, AFFINE8: 0}
ADJACENT = (MXFP4_ADJACENT, AFFINE4)
UNIT = {MXFP4_SPLIT: 0.5, MXFP4_ADJACENT: 0.5}


class Inputs(NamedTuple):
    """P columns of quantised inputs, in groups of four blocks, the last one filled up with zeros.

    A group's 128 integers: of each block first the 16 that meet a row's low nibbles, then those that meet the
    high ones. `scale`, `correction` (for the codes' offset) and `sums` (of the rounded inputs) are by block.
    """

    codes: np.ndarray  # uint8 that are int8 [.]
    scale: np.ndarray  # float32
    correction: np.ndarray  # int32
    sums: np.ndarray  # float32
    groups: int


def empty_inputs(blocks: int, groups: int) -> Inputs:
    """Room for so many blocks in all."""
    floats = np.empty((2, blocks), np.float32)
    return Inputs(np.empty(32 * blocks, np.uint8), floats[0], np.empty(blocks, np.int32), floats[1], groups)


@kernel
def round_to_half(x):
    """The float32 nearest to x >= 0 that is a float16, ties to even."""
    if x >= np.float32(65520):
        return np.float32(np.inf)
    exponent = max(np.float32(x).view(np.int32) >> 23, 113)  # below 2^-14 the steps stay as they are
    rounder = float_of_bits(np.uint32((exponent + 13) << 23)) * np.float32(1.5)
    return np.float32(np.float32(x) + rounder) - rounder


@kernel
def quantise_block(x, adjacent, codes, high):
    """32 inputs to codes[0..16) and codes[high..high + 16); the scale, and the integers' sum."""
    bits = x.view(np.int32)
    largest = np.int32(0)
    for i in range(BLOCK):
        largest = max(largest, bits[i] & MAGNITUDE)
    if largest >= INFINITE:
        for j in range(16):
            codes[j] = codes[high + j] = 0
        return np.float32(np.nan), np.int32(0)
    top = float_of_bits(np.uint32(largest))
    factor = np.float32(127) / top if largest > 0 else np.float32(0)
    integers = np.empty(BLOCK, np.int32)
    total = np.int32(0)
    for i in range(BLOCK):
        integers[i] = np.int32(np.float32(x[i] * factor + ROUNDER).view(np.int32) - np.int32(0x4B400000))
        total += integers[i]
    if adjacent:
        for j in range(16):
            codes[j], codes[high + j] = integers[2 * j], integers[2 * j + 1]
    else:
        for j in range(16):
            codes[j], codes[high + j] = integers[j], integers[16 + j]
    return round_to_half(top / np.float32(127)), total


@kernel
def quantise_column(x, column, adjacent, offset, unit, inputs):
    """One input vector to column `column`."""
    first = column * inputs.groups
    for b in range(inputs.groups * GROUP):
        at, place = first * GROUP + b, first * 128 + b // GROUP * 128 + b % GROUP * 16
        scale, total = np.float32(0), np.int32(0)
        if b * BLOCK < len(x):
            scale, total = quantise_block(
                x[b * BLOCK : (b + 1) * BLOCK], adjacent, inputs.codes[place : place + 80], 64
            )
        else:
            inputs.codes[place : place + 16] = 0
            inputs.codes[place + 64 : place + 80] = 0
        inputs.scale[at] = scale * unit
        inputs.correction[at] = -offset * total
        inputs.sums[at] = scale * np.float32(total)


@kernel
def _quantise(x, x_row, adjacent, offset, unit, inputs):
    for p in range(len(x_row)):
        quantise_column(x[x_row[p]], p, adjacent, offset, unit, inputs)


@parallel_kernel
def _quantise_many(x, x_row, adjacent, offset, unit, inputs):
    for p in prange(len(x_row)):
        quantise_column(x[x_row[p]], np.int64(p), adjacent, offset, unit, inputs)


def quantise(x: np.ndarray, x_row: np.ndarray, kind: int) -> Inputs:
    """Rows x_row of x, float32 [.,I], as the columns that rows of this kind multiply."""
    P, groups = len(x_row), -(-x.shape[1] // (BLOCK * GROUP))
    n = (P + SPARE) * groups * GROUP
    inputs = empty_inputs(n, groups)
    for part in inputs[:4]:
        part[P * part.size // (P + SPARE) :] = 0
    run = _quantise if P < 8 else _quantise_many
    run(x, x_row, kind in ADJACENT, np.int32(CODE_OFFSET[kind]), np.float32(UNIT.get(kind, 1.0)), inputs)
    return inputs
