"""ggml's block formats, as GGUF stores them: one record and one decode each; the K-quants are in kquants.py.

Layouts from ggml/src/ggml-common.h (`block_q4_0` ...), meaning from ggml-quants.c (`dequantize_row_*`).
Scales are little-endian float16. Arithmetic is float32 as in ggml; each product here is exact in
float32 (11-bit scale times at most 8-bit integer), so the sum in Q4_1 and Q5_1 is the only rounding there
is: neither the order of operations nor a fused multiply-add can change a bit.
"""

import numpy as np

from assay.reference.formats.blocks import BlockFormat, ScaledBlocks, float16_at, int8_at
from assay.reference.formats.elements import E2M1, E4M3, E8M0, Element
from assay.reference.formats.kquants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K
from assay.reference.formats.packing import split_half_nibbles, unpack_codes


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    """d (q - 8); bytes: d, 16 of nibbles."""
    return float16_at(blocks, 0) * (split_half_nibbles(blocks[..., 2:]).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    """d q + m; bytes: d, m, 16 of nibbles."""
    return float16_at(blocks, 0) * split_half_nibbles(blocks[..., 4:]).astype(np.float32) + float16_at(blocks, 2)


def _five_bits(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Codes whose fifth bits lie in 4 bytes, element j in bit j, and their lower ones in 16; float32 [..., 32]."""
    return (split_half_nibbles(low) | unpack_codes(high, 1) << 4).astype(np.float32)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    """d (q - 16); bytes: d, 4 of fifth bits, 16 of nibbles."""
    return float16_at(blocks, 0) * (_five_bits(blocks[..., 2:6], blocks[..., 6:]) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    """d q + m; bytes: d, m, 4 of fifth bits, 16 of nibbles."""
    return float16_at(blocks, 0) * _five_bits(blocks[..., 4:8], blocks[..., 8:]) + float16_at(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """d q; bytes: d, 32 signed."""
    return float16_at(blocks, 0) * int8_at(blocks, 2, 32)


def _q8_1(blocks: np.ndarray) -> np.ndarray:
    """d q; bytes: d, the sum d (q_0 + ... + q_31) for dot products, which decoding ignores, 32 signed."""
    return float16_at(blocks, 0) * int8_at(blocks, 4, 32)


def _q1_0(blocks: np.ndarray) -> np.ndarray:
    """d or -d; bytes: d, 16 of bits."""
    return float16_at(blocks, 0) * (2 * unpack_codes(blocks[..., 2:], 1).astype(np.float32) - 1)


def _q2_0(blocks: np.ndarray) -> np.ndarray:
    """d (q - 1); bytes: d, 16 of 2-bit codes, least significant first."""
    return float16_at(blocks, 0) * (unpack_codes(blocks[..., 2:], 2).astype(np.float32) - 1)


def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    """2^(e - 127) E2M1[q]; bytes: e, 16 of nibbles.

    What E2M1.to_float32(split_half_nibbles(...)) answers, but two bytes are looked up at once, in half the time.
    """
    pairs = np.ascontiguousarray(blocks[..., 1:]).view("<u2").astype(np.intp)
    values = np.concatenate((_E2M1_LOW.take(pairs), _E2M1_HIGH.take(pairs)), axis=-1).view(np.float32)
    values *= E8M0.to_float32(blocks[..., :1])
    return values


def _nibbles_of_two_bytes(element: Element, shift: int) -> np.ndarray:
    """What a nibble of each of two bytes means, both float32 in one complex64 [2^16]; the bytes as one `<u2` index."""
    both = np.arange(2**16)[:, None] >> np.array([shift, shift + 8]) & 0x0F
    return element.to_float32(both).view(np.complex64)[:, 0]


_E2M1_LOW, _E2M1_HIGH = _nibbles_of_two_bytes(E2M1, 0), _nibbles_of_two_bytes(E2M1, 4)


def _nvfp4(blocks: np.ndarray) -> np.ndarray:
    """E4M3[d] E2M1[q], 16 elements a scale; bytes: 4 scales without sign (bit 7 is ignored), 4 times 8 of nibbles."""
    scales = E4M3.to_float32(blocks[..., :4] & 0x7F)
    nibbles = blocks[..., 4:].reshape(*blocks.shape[:-1], 4, 8)
    values = scales[..., None] * E2M1.to_float32(split_half_nibbles(nibbles))
    return values.reshape(*blocks.shape[:-1], 64)


Q4_0 = BlockFormat("Q4_0", 32, 18, _q4_0)
Q4_1 = BlockFormat("Q4_1", 32, 20, _q4_1)
Q5_0 = BlockFormat("Q5_0", 32, 22, _q5_0)
Q5_1 = BlockFormat("Q5_1", 32, 24, _q5_1)
Q8_0 = BlockFormat("Q8_0", 32, 34, _q8_0)
Q8_1 = BlockFormat("Q8_1", 32, 36, _q8_1)
Q1_0 = BlockFormat("Q1_0", 128, 18, _q1_0)
Q2_0 = BlockFormat("Q2_0", 64, 18, _q2_0)
MXFP4_BLOCKS = BlockFormat("MXFP4", 32, 17, _mxfp4)
NVFP4_BLOCKS = BlockFormat("NVFP4", 64, 36, _nvfp4)
NVFP4_TWO_LEVEL = ScaledBlocks(NVFP4_BLOCKS)

# GGUF's tensor type numbers (ggml.h `enum ggml_type`)
# fmt: off
GGML_BLOCKS = {
    2: Q4_0, 3: Q4_1, 6: Q5_0, 7: Q5_1, 8: Q8_0, 9: Q8_1,
    10: Q2_K, 11: Q3_K, 12: Q4_K, 13: Q5_K, 14: Q6_K, 15: Q8_K,
    39: MXFP4_BLOCKS, 40: NVFP4_BLOCKS, 41: Q1_0, 42: Q2_0,
}
# fmt: on
