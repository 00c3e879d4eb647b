"""Roundings of float32 to what a backend stores or multiplies: fewer mantissa bits, float16."""

import numpy as np


def round_mantissa(array: np.ndarray, bits: int) -> np.ndarray:
    """float32 rounded to nearest even with `bits` explicit mantissa bits (exponent range kept); NaN stays."""
    drop = 23 - bits
    code = array.view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1)
    odd = (code >> np.uint32(drop)) & np.uint32(1)
    rounded = ((code + half + odd) >> np.uint32(drop) << np.uint32(drop)).view(np.float32)
    return np.where(np.isfinite(array), rounded, array)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """x rounded to bfloat16; the dtype stays."""
    return round_mantissa(x.astype(np.float32), 7).astype(x.dtype)


def to_float16(x: np.ndarray) -> np.ndarray:
    """x rounded to float16, its range included; the dtype stays."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(x.dtype)
