"""Leaf kernels from encoded bytes to float32, one an encoding; twins of `assay.reference.formats`.

Each decodes one row, bit for bit as its twin does: products and sums are rounded separately.
"""

from functools import cache

import numpy as np

from assay.fast.cpu.jit import address_of, kernel, leaf, piece
from assay.fast.cpu.phases import call_at
from assay.fast.cpu.rows import (
    AFFINE4,
    BF16,
    F16,
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
    encoded_rows,
)
from assay.reference import formats
from assay.reference.weights import Tensor

ONE_HALF = np.uint32(0x3F000000)


@leaf
def float_of_bits(code):
    """The float32 with these 32 bits."""
    return np.uint32(code).view(np.float32)


@leaf
def half_to_float(code):
    """The float32 of a float16's 16 bits; twin of `floats.F16`.

    The exponent and mantissa, moved to where a float32 has them, are the number times 2^-112: the product
    with 2^112 is exact for normal and subnormal halves alike.
    """
    sign = (code & np.uint32(0x8000)) << np.uint32(16)
    magnitude = (code & np.uint32(0x7FFF)) << np.uint32(13)
    if magnitude >= np.uint32(0x0F800000):  # infinity and NaN keep their mantissa
        return float_of_bits(sign | magnitude | np.uint32(0x7F800000))
    return float_of_bits(sign | magnitude) * np.float32(2.0**112)


@leaf
def float_to_half(x):
    """The 16 bits of x as a float16, to nearest even, infinity from 65520 on; twin of NumPy's `astype`."""
    bits = np.float32(x).view(np.uint32)
    sign, magnitude = bits >> np.uint32(16) & np.uint32(0x8000), bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint32(0x7E00))  # NaN
    if magnitude >= np.uint32(0x477FF000):
        return np.uint16(sign | np.uint32(0x7C00))
    if magnitude < np.uint32(0x38800000):  # beside 0.5 the last bit of a float32 counts 2^-24, as a subnormal's here
        return np.uint16(sign | np.float32(float_of_bits(magnitude) + np.float32(0.5)).view(np.uint32) - ONE_HALF)
    odd = magnitude >> np.uint32(13) & np.uint32(1)
    return np.uint16(sign | (magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13))


@leaf
def half_at(block, offset):
    """The little-endian float16 at a byte offset; twin of `ggml._float16`."""
    return half_to_float(np.uint32(block[offset]) | np.uint32(block[offset + 1]) << np.uint32(8))


@leaf
def float_at(data, offset):
    """The little-endian float32 at a byte offset."""
    bits = np.uint32(data[offset]) | np.uint32(data[offset + 1]) << np.uint32(8)
    return float_of_bits(
        bits | np.uint32(data[offset + 2]) << np.uint32(16) | np.uint32(data[offset + 3]) << np.uint32(24)
    )


@leaf
def power_of_two(code):
    """2^(code - 127), NaN for 255; twin of `mx.e8m0_to_float32`."""
    if code == 255:
        return np.float32(np.nan)
    if code == 0:
        return np.float32(2.0**-127)  # subnormal: there is no exponent field for it
    return float_of_bits(np.uint32(code) << np.uint32(23))


@leaf
def e2m1(code):
    """The float32 of a 4-bit code; twin of `elements.E2M1`. Arithmetic, which LLVM vectorises, unlike a table."""
    magnitude = np.uint32(code & 7)
    bits = (magnitude << np.uint32(22)) + ONE_HALF if magnitude > 1 else magnitude * ONE_HALF
    return float_of_bits(np.uint32(bits) | np.uint32(code & 8) << np.uint32(28))


@piece
def decode_float32(codes, out):
    """Twin of `floats.F32`. A loop: for an assignment to a slice Numba would compile two seconds of error text."""
    values = codes.view(np.float32)
    for i in range(len(out)):
        out[i] = values[i]


@piece
def decode_float16(codes, out):
    """Twin of `floats.F16`."""
    halves = codes.view(np.uint16)
    for i in range(len(out)):
        out[i] = half_to_float(np.uint32(halves[i]))


@piece
def decode_bfloat16(codes, out):
    """Twin of `floats.BF16`: the upper half of a float32."""
    uppers, bits = codes.view(np.uint16), out.view(np.uint32)
    for i in range(len(out)):
        bits[i] = np.uint32(uppers[i]) << np.uint32(16)


@piece
def decode_q8_0(codes, out):
    """Twin of `ggml.Q8_0`: d q."""
    n = len(out) // 32
    blocks, y = codes.reshape(n, 34), out.reshape(n, 32)
    integers = blocks.view(np.int8)
    for b in range(n):
        d = half_at(blocks[b], 0)
        for j in range(32):
            y[b, j] = d * np.float32(integers[b, 2 + j])


