"""How products are formed on the CPU changes the time, never a bit."""

import numpy as np
import pytest

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True)
def _on_the_cpu():
    import mlx.core as mx

    if mx.default_device().type != mx.cpu:
        pytest.skip("a GPU multiplies by what is stored")


def inputs(seed, *shape):
    import mlx.core as mx

    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def assert_same_bits(ours, mlx):
    np.testing.assert_array_equal(np.array(ours).view(np.uint32), np.array(mlx).view(np.uint32))


@pytest.mark.parametrize("x_shape", [(1, 1), (1, 40), (3, 1), (2, 5)])
@pytest.mark.parametrize("O", [384, 96, 7])  # three panels of 128, three of 32, one
def test_panels(O, x_shape):  # noqa: E741
    from assay.fast.metal.linear import Panels

    weight, bias, x = inputs(0, O, 72), inputs(1, O), inputs(2, *x_shape, 72)
    panels = Panels.of(weight)
    assert panels.weight.shape == {384: (3, 72, 128), 96: (3, 72, 32), 7: (1, 72, 7)}[O]
    assert_same_bits(panels.multiply(x, None), x @ weight.T)
    assert_same_bits(panels.multiply(x, bias), x @ weight.T + bias)
    ids = np.random.default_rng(3).integers(0, O, x_shape)
    import mlx.core as mx

    assert_same_bits(panels.rows(mx.array(ids)), weight[mx.array(ids)])


@pytest.mark.parametrize(("group_size", "bits"), [(32, 8), (64, 4), (128, 3)])
@pytest.mark.parametrize("rows", [7, 8, 30])
def test_affine_matrices_decoded(rows, group_size, bits, monkeypatch):
    """In one piece and in several, the last one smaller; below eight rows it is MLX's own product."""
    import mlx.core as mx

    from assay.fast.metal import linear

    settings = {"group_size": group_size, "bits": bits}
    weight, scales, biases = mx.quantize(inputs(0, 300, 256), **settings)
    matrix = linear.Quantised(weight, scales, biases, **settings, mode="affine", compute=mx.float32)
    x, bias = inputs(1, 2, rows // 2, 256) if rows % 2 == 0 else inputs(1, rows, 256), inputs(2, 300)
    expected = mx.quantized_matmul(x, weight, scales, biases, transpose=True, **settings) + bias
    assert_same_bits(matrix.multiply(x, bias), expected)
    monkeypatch.setattr(linear, "DECODED_AT_A_TIME", 256 * 128)
    assert_same_bits(matrix.multiply(x, bias), expected)


def test_stacks_turned():
    """A stack [N,O,I] that lies in memory as [N,I,O]."""
    import mlx.core as mx

    from assay.fast.metal.linear import Plain

    weight, x, ids = inputs(0, 4, 40, 72), inputs(1, 6, 1, 72), mx.array([0, 3, 3, 1, 2, 2])
    turned = mx.contiguous(weight.swapaxes(1, 2)).swapaxes(1, 2)
    assert_same_bits(Plain(turned).gathered(x, ids, False), Plain(weight).gathered(x, ids, False))
