"""Expert choices: sets, not numbers. A choice between nearly tied experts is legal and is followed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.golden.measure import ALLOWANCE, Comparison
from assay.reference.ops import top_k


@dataclass
class Followed:
    """Choices that were not the oracle's from the same inputs and yet legal: near ties, and their largest margin.

    `open_choices` are those that the backend did not show and that noise may have decided.
    """

    choices: int = 0
    largest_margin: float = 0.0
    open_choices: int = 0


def compare_ids(
    expected_TA: np.ndarray, got_TA: np.ndarray, logits_TN: np.ndarray, spread: float, followed: Followed | None = None
) -> Comparison:
    """Compare chosen experts as sets, given the router logits that the choice was made from.

    A wrong expert costs the margin by which its logit is below the one that it displaced. `spread` is the
    noise of those logits in logit units: 0 if they are the backend's own, when only exact ties are open.
    Legal choices that differ are noted in `followed`.
    """
    margins_T = np.array([_margin(e, g, row) for e, g, row in zip(expected_TA, got_TA, logits_TN, strict=True)])
    t = int(margins_T.argmax())
    wrong_T = margins_T >= 0
    margin = max(float(margins_T[t]), 0.0)
    legal_T = wrong_T & (margins_T <= ALLOWANCE * spread)
    if followed is not None and legal_T.any():
        followed.choices += int(legal_T.sum())
        followed.largest_margin = max(followed.largest_margin, float(margins_T[legal_T].max()))
    ratio = margin / spread if spread > 0 else float("inf") if margin > 0 else 0.0
    return Comparison(
        local_error=float(np.mean(wrong_T & (margins_T > ALLOWANCE * spread))),
        noise=spread,
        ratio=ratio,
        worst={"index": [t], "expected": expected_TA[t].tolist(), "got": got_TA[t].tolist()},
        worst_position=t,
        nonfinite=0,
    )


def _margin(expected_A: np.ndarray, got_A: np.ndarray, logits_N: np.ndarray) -> float:
    """Logit difference between the best expert left out and the worst one taken in; -1 if the sets agree."""
    if len(np.unique(got_A)) < len(got_A):
        return float("inf")  # an expert chosen twice
    left_out, taken_in = np.setdiff1d(expected_A, got_A), np.setdiff1d(got_A, expected_A)
    return float(logits_N[left_out].max() - logits_N[taken_in].min()) if len(left_out) else -1.0


def routing_view(
    golden: Mapping[str, np.ndarray], taps: Mapping[str, np.ndarray], followed: Followed | None = None
) -> dict[str, Any] | None:
    """End to end: how many (layer, token) choices differ from the golden's, and the largest margin among them.

    Beside them what the forced pass followed, where there was one.
    """
    names = [name for name in golden if name.endswith("expert_ids") and name in taps]
    if not names and (followed is None or not followed.open_choices):
        return None
    flips, choices, margins = 0, 0, [0.0]
    for name in names:
        ours, theirs = golden[name], np.asarray(taps[name]).reshape(golden[name].shape)
        differs_T = np.any(np.sort(ours, axis=1) != np.sort(theirs, axis=1), axis=1)
        flips, choices = flips + int(differs_T.sum()), choices + len(differs_T)
        logits = golden.get(name.replace("expert_ids", "router_logits"))
        if logits is not None and differs_T.any():
            A = ours.shape[1]
            ordered = np.sort(logits[differs_T], axis=1)[:, ::-1]
            margins.append(float(np.max(ordered[:, A - 1] - ordered[:, min(A, ordered.shape[1] - 1)])))
    view = {"flips": flips, "choices": choices, "largest_margin": max(margins)}
    if followed is not None:
        view |= {"followed": followed.choices, "largest_followed_margin": followed.largest_margin}
        view["open"] = followed.open_choices
    return view


def tied(logits_TN: np.ndarray, A: int, noise_TN: np.ndarray) -> np.ndarray:
    """Positions whose margin, between the last expert taken and the best left out, is within the allowance: bool [T].

    The logits' noise is the standard deviation that their median deviation has in a normal distribution: where a
    choice before them went otherwise they are far off, and no noise.
    """
    ordered_TN = np.sort(logits_TN, axis=1)[:, ::-1]
    spread = 1.4826 * float(np.median(np.abs(noise_TN)))
    return np.asarray(ordered_TN[:, A - 1] - ordered_TN[:, A] <= ALLOWANCE * spread)


def next_best(ids_TA: np.ndarray, logits_TN: np.ndarray, where_T: np.ndarray) -> np.ndarray:
    """The choices with the best expert left out in place of the last one taken, at some positions."""
    next_best_T = top_k(logits_TN, ids_TA.shape[1] + 1)[:, -1]
    ids_TA = ids_TA.copy()
    ids_TA[where_T, -1] = next_best_T[where_T]
    return ids_TA
