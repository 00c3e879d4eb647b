"""float32 values to the codes of an element format, saturating: the two ways that ties are broken in practice.

The same values under another rule give other codes, so re-quantised weights are not portable between engines;
only bytes that were shipped are. Hence the rounding is always named.
"""

from collections.abc import Callable

import numpy as np

from assay.reference.formats.elements import Element

Rounding = Callable[[np.ndarray, Element], np.ndarray]


def _midpoints(element: Element) -> np.ndarray:
    """Half-way values between neighbouring magnitudes, exact in float64."""
    return (element.magnitudes[1:] + element.magnitudes[:-1]) / 2


def ties_to_even(values: np.ndarray, element: Element) -> np.ndarray:
    """Nearest code, ties to the even one; -0 stays -0: uint8 [...]. OCP MX v1.0's default, torch, MLX on a GPU."""
    magnitudes = np.abs(values)
    lower = np.searchsorted(_midpoints(element), magnitudes, side="left")
    upper = np.searchsorted(_midpoints(element), magnitudes, side="right")
    return element.with_sign(np.where(lower % 2 == 0, lower, upper), np.signbit(values))


def ties_to_zero(values: np.ndarray, element: Element) -> np.ndarray:
    """Nearest code, ties to the smaller magnitude, zero without sign: uint8 [...].

    What an argmin over the absolute errors of a table of values finds: ggml's FP4, MLX's FP4 on a CPU.
    """
    codes = np.searchsorted(_midpoints(element), np.abs(values), side="left")
    return element.with_sign(codes, (values < 0) & (codes > 0))
