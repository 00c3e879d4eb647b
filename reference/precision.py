"""Roundings that a backend makes by design, in plain NumPy: what ggml's CPU path does to the inputs of a product."""

import numpy as np

BLOCK = 32
SUPERBLOCK = 256


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


def round_q8_K(x: np.ndarray) -> np.ndarray:
    """x [..., I] as ggml's CPU path hands it to a K-quantised product: int8 times a float32 scale, by blocks of 256.

    The integers are x (-127 / m), to nearest even, for the first element m of largest magnitude; the scale is one
    over that factor. A block that holds NaN or infinity becomes NaN, one whose factor overflows 0; the dtype stays.
    From ggml-quants.c `quantize_row_q8_K_ref`.
    """
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, SUPERBLOCK)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)  # the first NaN, if there is one
    extreme = np.take_along_axis(blocks, at, axis=-1)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        factor = np.float32(-127) / extreme
        rounded = np.rint(blocks * factor) * (np.float32(1) / factor)
        rounded = np.where(np.isinf(factor), np.float32(0), rounded)  # of zeros, or of subnormals
        rounded = np.where(np.isfinite(extreme), rounded, np.float32(np.nan))
    return rounded.reshape(x.shape).astype(x.dtype)
