"""Errors, ratios and logit views of arrays small enough to work out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay.golden.measure import ALLOWANCE, ROW_SLACK, compare, logit_view, relative

EXPECTED = np.array([[3.0, 0.0], [0.0, 4.0]])  # norm 5
NOISY = EXPECTED + np.array([[0.3, 0.0], [0.0, 0.4]])  # noise 0.5: a tenth


def test_relative():
    assert relative(np.array([3.0, 4.0]), np.array([10.0, 0.0])) == 0.5
    assert relative(np.array([3.0, math.nan, math.inf]), np.array([6.0, 0.0, 0.0])) == 0.5


def test_error_noise_and_ratio_literally():
    found = compare(EXPECTED, EXPECTED + np.array([[0.6, 0.0], [0.0, 0.8]]), NOISY, 0, 2.0**-24)
    assert (found.local_error, found.noise) == pytest.approx((0.2, 0.1))
    assert found.ratio == pytest.approx(2)
    assert found.allowed
    assert found.worst == {"index": [1, 1], "expected": 4, "got": 4.8}
    assert found.nonfinite == 0


def test_allowance_is_a_multiple_of_the_noise():
    for times, allowed in ((ALLOWANCE * 0.999, True), (ALLOWANCE * 1.001, False)):
        assert compare(EXPECTED, EXPECTED + times * (NOISY - EXPECTED), NOISY, 0, 2.0**-24).allowed is allowed


def test_one_bad_position_among_many_is_seen():
    """A thousand positions with noise 1e-3 each, one of them off by 0.1: little overall, a lot for that row."""
    expected = np.ones((1000, 4))
    noisy = expected + 1e-3
    got = expected.copy()
    got[700, 2] += 0.1
    found = compare(expected, got, noisy, 0, 2.0**-24)
    assert found.local_error / found.noise < ALLOWANCE
    assert found.ratio == pytest.approx(0.1 / (1e-3 * 2) / ROW_SLACK)
    assert not found.allowed
    assert (found.worst_position, found.worst["index"]) == (700, [700, 2])


def test_noise_is_never_less_than_a_quarter_of_the_roundoff():
    found = compare(EXPECTED, EXPECTED, EXPECTED, 0, 2.0**-8)
    assert found.noise == pytest.approx(2.0**-10)
    assert (found.local_error, found.ratio) == (0, 0)


def test_index_is_given_in_the_tap_s_own_axes():
    expected = np.ones((2, 3, 4))  # H, T, S
    got = expected.copy()
    got[1, 2, 0] = 9
    found = compare(expected, got, expected, 1, 2.0**-24)
    assert (found.worst["index"], found.worst_position) == ([1, 2, 0], 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_never_allowed_and_is_the_worst(value):
    got = EXPECTED.copy()
    got[0, 1] = value
    found = compare(EXPECTED, got, NOISY, 0, 2.0**-24)
    assert (found.nonfinite, found.allowed, found.local_error) == (1, False, 0)
    assert (found.worst["index"], found.worst_position) == ([0, 1], 0)


def test_zeros_against_zeros_is_no_error_and_anything_else_is_one():
    zeros = np.zeros((3, 4))
    for unit in (2.0**-8, 2.0**-24, 2.0**-53):
        assert compare(zeros, zeros, zeros, 0, unit).ratio == 0
        for value in (1e-60, 1.0, 1e30):
            assert not compare(zeros, zeros + value, zeros, 0, unit).allowed


@given(hnp.arrays(np.float64, (3, 4), elements=st.floats(-1e3, 1e3)), st.floats(1e-3, 1e3))
def test_ratio_does_not_depend_on_the_scale(error, scale):
    rng = np.random.default_rng(0)
    expected, noise = rng.normal(size=(3, 4)), 1e-3 * rng.normal(size=(3, 4))
    one = compare(expected, expected + error, expected + noise, 0, 2.0**-24)
    other = compare(scale * expected, scale * (expected + error), scale * (expected + noise), 0, 2.0**-24)
    assert other.ratio == pytest.approx(one.ratio, rel=1e-6, abs=1e-9)


# --- logits ---


def test_logit_view_literally():
    """Position 0: (1/2, 1/4, 1/4) against uniform; position 1: (1/8, 7/8, 0+) whose top the backend misses."""
    expected = np.log([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    got = np.log([[1 / 3, 1 / 3, 1 / 3], [0.75, 0.125, 0.125]])
    first = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    second = 0.125 * math.log(1 / 6) + 0.75 * math.log(6)
    view = logit_view(expected, got)
    assert view["kl_nats"] == pytest.approx((first + second) / 2)
    assert view["top1_agreement"] == 0.5
    assert view["regret_nats"] == pytest.approx((0 + math.log(6)) / 2)


@given(
    hnp.arrays(np.float64, (2, 5), elements=st.floats(-20, 20)),
    hnp.arrays(np.float64, (2, 1), elements=st.floats(-9, 9)),
)
def test_logits_mean_the_same_shifted(logits, shift):
    view = logit_view(logits, logits + shift)
    assert view["kl_nats"] == pytest.approx(0, abs=1e-12)
    assert view["regret_nats"] == pytest.approx(0, abs=1e-12)


@given(hnp.arrays(np.float64, (2, 3, 5), elements=st.floats(-20, 20)))
def test_kl_and_regret_are_not_negative(pair):
    view = logit_view(*pair)
    assert view["kl_nats"] >= -1e-12
    assert view["regret_nats"] >= 0
