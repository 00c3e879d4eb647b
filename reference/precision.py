"""Roundings that a backend makes by design, in plain NumPy: what the q8 profile does to the inputs of a product."""

import numpy as np

BLOCK = 32


def round_q8(x: np.ndarray) -> np.ndarray:
    """x [..., I] as ggml's CPU path hands it to a quantised product: int8 times a float16 scale, by blocks of 32.

    The scale is max|x| / 127; the integers x 127 / max|x|, to nearest even, from the scale before its rounding.
    A block that holds NaN or infinity becomes NaN; the dtype stays. From ggml `quantize_row_q8_0`, x86.
    """
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, BLOCK)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scale = (largest / np.float32(127)).astype(np.float16).astype(np.float32)
        factor = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
        rounded = np.rint(blocks * factor) * np.where(np.isfinite(largest), scale, np.float32(np.nan))
        rounded = np.where(scale == 0, np.float32(0), rounded)  # the factor may have overflowed
    return rounded.reshape(x.shape).astype(x.dtype)
