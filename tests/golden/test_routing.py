"""Expert choices compared as sets, against logits written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay.golden.measure import ALLOWANCE
from assay.golden.routing import compare_ids, routing_view
from assay.reference.ops import top_k

LOGITS = np.array([[4.0, 3.0, 2.0, 1.0]])


def compared(expected, got, logits=LOGITS, spread=0.0):
    return compare_ids(np.array(expected), np.array(got), logits, spread)


def test_the_same_set_in_any_order():
    for got in ([[0, 1]], [[1, 0]]):
        found = compared([[0, 1]], got)
        assert (found.ratio, found.local_error, found.allowed) == (0, 0, True)


def test_a_wrong_expert_costs_its_margin():
    found = compared([[0, 1]], [[0, 3]], spread=0.5)  # 3.0 left out, 1.0 taken in
    assert found.ratio == pytest.approx(4)
    assert found.worst == {"index": [0], "expected": [0, 1], "got": [0, 3]}


def test_two_wrong_experts_cost_the_worst_pair():
    assert compared([[0, 1]], [[2, 3]], spread=0.5).ratio == pytest.approx(6)  # best out 4.0, worst in 1.0


@pytest.mark.parametrize(("times", "allowed"), [(0.1, True), (0.99, True), (1.01, False), (1e9, False)])
def test_a_flip_is_legal_within_the_allowance(times, allowed):
    found = compared([[0, 1]], [[0, 3]], spread=2 / (times * ALLOWANCE))  # the margin is 2
    assert found.allowed is allowed
    assert found.local_error == (0 if allowed else 1)


def test_exact_ties_are_open_even_without_noise():
    assert compared([[0, 1]], [[0, 2]], np.array([[4.0, 3.0, 3.0, 1.0]])).allowed
    assert not compared([[0, 1]], [[0, 2]], np.array([[4.0, 3.0, 3.0 - 1e-12, 1.0]])).allowed


def test_an_expert_twice_is_never_legal():
    assert not compared([[0, 1]], [[0, 0]], spread=1e9).allowed
    assert not compared([[0, 1]], [[1, 1]], np.zeros((1, 4)), spread=1e9).allowed


def test_worst_token_is_named():
    logits = np.repeat(LOGITS, 3, axis=0)
    found = compared([[0, 1]] * 3, [[0, 1], [0, 3], [0, 2]], logits)
    assert (found.worst["index"], found.worst_position) == ([1], 1)
    assert found.local_error == pytest.approx(2 / 3)


def test_logits_that_are_not_finite_allow_nothing_else():
    assert not compared([[0, 1]], [[0, 3]], np.array([[4.0, 3.0, 2.0, np.nan]]), spread=1.0).allowed


@given(hnp.arrays(np.float64, (3, 5), elements=st.integers(-3, 3).map(float)), st.integers(1, 5))
def test_a_choice_is_allowed_without_noise_if_it_is_one_of_the_largest(logits, A):
    """Against brute force: some set of A experts is legal if no expert left out beats one taken in."""
    expected = top_k(logits, A)
    got = np.array([np.random.default_rng(int(row.sum()) + 99).permutation(5)[:A] for row in logits])
    legal = all(
        min(row[taken]) >= max(np.delete(row, taken), default=-np.inf) for row, taken in zip(logits, got, strict=True)
    )
    assert compare_ids(expected, got, logits, 0.0).allowed == legal


# --- end to end ---


def test_routing_view_counts_flips_and_their_margin():
    golden = {
        "layers.0.router_logits": np.array([[4.0, 3.0, 2.5, 0.0], [9.0, 8.0, 1.0, 0.0]]),
        "layers.0.expert_ids": np.array([[0, 1], [0, 1]]),
        "layers.1.expert_ids": np.array([[2, 3], [1, 0]]),
        "logits": np.zeros((2, 5)),
    }
    same = {name: array for name, array in golden.items() if name.endswith("ids")}
    assert routing_view(golden, same) == {"flips": 0, "choices": 4, "largest_margin": 0.0}
    flipped = same | {"layers.0.expert_ids": np.array([[0, 2], [1, 0]])}
    assert routing_view(golden, flipped) == {"flips": 1, "choices": 4, "largest_margin": 0.5}


def test_routing_view_of_a_dense_model_is_none():
    assert routing_view({"logits": np.zeros((1, 2))}, {"logits": np.zeros((1, 2))}) is None


def test_routing_view_of_all_experts():
    golden = {"layers.0.router_logits": np.zeros((1, 2)), "layers.0.expert_ids": np.array([[0, 1]])}
    assert routing_view(golden, {"layers.0.expert_ids": np.array([[1, 0]])})["flips"] == 0
