"""What an unexplained error looks like: where it is, and whether a plain factor would remove it."""

from typing import Any

import numpy as np

from assay.golden.measure import relative


def describe(expected: np.ndarray, got: np.ndarray, noisy: np.ndarray, axes: str) -> dict[str, Any]:
    """Positions and heads (or other second axis) whose error is over the noise, and the best-fitting factor."""
    expected, got, noisy = (a.astype(np.float64) for a in (expected, got, noisy))
    difference = np.where(np.isfinite(got), got, 0) - expected
    level = 10 * float(np.sqrt(np.mean((noisy - expected) ** 2))) + np.finfo(np.float64).tiny
    result: dict[str, Any] = {"axes": list(axes)}
    for axis, letter in enumerate(axes[:2] if len(axes) == 3 else axes[:1]):
        others = tuple(i for i in range(expected.ndim) if i != axis)
        over = np.flatnonzero(np.sqrt(np.mean(difference**2, axis=others)) > level)
        first = int(over[0]) if len(over) else None
        result[letter] = {"affected": len(over), "of": expected.shape[axis], "first": first}
    energy = float(np.sum(expected * expected))
    factor = float(np.sum(expected * np.where(np.isfinite(got), got, 0))) / energy if energy else 1.0
    result["best_factor"] = factor
    result["residual_after_factor"] = relative(difference + expected - factor * expected, expected)
    result["nonfinite"] = int(np.size(got) - np.count_nonzero(np.isfinite(got)))
    return result
