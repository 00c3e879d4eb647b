"""Expert choices under the forced pass: legal flips are followed, illegal ones caught where they are made."""

from dataclasses import replace

import numpy as np
import pytest

from tests.checkpoint_files import opened, with_weight
from tests.golden.faults import GPT_OSS, diverging, golden_of, report_of, taps_with


def near_tie():
    """The checkpoint with expert 1's router row as expert 0's, its bias lower by 1e-7: noise may choose either."""
    router = "model.layers.1.mlp.router"

    def equal_rows(w):
        w[1] = w[0]
        return w

    def close_bias(b):
        b[1] = b[0] - np.float32(1e-7)
        return b

    checkpoint = with_weight(opened(GPT_OSS), f"{router}.weight", equal_rows)
    checkpoint = with_weight(checkpoint, f"{router}.bias", close_bias)
    provenance = replace(golden_of().provenance, weights_sha256=checkpoint.weights_sha256)
    return checkpoint, replace(golden_of(), provenance=provenance, taps=taps_with({}, checkpoint))


def swapped_at(positions: np.ndarray, experts: tuple[int, int] = (0, 1)):
    """A router that prefers the second expert of a pair, at some positions, by a hair."""

    def fault(logits_TN: np.ndarray) -> np.ndarray:
        logits_TN = logits_TN.copy()
        logits_TN[positions, experts[1]] = logits_TN[positions, experts[0]] + 1e-7
        return logits_TN

    return fault


def test_a_legal_flip_is_followed():
    """Nearly tied experts chosen the other way: everything later differs, and nothing is wrong."""
    checkpoint, golden = near_tie()
    ids, name = golden.taps["layers.1.expert_ids"], "layers.1.router_logits"
    open_choice = np.flatnonzero((ids == 0).any(axis=1) & ~(ids == 1).any(axis=1))  # 0 was chosen, 1 just not
    assert len(open_choice) > 3
    taps = taps_with({name: swapped_at(open_choice)}, checkpoint, np.float32)
    report = report_of(taps, "float32", golden, checkpoint)
    assert report.verdict == "match"
    assert report.routing["flips"] >= len(open_choice)
    assert next(r for r in report.taps if r.tap == "logits").inherited_error > 1e-3
    del taps[name]  # without the backend's own logits, the noise of ours decides
    assert report_of(taps, "float32", golden, checkpoint).verdict == "match"


def test_a_flip_by_more_than_the_noise_is_the_router_s_fault():
    checkpoint, golden = near_tie()
    fault = lambda logits: logits + 0.05 * np.eye(4)[1]  # noqa: E731
    taps = taps_with({"layers.1.router_logits": fault}, checkpoint, np.float32)
    assert diverging(report_of(taps, "float32", golden, checkpoint)) == ["layers.1.router_logits"]
    del taps["layers.1.router_logits"]
    # the choice between 0 and 1 was open; that their weights follow from other logits was not
    assert diverging(report_of(taps, "float32", golden, checkpoint)) == ["layers.1.expert_weights"]


def least_likely(ids_TA: np.ndarray) -> np.ndarray:
    """Position 5 takes an expert that it should not: the lowest id that is not among the chosen."""
    ids_TA = ids_TA.copy()
    ids_TA[5, 1] = min(set(range(4)) - set(ids_TA[5]))
    return ids_TA


@pytest.mark.parametrize("with_logits", [True, False])
def test_an_illegal_choice_is_caught_at_the_choice(with_logits):
    taps = taps_with({"layers.1.expert_ids": least_likely})
    if not with_logits:
        del taps["layers.1.router_logits"]
    report = report_of(taps)
    assert diverging(report) == ["layers.1.expert_ids"]
    assert report.first_divergence.worst["index"] == [5]
    assert report.routing["flips"] >= 1


def test_an_expert_chosen_twice_is_caught():
    def twice(ids_TA):
        ids_TA = ids_TA.copy()
        ids_TA[9, 1] = ids_TA[9, 0]
        return ids_TA

    report = report_of(taps_with({"layers.0.expert_ids": twice}))
    assert diverging(report) == ["layers.0.expert_ids"]
    assert report.first_divergence.worst["index"] == [9]


def test_the_order_of_the_chosen_experts_is_free():
    """Rows of the experts follow the backend's own order."""
    taps = taps_with({"layers.1.expert_ids": lambda ids: ids[:, ::-1]})
    assert diverging(report_of(taps)) == []
