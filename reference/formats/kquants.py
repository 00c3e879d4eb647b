"""ggml's K-quants: super-blocks of 256 elements, whose sub-blocks have small integer scales under a float16.

Layouts from ggml/src/ggml-common.h (`block_q2_K` ...), meaning from ggml-quants.c (`dequantize_row_*_K`).
As there, d times the sub-block's integer comes first, then times q, then less the minimum. A float16 has
11 significant bits, sub-scales at most 7 and codes at most 5, so every product is exact in float32 and the
subtraction is the only rounding: neither the order of operations nor a fused multiply-add can change a bit.
Q8_K, which ggml uses for activations only, has a float32 scale and rounds its one product.
"""

import numpy as np

from assay.reference.formats.blocks import BlockFormat, float16_at, int8_at

TWO_BITS = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
ONE_BIT = np.arange(8, dtype=np.uint8)[:, None]
NIBBLES = np.array([[0], [4]], np.uint8)


def planes(packed: np.ndarray, run: int, shifts: np.ndarray) -> np.ndarray:
    """Codes that ggml lays out in planes: the lowest bits of `run` bytes, then their next ones, then the next run.

    uint8 [..., B] and shifts [P,1] -> uint8 [..., B/run*P*run], not yet masked.
    """
    runs = packed.reshape(*packed.shape[:-1], -1, 1, run)
    return (runs >> shifts).reshape(*packed.shape[:-1], -1)


def six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and eight 6-bit minima from 12 bytes, two of uint8 [..., 8] (`get_scale_min_k4`).

    The first four of each fill the lower six bits of bytes 0-3 and 4-7, whose upper two bits are those of the
    last four; the lower four bits of these share bytes 8-11, scale in the low nibble.
    """
    first, second, last = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate((first & 63, last & 15 | first >> 6 << 4), axis=-1)
    minima = np.concatenate((second & 63, last >> 4 | second >> 6 << 4), axis=-1)
    return scales, minima


def six_bit_scales(packed: np.ndarray) -> np.ndarray:
    """Q3_K's sixteen 6-bit scales from 12 bytes, uint8 [..., 16]: nibbles in the first 8, upper bits in the last 4."""
    low = planes(packed[..., :8], 8, NIBBLES) & 15
    high = planes(packed[..., 8:], 4, TWO_BITS) & 3
    return low | high << 4


def _scaled(d: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(d s) q with one scale a sub-block: [..., 1], [..., S], [..., 256] -> float32 [..., S, 256/S]."""
    subblocks = codes.astype(np.float32).reshape(*scales.shape, -1)
    return (d * scales.astype(np.float32))[..., None] * subblocks


def _minimum(dmin: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """dmin m, to subtract from every element of a sub-block: float32 [..., S, 1]."""
    return (dmin * minima.astype(np.float32))[..., None]


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    """d s q - dmin m, 16 elements a sub-block; bytes: 16 of (s low, m high nibble), 64 of codes, d, dmin."""
    codes = planes(blocks[..., 16:80], 32, TWO_BITS) & 3
    scales, minima = blocks[..., :16] & 15, blocks[..., :16] >> 4
    values = _scaled(float16_at(blocks, 80), scales, codes) - _minimum(float16_at(blocks, 82), minima)
    return values.reshape(*blocks.shape[:-1], 256)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    """d (s - 32) (q - 4), 16 elements a sub-block; bytes: 32 of third bits, 64 of lower two, 12 of scales, d."""
    third = planes(blocks[..., :32], 32, ONE_BIT) & 1
    codes = (planes(blocks[..., 32:96], 32, TWO_BITS) & 3 | third << 2).astype(np.float32) - 4
    scales = six_bit_scales(blocks[..., 96:108]).astype(np.float32) - 32
    return _scaled(float16_at(blocks, 108), scales, codes).reshape(*blocks.shape[:-1], 256)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """d s q - dmin m, 32 elements a sub-block; bytes: d, dmin, 12 of scales and minima, 128 of nibbles."""
    scales, minima = six_bit_pairs(blocks[..., 4:16])
    codes = planes(blocks[..., 16:], 32, NIBBLES) & 15
    values = _scaled(float16_at(blocks, 0), scales, codes) - _minimum(float16_at(blocks, 2), minima)
    return values.reshape(*blocks.shape[:-1], 256)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    """d s q - dmin m, 32 elements a sub-block; bytes: as Q4_K with 32 of fifth bits before the nibbles."""
    scales, minima = six_bit_pairs(blocks[..., 4:16])
    fifth = planes(blocks[..., 16:48], 32, ONE_BIT) & 1
    codes = planes(blocks[..., 48:], 32, NIBBLES) & 15 | fifth << 4
    values = _scaled(float16_at(blocks, 0), scales, codes) - _minimum(float16_at(blocks, 2), minima)
    return values.reshape(*blocks.shape[:-1], 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """d s (q - 32), 16 elements a sub-block; bytes: 128 of lower nibbles, 64 of upper two bits, 16 signed s, d."""
    low, high = planes(blocks[..., :128], 64, NIBBLES) & 15, planes(blocks[..., 128:192], 32, TWO_BITS) & 3
    codes = (low | high << 4).astype(np.float32) - 32
    return _scaled(float16_at(blocks, 208), int8_at(blocks, 192, 16), codes).reshape(*blocks.shape[:-1], 256)


def _q8_k(blocks: np.ndarray) -> np.ndarray:
    """d q, rounded; bytes: d as float32, 256 signed, 16 sums of 16 codes (int16), which decoding ignores."""
    return np.ascontiguousarray(blocks[..., :4]).view("<f4") * int8_at(blocks, 4, 256)


Q2_K = BlockFormat("Q2_K", 256, 84, _q2_k)
Q3_K = BlockFormat("Q3_K", 256, 110, _q3_k)
Q4_K = BlockFormat("Q4_K", 256, 144, _q4_k)
Q5_K = BlockFormat("Q5_K", 256, 176, _q5_k)
Q6_K = BlockFormat("Q6_K", 256, 210, _q6_k)
Q8_K = BlockFormat("Q8_K", 256, 292, _q8_k)
