"""The small kernels against their twins in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.fast.cpu import ops
from assay.reference import ops as reference
from assay.reference import rope
from tests.fast.cpu.poison import poisoned

rng = np.random.default_rng(0)


def normal(*shape):
    """Standard normal float32."""
    return rng.normal(size=shape).astype(np.float32)


def assert_close(got, want, ulps):
    """Within so many units of float32's relative rounding, 2^-23, element by element."""
    np.testing.assert_allclose(got, want, rtol=ulps * 2.0**-23, atol=1e-44)


@pytest.mark.parametrize(("T", "D"), [(1, 1), (2, 33), (5, 288), (3, 2880)])
def test_rms_norm(T, D):
    x, weight = normal(T, D) * 3, normal(D)
    want = reference.rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-5)
    assert_close(poisoned(ops.rms_norm, x, weight, 1e-5), want, 4)


def test_rms_norm_of_small_rows_shows_eps_inside_the_root():
    x = np.full((1, 4), 1e-3, np.float32)
    assert_close(ops.rms_norm(x, np.ones(4, np.float32), 1e-6), np.full((1, 4), 2**-0.5), 4)


@pytest.mark.parametrize(("T", "H", "C"), [(1, 1, 2), (2, 3, 20), (5, 2, 64)])
def test_apply_rope(T, H, C):
    x, angle = normal(T, H, C), rng.uniform(0, 7, (T, C // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    want = rope.apply_rope(*(a.astype(np.float64) for a in (x, cos, sin)))
    np.testing.assert_allclose(poisoned(ops.apply_rope, x, cos, sin), want, atol=4 * 2.0**-23 * np.abs(x).max())


def test_apply_rope_turns_the_half_split_pair():
    x = np.array([[[1, 2, 3, 4]]], np.float32)
    quarter = np.array([[0, 1]], np.float32), np.array([[1, 0]], np.float32)  # pair 0 by 90 degrees, pair 1 not
    np.testing.assert_array_equal(ops.apply_rope(x, *quarter), [[[-3, 2, 1, 4]]])


@pytest.mark.parametrize("shape", [(1, 1), (2, 33), (3, 2, 17)])
def test_swiglu(shape):
    gate, up = normal(*shape) * 5, normal(*shape)
    g, u = gate.astype(np.float64), up.astype(np.float64)
    assert_close(poisoned(ops.swiglu, gate, up), g / (1 + np.exp(-g)) * u, 6)


def test_swiglu_far_out():
    """No overflow on either side."""
    got = ops.swiglu(np.float32([[-1e30, -200, 0, 200, 1e30]]), np.ones((1, 5), np.float32))
    np.testing.assert_array_equal(got, np.float32([[0, 0, 0, 200, 1e30]]))


@pytest.mark.parametrize("shape", [(1, 1), (2, 33), (3, 2, 17)])
def test_clamped_swiglu(shape):
    gate, up = normal(*shape) * 5, normal(*shape) * 5
    want = reference.clamped_swiglu(gate.astype(np.float64), up.astype(np.float64), 1.702, 2.5)
    got = poisoned(ops.clamped_swiglu, gate, up, 1.702, 2.5)
    # the tanh form of the twin loses digits where the sigmoid is small; u + 1 where u is near -1
    np.testing.assert_allclose(got, want, rtol=8 * 2.0**-23, atol=8 * 2.0**-24)


def test_clamped_swiglu_by_hand():
    """The gate has no lower clamp, the linear branch has both; with alpha 0 the sigmoid is a half."""
    gate, up = np.float32([[9, 9, -9, 1]]), np.float32([[9, -9, 0, 2]])
    got = ops.clamped_swiglu(gate, up, 0.0, 7.0)
    np.testing.assert_array_equal(got, [[7 / 2 * 8, 7 / 2 * -6, -9 / 2 * 1, 1 / 2 * 3]])


def test_nan_passes_the_clamp():
    nan, one = np.float32([[np.nan, 1]]), np.float32([[1, np.nan]])
    assert np.isnan(ops.clamped_swiglu(nan, one, 1.702, 7.0)).all()


few_values = st.sampled_from(np.float32([-np.inf, -1, 0, 0.5, 2, np.inf, np.nan]))


@settings(deadline=None)  # the first example compiles
@given(logits=arrays(np.float32, (3, 8), elements=few_values), A=st.integers(1, 8))
def test_top_k(logits, A):
    """Many ties, infinities and NaN: as the stable sort has them."""
    np.testing.assert_array_equal(poisoned(ops.top_k, logits, A), reference.top_k(logits, A))


@pytest.mark.parametrize(("T", "A"), [(1, 1), (2, 4), (5, 3)])
def test_expert_weights(T, A):
    logits = normal(T, 9) * 20
    ids = reference.top_k(logits, A)
    want = reference.softmax(np.take_along_axis(logits.astype(np.float64), ids, -1))
    # the exponent's own rounding, U times its size of up to about 100, becomes relative error
    np.testing.assert_allclose(poisoned(ops.expert_weights, logits, ids), want, rtol=1e-5)


@pytest.mark.parametrize(("T", "A", "D"), [(1, 1, 1), (2, 4, 33), (5, 3, 96)])
def test_weighted_sum(T, A, D):
    weights, x = normal(T, A), normal(T, A, D)
    want = np.einsum("TA,TAD->TD", weights.astype(np.float64), x.astype(np.float64))
    allowance = A * 2.0**-23 * np.einsum("TA,TAD->TD", np.abs(weights), np.abs(x))
    assert (np.abs(poisoned(ops.weighted_sum, weights, x) - want) <= allowance).all()
