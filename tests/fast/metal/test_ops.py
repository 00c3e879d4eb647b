"""What MLX's own operations would round, and ours do not."""

import numpy as np
import pytest

from assay.reference import ops as reference

pytestmark = pytest.mark.peers
U = 2.0**-24  # unit roundoff of float32


def error(got, expected):
    return np.linalg.norm(np.array(got) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("D", [64, 2880])
def test_rms_norm(D):
    """Measured 0.8 U; `mx.fast.rms_norm` on the CPU makes 5 U of 2880 squares, which it adds up one by one."""
    import mlx.core as mx

    from assay.fast.metal.ops import on_cpu, rms_norm

    x, weight = np.random.default_rng(0).standard_normal((2, 8, D)).astype(np.float32)
    weight = 1 + weight[0] / 10
    expected = reference.rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-5)
    assert error(rms_norm(mx.array(x), mx.array(weight), 1e-5), expected) < (1.5 * U if on_cpu() else 4 * U)
    narrow = rms_norm(mx.array(x).astype(mx.bfloat16), mx.array(weight), 1e-5)
    assert narrow.dtype == mx.bfloat16


def test_activations_are_rounded_once():
    """In bfloat16: within half a unit of its last place of the exact value of the very inputs, both clamps engaged."""
    import mlx.core as mx

    from assay.fast.metal.ops import clamped_swiglu, swiglu

    gate, up = (mx.array(x).astype(mx.bfloat16) for x in np.random.default_rng(1).normal(0, 4, (2, 4000)))
    exact = [np.array(x.astype(mx.float32)).astype(np.float64) for x in (gate, up)]
    for got, expected in (
        (swiglu(gate, up), reference.swiglu(*exact)),
        (clamped_swiglu(gate, up, 1.702, 7.0), reference.clamped_swiglu(*exact, 1.702, 7.0)),
    ):
        assert got.dtype == mx.bfloat16
        np.testing.assert_allclose(np.array(got.astype(mx.float32)), expected, rtol=2.0**-8 * 1.001)


def test_experts_are_chosen_by_logit_ties_to_the_lower_id():
    import mlx.core as mx

    from assay.fast.metal.ops import expert_weights, top_k

    logits = np.array([[1, 3, 3, -2, 0], [0, 0, 0, 0, 0], [-5, -4, -3, -2, -1]], np.float32)
    ids = top_k(mx.array(logits), 3)
    np.testing.assert_array_equal(np.array(ids), reference.top_k(logits, 3))
    expected = reference.softmax(np.take_along_axis(logits.astype(np.float64), reference.top_k(logits, 3), -1))
    assert error(expert_weights(mx.array(logits), ids), expected) < 2 * U


def test_weighted_sum():
    import mlx.core as mx

    from assay.fast.metal.ops import weighted_sum

    weights, outputs = np.array([[0.5, 0.25]], np.float32), np.array([[[1, 2, 3], [4, 8, 12]]], np.float32)
    np.testing.assert_array_equal(np.array(weighted_sum(mx.array(weights), mx.array(outputs))), [[1.5, 3, 4.5]])
