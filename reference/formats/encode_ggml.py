"""ggml's reference quantisers (ggml-quants.c `quantize_row_*_ref`), step by step in float32 as there.

Where C's behaviour is undefined these differ on purpose: see docs/encodings.md, "Encoders' exceptions".
"""

from collections.abc import Callable

import numpy as np

from assay.reference.formats.elements import E2M1, E4M3, E8M0
from assay.reference.formats.encode_elements import ties_to_zero
from assay.reference.formats.encode_mx import encode_group, split_groups
from assay.reference.formats.encode_scales import to_half
from assay.reference.formats.packing import pack_codes, pack_split_half


def _bytes(*fields: np.ndarray) -> np.ndarray:
    """Fields [..., n, any] one behind the other as bytes: uint8 [..., n, nbytes]."""
    return np.concatenate([np.ascontiguousarray(field).view(np.uint8) for field in fields], axis=-1)


def _inverse(d: np.ndarray) -> np.ndarray:
    """1/d, and 0 where that is infinite (C then converts infinities and NaN to integers, which is undefined)."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _first(groups: np.ndarray, argument: Callable[..., np.ndarray]) -> np.ndarray:
    """The element of each group that argmin or argmax finds, [..., 1]: of 0 and -0 the first, as C's loops do."""
    return np.take_along_axis(groups, argument(axis=-1, keepdims=True), axis=-1)


def _symmetric(values: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale d [..., n, 1] that gives the value of largest magnitude the code 0, and codes of x/d + levels/2."""
    groups = split_groups(values, 32)
    extreme = _first(groups, np.abs(groups).argmax)
    d = (extreme + np.float32(0)) / np.float32(-levels // 2)  # of zeros, whatever their signs, C makes d = -0
    codes = groups * _inverse(d) + np.float32(levels / 2 + 0.5)  # the cast to integers below truncates
    return d, np.minimum(codes, levels - 1).astype(np.uint8)


def _between(values: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale d and minimum m [..., n, 1], and codes of (x - m)/d."""
    groups = split_groups(values, 32)
    minimum, maximum = _first(groups, groups.argmin), _first(groups, groups.argmax)
    with np.errstate(over="ignore"):
        d = (maximum - minimum) / np.float32(levels - 1)
    codes = (groups - minimum) * _inverse(d) + np.float32(0.5)
    return d, minimum, np.minimum(codes, levels - 1).astype(np.uint8)


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    return pack_codes(codes >> 4, 1)


def encode_q4_0(values: np.ndarray) -> np.ndarray:
    """Q4_0 blocks, uint8 [..., n, 18], of values [..., 32n]; this and all below raise ValueError as `split_groups`."""
    d, codes = _symmetric(values, 16)
    return _bytes(to_half(d), pack_split_half(codes))


def encode_q4_1(values: np.ndarray) -> np.ndarray:
    """Q4_1 blocks, uint8 [..., n, 20], of values [..., 32n]."""
    d, minimum, codes = _between(values, 16)
    return _bytes(to_half(d), to_half(minimum), pack_split_half(codes))


def encode_q5_0(values: np.ndarray) -> np.ndarray:
    """Q5_0 blocks, uint8 [..., n, 22], of values [..., 32n]."""
    d, codes = _symmetric(values, 32)
    return _bytes(to_half(d), _fifth_bits(codes), pack_split_half(codes & 15))


def encode_q5_1(values: np.ndarray) -> np.ndarray:
    """Q5_1 blocks, uint8 [..., n, 24], of values [..., 32n]."""
    d, minimum, codes = _between(values, 32)
    return _bytes(to_half(d), to_half(minimum), _fifth_bits(codes), pack_split_half(codes & 15))


def encode_q8_0(values: np.ndarray) -> np.ndarray:
    """Q8_0 blocks, uint8 [..., n, 34], of values [..., 32n]; codes round halves away from zero."""
    groups = split_groups(values, 32)
    d = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = groups * _inverse(d)
    # adding 0.5 in float64: in float32 the sum itself would round the value below 0.5 up
    codes = np.trunc(scaled + np.copysign(0.5, scaled.astype(np.float64)))
    return _bytes(to_half(d), codes.astype(np.int8))


def encode_mxfp4(values: np.ndarray) -> np.ndarray:
    """MXFP4 blocks, uint8 [..., n, 17], of values [..., 32n]: `floor` scale, elements nearest by absolute error.

    floor(log2 amax) is taken of a logarithm rounded to float32, as in C: just below a large power of two it
    answers that power's exponent.
    """
    groups = split_groups(values, 32)
    amax = np.abs(groups).max(axis=-1)
    logarithm = np.log2(np.where(amax > 0, amax, 1).astype(np.float64)).astype(np.float32)
    exponent = np.floor(logarithm).astype(int) - E2M1.largest_exponent
    scales = np.where(amax > 0, np.maximum(exponent, -127) + 127, 0).astype(np.uint8)
    codes = encode_group(groups.astype(np.float64), scales, E8M0, E2M1, ties_to_zero)
    return _bytes(scales[..., None], pack_split_half(codes))


def e4m3_as_ggml(x: np.ndarray) -> np.ndarray:
    """Non-negative float32 [...] to E4M3 codes as `ggml_fp32_to_ue4m3` does, uint8 [...].

    Halves go up; what is below 2^-6 stays subnormal, at most 7; from 248 on everything becomes 448.
    """
    mantissa, exponent = np.frexp(x.astype(np.float64))
    subnormal = np.minimum(np.floor(x * np.float64(512) + 0.5), 7)
    eighths = np.floor(mantissa * 16 + 0.5)  # 8 to 16 of the power of two below x
    normal = (exponent - 1 + 7) * 8 + eighths - 8
    return np.where(x < 2.0**-6, subnormal, np.where(normal < 15 * 8, normal, 0x7E)).astype(np.uint8)


def encode_nvfp4(values: np.ndarray) -> np.ndarray:
    """NVFP4 blocks, uint8 [..., n, 36], of values [..., 64n]: 4 scales of amax/6, then 4 times 16 elements."""
    groups = split_groups(values, 64).reshape(*values.shape[:-1], -1, 4, 16)
    scales = e4m3_as_ggml(np.abs(groups).max(axis=-1) / np.float32(6))
    codes = encode_group(groups.astype(np.float64), scales, E4M3, E2M1, ties_to_zero)
    nibbles = pack_split_half(codes)
    return _bytes(scales, nibbles.reshape(*nibbles.shape[:-2], 32))


GGML_ENCODERS = {
    "Q4_0": encode_q4_0,
    "Q4_1": encode_q4_1,
    "Q5_0": encode_q5_0,
    "Q5_1": encode_q5_1,
    "Q8_0": encode_q8_0,
    "MXFP4": encode_mxfp4,
    "NVFP4": encode_nvfp4,
}
