"""The scale of a group from its largest magnitude: the rules in use, each a function to scale codes.

E8M0 rules answer uint8 codes [...] for `amax` float32 [...], clamped to 0..254; a group of zeros has code 0.
"""

from collections.abc import Callable

import numpy as np

from assay.reference.formats.elements import E4M3, Element
from assay.reference.formats.encode_elements import ties_to_even

ScaleRule = Callable[[np.ndarray, Element], np.ndarray]


def _e8m0(exponent: np.ndarray, amax: np.ndarray) -> np.ndarray:
    return np.where(amax > 0, np.clip(exponent, -127, 127) + 127, 0).astype(np.uint8)


def _floor_log2(x: np.ndarray) -> np.ndarray:
    return np.frexp(x)[1] - 1


def _ceil_log2(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    return np.where(mantissa == 0.5, exponent - 1, exponent)


def _quotient(amax: np.ndarray, element: Element) -> np.ndarray:
    """amax / largest in float32, and where that underflows the least float32, since a logarithm follows."""
    return np.maximum(amax.astype(np.float32) / element.largest, np.float32(2.0**-149))


def floor(amax: np.ndarray, element: Element) -> np.ndarray:
    """2^(floor(log2 amax) - emax), OCP MX v1.0, section 6.3; the largest elements may saturate."""
    return _e8m0(_floor_log2(amax) - element.largest_exponent, amax)


def ceil(amax: np.ndarray, element: Element) -> np.ndarray:
    """2^(ceil(log2 amax) - emax); nothing saturates (torchao's CEIL)."""
    return _e8m0(_ceil_log2(amax) - element.largest_exponent, amax)


def even(amax: np.ndarray, element: Element) -> np.ndarray:
    """As `floor`, after rounding amax to the element's mantissa, ties up (torchao's EVEN)."""
    mantissa, exponent = np.frexp(amax)
    rounds_up = mantissa >= 1 - 2.0 ** -(element.mantissa_bits + 2)
    return _e8m0(exponent - 1 + rounds_up - element.largest_exponent, amax)


def rceil(amax: np.ndarray, element: Element) -> np.ndarray:
    """The smallest power of two that is at least amax / largest, the quotient in float32 (torchao's RCEIL, MLX)."""
    return _e8m0(_ceil_log2(_quotient(amax, element)), amax)


def nearest(amax: np.ndarray, element: Element) -> np.ndarray:
    """2^round(log2(amax / largest)), MLX's rule up to 0.32.2; elements up to sqrt(2) times too large saturate."""
    return _e8m0(np.rint(np.log2(_quotient(amax, element).astype(np.float64))).astype(int), amax)


SCALE_RULES = {rule.__name__: rule for rule in (floor, ceil, even, rceil, nearest)}


def e4m3(amax: np.ndarray, element: Element) -> np.ndarray:
    """amax / largest as E4M3, ties to even, at most 448: NVFP4's block scale as NVIDIA and MLX take it."""
    return ties_to_even(amax.astype(np.float32) / element.largest, E4M3)


def float16(amax: np.ndarray, element: Element) -> np.ndarray:
    """amax / largest as float16, ties to even; ValueError above 65504."""
    return to_half(amax.astype(np.float32) / element.largest)


def to_half(scale: np.ndarray) -> np.ndarray:
    """float32 [...] as float16, ties to even; ValueError where it is too large, rather than an infinite scale."""
    with np.errstate(over="ignore"):
        half = scale.astype("<f2")
    if np.isinf(half).any():
        raise ValueError(f"a scale of {np.abs(scale).max():.6g} exceeds float16's 65504; choose another encoding")
    return half
