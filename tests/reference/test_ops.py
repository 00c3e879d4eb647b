"""Each operation against scalar loops in Python's own floats, or a small case written out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay.reference.ops import (
    attention_heads,
    attention_mask,
    attention_scores,
    attention_weights,
    clamped_swiglu,
    linear,
    rms_norm,
    sigmoid,
    softmax,
    swiglu,
    top_k,
)

LOG = math.log
finite = st.floats(-50, 50, allow_subnormal=False)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def close(got: np.ndarray, wanted: object) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-15)


# --- norm, linear ---


def test_rms_norm_literal_with_eps_inside_the_root():
    x = np.array([[3.0, 4.0], [0.0, 0.0]])
    # mean square 12.5 and eps 3.5 make 16; a zero row stays zero
    close(rms_norm(x, np.array([1.0, 10.0]), 3.5), [[0.75, 10.0], [0, 0]])


def test_rms_norm_loops():
    x, weight, eps = rng().normal(size=(3, 5)), rng().normal(size=5), 1e-3
    wanted = [
        [v / math.sqrt(sum(u * u for u in row) / 5 + eps) * w for v, w in zip(row, weight, strict=True)] for row in x
    ]
    close(rms_norm(x, weight, eps), wanted)


def test_linear_weights_are_out_by_in():
    x, weight, bias = (
        np.array([[1.0, 2.0, 3.0]]),
        np.array([[1.0, 0.0, -1.0], [0.5, 10.0, 100.0]]),
        np.array([0.25, -1]),
    )
    close(linear(x, weight), [[-2, 320.5]])
    close(linear(x, weight, bias), [[-1.75, 319.5]])


# --- softmax, sigmoid, activations ---


def test_softmax_literal():
    close(softmax(np.log([[1.0, 2.0, 5.0], [4.0, 4.0, 8.0]])), [[0.125, 0.25, 0.625], [0.25, 0.25, 0.5]])


@given(hnp.arrays(np.float64, (2, 6), elements=finite), st.floats(-1e3, 1e3))
def test_softmax_does_not_see_a_shift(x, shift):
    np.testing.assert_allclose(softmax(x + shift), softmax(x), rtol=1e-11, atol=1e-300)
    close(softmax(x).sum(axis=-1), [1, 1])


def test_softmax_of_large_logits_does_not_overflow():
    np.testing.assert_allclose(softmax(np.array([1e4, 1e4 - LOG(3), -1e4])), [0.75, 0.25, 0], rtol=1e-12)


@given(finite)
def test_sigmoid_is_the_logistic_function(x):
    np.testing.assert_allclose(sigmoid(np.array([x])), [1 / (1 + math.exp(-x))], rtol=1e-12, atol=2e-16)


def test_sigmoid_does_not_overflow():
    assert sigmoid(np.array([-1e5, 0, 1e5])).tolist() == [0, 0.5, 1]


def test_swiglu_literal():
    # sigmoid(ln 3) = 3/4
    close(swiglu(np.array([LOG(3), -LOG(3), 0]), np.array([2.0, 4.0, 9.0])), [1.5 * LOG(3), -LOG(3), 0])


def test_clamped_swiglu_literal():
    """alpha ln 3 / alpha makes the sigmoid 3/4; 1 is added to the linear branch only."""
    alpha, limit = 2.0, 7.0
    g = LOG(3) / alpha
    close(clamped_swiglu(np.array([g, g, g]), np.array([0.0, -1.0, 3.0]), alpha, limit), [0.75 * g, 0, 3 * g])


def test_clamped_swiglu_clamps_the_gate_from_above_only():
    alpha, limit = 0.5, 2.0
    gate = np.array([1000.0, 2.0, -4.0])
    at_limit = 2 / (1 + math.exp(-1))
    close(clamped_swiglu(gate, np.zeros(3), alpha, limit), [at_limit, at_limit, -4 / (1 + math.exp(2))])


def test_clamped_swiglu_clamps_the_linear_branch_on_both_sides():
    half = np.array([1.0, 1.0, 1.0, 1.0])
    up = np.array([1000.0, 7.0, -7.0, -1000.0])
    s = 1 / (1 + math.exp(-1.702))
    close(clamped_swiglu(half, up, 1.702, 7.0), [8 * s, 8 * s, -6 * s, -6 * s])


def test_top_k_gives_ties_to_the_lower_id_largest_first():
    logits = np.array([[1.0, 5.0, 5.0, 2.0], [3.0, 3.0, 3.0, 3.0], [-1.0, -2.0, 0.0, -0.0]])
    assert top_k(logits, 3).tolist() == [[1, 2, 3], [0, 1, 2], [2, 3, 0]]


@given(hnp.arrays(np.float64, (4, 7), elements=st.integers(-3, 3).map(float)), st.integers(1, 7))
def test_top_k_loops(logits, A):
    wanted = [sorted(range(7), key=lambda n: (-row[n], n))[:A] for row in logits]
    assert top_k(logits, A).tolist() == wanted


# --- masks ---


@pytest.mark.parametrize(
    ("window", "wanted"),
    [
        (None, ["1000", "1100", "1110", "1111"]),
        (1, ["1000", "0100", "0010", "0001"]),  # a window of one is the query's own key
        (2, ["1000", "1100", "0110", "0011"]),
        (3, ["1000", "1100", "1110", "0111"]),
        (4, ["1000", "1100", "1110", "1111"]),
    ],
)
def test_mask_of_a_prefill(window, wanted):
    mask = attention_mask(np.arange(4), np.arange(4), window)
    assert ["".join(map(str, row.astype(int))) for row in mask] == wanted


@pytest.mark.parametrize(
    ("window", "wanted"), [(None, ["11110", "11111"]), (2, ["00110", "00011"]), (4, ["11110", "01111"])]
)
def test_mask_of_a_later_chunk(window, wanted):
    mask = attention_mask(np.array([3, 4]), np.arange(5), window)
    assert ["".join(map(str, row.astype(int))) for row in mask] == wanted


def test_window_of_128_is_the_query_and_the_127_keys_before_it():
    assert np.flatnonzero(attention_mask(np.array([500]), np.arange(501), 128)[0]).tolist() == list(range(373, 501))


# --- attention ---


def naive_attention(q, k, v, mask, sinks):
    """Loops over heads, queries and keys: heads h reads key head h // G; answers scores, weights, heads."""
    (T, H, C), (S, K, _) = q.shape, k.shape
    scores, weights, heads = np.zeros((H, T, S)), np.zeros((H, T, S)), np.zeros((T, H, C))
    for h in range(H):
        kv = h // (H // K)
        for t in range(T):
            seen = [s for s in range(S) if mask[t, s]]
            for s in seen:
                scores[h, t, s] = sum(q[t, h, c] * k[s, kv, c] for c in range(C)) / math.sqrt(C)
            total = sum(math.exp(scores[h, t, s]) for s in seen) + (math.exp(sinks[h]) if sinks is not None else 0)
            for s in seen:
                weights[h, t, s] = math.exp(scores[h, t, s]) / total
                heads[t, h] += weights[h, t, s] * v[s, kv]
    return scores, weights, heads


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_loops(window, with_sinks):
    r = rng()
    q, k, v = r.normal(size=(4, 6, 8)), r.normal(size=(7, 2, 8)), r.normal(size=(7, 2, 8))
    sinks = r.normal(size=6) if with_sinks else None
    mask = attention_mask(np.arange(3, 7), np.arange(7), window)
    scores = attention_scores(q, k, mask)
    weights = attention_weights(scores, mask, sinks)
    for got, wanted in zip(
        (scores, weights, attention_heads(weights, v)), naive_attention(q, k, v, mask, sinks), strict=True
    ):
        close(got, wanted)


