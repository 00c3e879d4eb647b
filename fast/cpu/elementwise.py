"""Exponential and sigmoid of float32 without branches or calls, so that loops over them become vector code."""

import numpy as np

from assay.fast.cpu.decode import float_of_bits
from assay.fast.cpu.jit import inlined

LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts; the first has so few bits that its products with exponents are exact (Cody & Waite 1980)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440054690583e-4)
ROUNDER = np.float32(1.5 * 2**23)  # added, it rounds to an integer, nearest even, in the lowest bits
ROUNDER_BITS = np.int32(0x4B400000)
# e^r = 1 + r + r^2 (...) for |r| <= ln(2) / 2: Chebyshev fit of the bracket in float64, rounded
COEFFICIENTS = tuple(
    np.float32(c) for c in (0.5, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4)
)
C0, C1, C2, C3, C4, C5 = COEFFICIENTS
LEAST, MOST = np.float32(-87.3), np.float32(88.7)  # e^x is subnormal below; above, it is infinite within 0.03


@inlined
def exp(x):
    """e^x within 2 units in the last place; 0 where it would be subnormal, infinity from 88.7 on."""
    shifted = x * LOG2_E + ROUNDER
    n = shifted - ROUNDER
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    bracket = ((((C5 * r + C4) * r + C3) * r + C2) * r + C1) * r + C0
    # 2^n in two factors: n up to 128 has no float of its own
    e = np.float32(shifted).view(np.int32) - ROUNDER_BITS
    half = e >> np.int32(1)
    low = float_of_bits(np.uint32((half + np.int32(127)) << np.int32(23)))
    high = float_of_bits(np.uint32((e - half + np.int32(127)) << np.int32(23)))
    y = (np.float32(1) + (r + r * r * bracket)) * low * high
    y = np.float32(0) if x < LEAST else y
    return np.float32(np.inf) if x > MOST else y


@inlined
def sigmoid(x):
    """1 / (1 + e^-x), by the side whose exponential cannot overflow."""
    e = exp(-abs(x))
    share = np.float32(1) / (np.float32(1) + e)
    return e * share if x < 0 else share
