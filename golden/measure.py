"""Comparing one tap: error and noise of the whole tensor and of every position, and the worst element."""

from dataclasses import dataclass
from typing import Any

import numpy as np

ALLOWANCE = 4.0  # multiples of the noise that a clean backend may show; see docs/allowances.md
SMALLEST_NORM = 1e-100  # stands for that of a tensor of zeros; its square is still a float
ROW_SLACK = 4.0  # one position's error scatters more than the whole tensor's, so it may be that much larger


@dataclass(frozen=True)
class Comparison:
    """The local error of a tap in the units its report shows."""

    local_error: float  # ||got - expected|| / ||expected||
    noise: float  # the same for what the profile makes of the step
    ratio: float  # error in multiples of the noise: of the whole tensor, or of its worst position over ROW_SLACK
    worst: dict[str, Any]
    worst_position: int
    nonfinite: int

    @property
    def allowed(self) -> bool:
        """Whether the error is explained by the profile's noise."""
        return self.nonfinite == 0 and self.ratio <= ALLOWANCE


def compare(expected: np.ndarray, got: np.ndarray, noisy: np.ndarray, T_axis: int, unit_roundoff: float) -> Comparison:
    """Compare a backend's tap with the oracle's.

    `noisy` is the same step as the profile computes it. All three have the tap's shape; `unit_roundoff`
    keeps the noise of a step that happens to be exact (a copy, a table lookup) from being zero.
    """
    expected, got, noisy = (np.moveaxis(a.astype(np.float64), T_axis, 0) for a in (expected, got, noisy))
    finite = np.isfinite(got)
    nonfinite = int(got.size - np.count_nonzero(finite))
    difference = np.where(finite, got, expected) - expected
    scale = max(_norm(expected), SMALLEST_NORM)
    T = len(expected)
    floor_T = np.full(T, unit_roundoff / 4 * scale / np.sqrt(T))
    error_T, noise_T = _row_norms(difference), np.maximum(_row_norms(noisy - expected), floor_T)
    error, noise = _norm(error_T), _norm(noise_T)
    row_ratio_T = error_T / np.maximum(noise_T, noise / np.sqrt(T))
    ratio = max(error / noise, float(row_ratio_T.max()) / ROW_SLACK)
    index = np.unravel_index(np.argmax(np.where(finite, np.abs(difference), np.inf)), expected.shape)
    place = list(map(int, index))
    return Comparison(
        local_error=error / scale,
        noise=noise / scale,
        ratio=ratio,
        worst={
            "index": [*place[1 : T_axis + 1], place[0], *place[T_axis + 1 :]],
            "expected": float(expected[index]),
            "got": float(got[index]),
        },
        worst_position=int(index[0]) if nonfinite else int(row_ratio_T.argmax()),
        nonfinite=nonfinite,
    )


def relative(difference: np.ndarray, reference: np.ndarray) -> float:
    """||difference|| / ||reference||, over finite entries."""
    difference = np.where(np.isfinite(difference), difference, 0)
    return _norm(difference) / max(_norm(reference), SMALLEST_NORM)


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.ravel()))


def _row_norms(array: np.ndarray) -> np.ndarray:
    return np.linalg.norm(array.reshape(len(array), -1), axis=1)


def logit_view(expected_TV: np.ndarray, got_TV: np.ndarray) -> dict[str, float]:
    """How far two sets of logits [T,V] are apart as predictions, each averaged over positions.

    KL(expected || got) in nats; the share of positions with the same most likely token; the regret, the
    log-probability that the oracle loses when it takes the backend's most likely token instead of its own.
    """
    log_p, log_q = _log_softmax(expected_TV), _log_softmax(got_TV)
    best, theirs = log_p.argmax(axis=1), log_q.argmax(axis=1)
    rows = np.arange(len(log_p))
    return {
        "kl_nats": float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1))),
        "top1_agreement": float(np.mean(best == theirs)),
        "regret_nats": float(np.mean(log_p[rows, best] - log_p[rows, theirs])),
    }


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # an infinite logit leaves NaN, which the report shows as null
        shifted = logits_TV.astype(np.float64) - logits_TV.max(axis=1, keepdims=True)
        return shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True))