@piece
def decode_q4_0(codes, out):
    """Twin of `ggml.Q4_0`: d (q - 8), low nibbles first, then the high ones."""
    n = len(out) // 32
    blocks, y = codes.reshape(n, 18), out.reshape(n, 32)
    for b in range(n):
        d = half_at(blocks[b], 0)
        for j in range(16):
            y[b, j] = d * (np.float32(blocks[b, 2 + j] & 15) - np.float32(8))
            y[b, j + 16] = d * (np.float32(blocks[b, 2 + j] >> 4) - np.float32(8))


@piece
def decode_q4_1(codes, out):
    """Twin of `ggml.Q4_1`: d q + m, low nibbles first, then the high ones."""
    n = len(out) // 32
    blocks, y = codes.reshape(n, 20), out.reshape(n, 32)
    for b in range(n):
        d, m = half_at(blocks[b], 0), half_at(blocks[b], 2)
        for j in range(16):
            y[b, j] = d * np.float32(blocks[b, 4 + j] & 15) + m
            y[b, j + 16] = d * np.float32(blocks[b, 4 + j] >> 4) + m


@piece
def decode_q5(codes, minimum, out):
    """Twin of `ggml.Q5_0`, d (q - 16), and with a `minimum` of `ggml.Q5_1`, d q + m; fifth bits precede the nibbles."""
    n = len(out) // 32
    blocks, y, first = codes.reshape(n, len(codes) // n), out.reshape(n, 32), 8 if minimum else 6
    for b in range(n):
        block = blocks[b]
        d, m = half_at(block, 0), half_at(block, 2) if minimum else np.float32(0)
        for j in range(32):
            fifth = block[first - 4 + j // 8] >> j % 8 & 1
            code = block[first + j % 16] >> 4 * (j // 16) & 15 | fifth << 4
            y[b, j] = d * np.float32(code) + m if minimum else d * (np.float32(code) - np.float32(16))


@piece
def six_bit_pair(block, s):
    """Scale and minimum number s of eight, from the 12 bytes after d and dmin; twin of `kquants.six_bit_pairs`."""
    if s < 4:
        return np.float32(block[4 + s] & 63), np.float32(block[8 + s] & 63)
    last = block[8 + s]
    return np.float32(last & 15 | block[s] >> 6 << 4), np.float32(last >> 4 | block[4 + s] >> 6 << 4)


@piece
def decode_q4_k_or_q5_k(codes, fifth, out):
    """Twin of `kquants.Q4_K`, and with a `fifth` bit to each code of `kquants.Q5_K`: d s q - dmin m."""
    n = len(out) // 256
    blocks, y, first = codes.reshape(n, len(codes) // n), out.reshape(n, 256), 48 if fifth else 16
    for b in range(n):
        block = blocks[b]
        d, dmin = half_at(block, 0), half_at(block, 2)
        for s in range(8):
            scale, minimum = six_bit_pair(block, s)
            scale, minimum = d * scale, dmin * minimum
            for i in range(32):
                code = block[first + 32 * (s // 2) + i] >> 4 * (s % 2) & 15
                if fifth:
                    code |= (block[16 + i] >> s & 1) << 4
                y[b, 32 * s + i] = scale * np.float32(code) - minimum


@piece
def decode_q6_k(codes, out):
    """Twin of `kquants.Q6_K`: d s (q - 32), 16 elements to a scale."""
    n = len(out) // 256
    blocks, y = codes.reshape(n, 210), out.reshape(n, 256)
    scales = blocks.view(np.int8)
    for b in range(n):
        block, d = blocks[b], half_at(blocks[b], 208)
        for run in range(8):  # of 32 elements, four to each half of the block
            half, bits = run // 4, run % 4
            for i in range(32):
                low = block[64 * half + 32 * (bits % 2) + i] >> 4 * (bits // 2) & 15
                high = block[128 + 32 * half + i] >> 2 * bits & 3
                scale = d * np.float32(scales[b, 192 + 2 * run + i // 16])
                y[b, 32 * run + i] = scale * (np.float32(low | high << 4) - np.float32(32))


@piece
def decode_mxfp4_split(codes, out):
    """Twin of `ggml.MXFP4_BLOCKS`: the scale's byte, then low nibbles first, then the high ones."""
    n = len(out) // 32
    blocks, y = codes.reshape(n, 17), out.reshape(n, 32)
    for b in range(n):
        scale = power_of_two(blocks[b, 0])
        for j in range(16):
            y[b, j] = scale * e2m1(blocks[b, 1 + j] & 15)
            y[b, j + 16] = scale * e2m1(blocks[b, 1 + j] >> 4)


@piece
def decode_mxfp4_adjacent(codes, scales, out):
    """Twin of `mx.MXFP4`: elements 2j and 2j + 1 in byte j, low nibble first."""
    n = len(scales)
    blocks, y = codes.reshape(n, 16), out.reshape(n, 32)
    for b in range(n):
        scale = power_of_two(scales[b])
        for j in range(16):
            y[b, 2 * j] = scale * e2m1(blocks[b, j] & 15)
            y[b, 2 * j + 1] = scale * e2m1(blocks[b, j] >> 4)


@piece
def decode_affine4(codes, scales, biases, out):
    """Twin of `mlx.AffineGroups` with 4 bits: s q + b, low nibble first; scales and biases are float32."""
    n = len(scales)
    half = len(codes) // n
    groups, y = codes.reshape(n, half), out.reshape(n, 2 * half)
    for g in range(n):
        s, b = scales[g], biases[g]
        for j in range(half):
            y[g, 2 * j] = s * np.float32(groups[g, j] & 15) + b
            y[g, 2 * j + 1] = s * np.float32(groups[g, j] >> 4) + b


@piece
def decode_affine8(codes, scales, biases, out):
    """Twin of `mlx.AffineGroups` with 8 bits: s q + b; scales and biases are float32."""
    n = len(scales)
    size = len(codes) // n
    groups, y = codes.reshape(n, size), out.reshape(n, size)
    for g in range(n):
        s, b = scales[g], biases[g]
        for i in range(size):
            y[g, i] = s * np.float32(groups[g, i]) + b


@piece
def decode_floats(kind, codes, out):
    """Plain elements: F32, F16 or BF16."""
    if kind == F32:
        decode_float32(codes, out)
    elif kind == F16:
        decode_float16(codes, out)
    else:
        decode_bfloat16(codes, out)


@piece
def decode_affine(rows, codes, scales, biases, out):
    """Widen the scales and biases of a row of MLX's affine groups, and decode it."""
    s, b = np.empty(rows.groups, np.float32), np.empty(rows.groups, np.float32)
    decode_floats(rows.side_kind, scales, s)
    decode_floats(rows.side_kind, biases, b)
    if rows.kind == AFFINE4:
        decode_affine4(codes, s, b, out)
    else:
        decode_affine8(codes, s, b, out)


@piece
def row_bytes(data, stride, length, r):
    """The bytes of row r of one part."""
    return data[r * stride : r * stride + length]


@kernel
def decode_row(rows, r, out):
    """Row r in float32, whatever its encoding."""
    codes = row_bytes(rows.codes, rows.codes_stride, rows.codes_bytes, r)
    scales = row_bytes(rows.scales, rows.scales_stride, rows.scales_bytes, r)
    biases = row_bytes(rows.biases, rows.biases_stride, rows.biases_bytes, r)
    if rows.kind in (F32, F16, BF16):
        decode_floats(rows.kind, codes, out)
    elif rows.kind == Q8_0:
        decode_q8_0(codes, out)
    elif rows.kind == Q4_0:
        decode_q4_0(codes, out)
    elif rows.kind == Q4_1:
        decode_q4_1(codes, out)
    elif rows.kind in (Q5_0, Q5_1):
        decode_q5(codes, rows.kind == Q5_1, out)
    elif rows.kind in (Q4_K, Q5_K):
        decode_q4_k_or_q5_k(codes, rows.kind == Q5_K, out)
    elif rows.kind == Q6_K:
        decode_q6_k(codes, out)
    elif rows.kind == MXFP4_SPLIT:
        decode_mxfp4_split(codes, out)
    elif rows.kind == MXFP4_ADJACENT:
        decode_mxfp4_adjacent(codes, scales, out)
    else:
        decode_affine(rows, codes, scales, biases, out)


@cache
def decode_row_at() -> int:
    """Where the machine code of `decode_row` lies: `encoded_rows` answers the same types whatever the encoding."""
    rows = encoded_rows(Tensor("none", (1, 1), formats.F32, {"values": np.zeros((1, 1), np.float32)}))
    return address_of(decode_row, (rows, 0, np.zeros(1, np.float32)))


@kernel
def _decode_rows(decode_at, rows, ids, out):
    for i in range(len(ids)):
        call_at(decode_at, (rows, ids[i], out[i]))


def decode_rows(rows: Rows, ids: np.ndarray) -> np.ndarray:
    """The rows with these ids, int64 [T], as float32 [T,I]; ids are not checked."""
    out = np.empty((len(ids), rows.columns), np.float32)
    _decode_rows(decode_row_at(), rows, ids, out)
    return out