def test_heads_of_a_group_are_neighbours():
    """Four query heads on two key heads: 0 and 1 read key head 0, 2 and 3 read key head 1."""
    q = np.ones((1, 4, 1))
    k = v = np.array([[[1.0], [10.0]]])
    everything = np.ones((1, 1), bool)
    assert attention_scores(q, k, everything)[:, 0, 0].tolist() == [1, 1, 10, 10]
    assert attention_heads(np.ones((4, 1, 1)), v)[0, :, 0].tolist() == [1, 1, 10, 10]


def test_sink_takes_weight_and_has_no_value():
    """Scores ln 1, ln 2 and a sink of ln 5: weights 1/8 and 2/8; the other 5/8 are gone."""
    scores = np.log([[[1.0, 2.0]]])
    mask = np.ones((1, 2), bool)
    close(attention_weights(scores, mask, np.array([LOG(5)])), [[[0.125, 0.25]]])
    close(attention_weights(scores, mask), [[[1 / 3, 2 / 3]]])


def test_each_head_has_its_own_sink():
    scores, mask = np.zeros((2, 1, 1)), np.ones((1, 1), bool)
    close(attention_weights(scores, mask, np.log([1.0, 3.0])), [[[0.5]], [[0.25]]])


def test_a_sink_far_above_the_scores_does_not_overflow():
    weights = attention_weights(np.zeros((1, 1, 2)), np.ones((1, 2), bool), np.array([800.0]))
    assert weights.tolist() == [[[0, 0]]]


def test_hidden_keys_have_score_and_weight_zero():
    mask = np.array([[True, False, True]])
    q, k = np.ones((1, 1, 4)), np.full((3, 1, 4), 100.0)
    scores = attention_scores(q, k, mask)
    assert scores.tolist() == [[[200, 0, 200]]]
    assert attention_weights(scores, mask).tolist() == [[[0.5, 0, 0.5]]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_operations_stay_in_the_dtype_of_their_inputs(dtype):
    x = rng().normal(size=(3, 4)).astype(dtype)
    heads = x.reshape(3, 2, 2)
    mask = attention_mask(np.arange(3), np.arange(3), None)
    scores = attention_scores(heads, heads, mask)
    weights = attention_weights(scores, mask, x[0, :2])
    results = [rms_norm(x, x[0], 1e-5), softmax(x), sigmoid(x), swiglu(x, x), clamped_swiglu(x, x, 1.702, 7.0)]
    assert {a.dtype for a in [*results, scores, weights, attention_heads(weights, heads)]} == {np.dtype(dtype)}
