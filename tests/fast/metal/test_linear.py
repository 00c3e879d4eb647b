"""How products are formed on the CPU changes the time, never a bit."""

import threading
from concurrent.futures import ThreadPoolExecutor

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


@pytest.fixture
def shared(monkeypatch):
    """Everything in three shares, however little it is."""
    from assay.fast.metal import shares

    monkeypatch.setattr(shares, "WORTH", 0)
    monkeypatch.setattr(shares, "SHARES", 3)
    monkeypatch.setattr(shares, "_own", threading.local())


def on_a_thread_of_its_own(work):
    """MLX's streams belong to a thread: nothing of one may be used in another."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("run", [lambda work: work(), on_a_thread_of_its_own], ids=["here", "another thread"])
@pytest.mark.parametrize("O", [384, 500, 7, 2])  # more and fewer than the shares; halves and remainders of panels
@pytest.mark.parametrize("rows", [1, 9])
def test_shares_of_a_product(shared, rows, O, run):  # noqa: E741
    import mlx.core as mx

    from assay.fast.metal.linear import Panels, Quantised

    weight, x, bias = inputs(0, O, 64), inputs(1, 1, rows, 64), inputs(2, O)
    mx.eval(weight, x, bias)

    def compared():
        assert_same_bits(Panels.of(weight).multiply(x, bias), x @ weight.T + bias)
        for settings in (
            {"group_size": 64, "bits": 8, "mode": "affine"},
            {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        ):
            parts = mx.quantize(weight, **settings)
            matrix = Quantised(parts[0], parts[1], parts[2] if len(parts) > 2 else None, **settings, compute=mx.float32)
            expected = mx.quantized_matmul(x, *parts, transpose=True, **settings) + bias
            assert_same_bits(matrix.multiply(x, bias), expected)

    run(compared)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_shares_of_the_rows_of_experts(shared, rows):
    import mlx.core as mx

    from assay.fast.metal.linear import Plain, Quantised

    stack, x = inputs(0, 4, 40, 64), inputs(1, rows, 1, 64)
    ids = mx.array(np.random.default_rng(2).integers(0, 4, rows).astype(np.uint32))
    expected = mx.gather_mm(x, stack.swapaxes(-1, -2), rhs_indices=ids)
    assert_same_bits(Plain(stack).gathered(x, ids, False), expected)
    settings = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    parts = mx.quantize(stack, **settings)
    expected = mx.gather_qmm(x, *parts, rhs_indices=ids, transpose=True, **settings)
    assert_same_bits(Quantised(*parts, None, **settings, compute=mx.float32).gathered(x, ids, False), expected)


def test_whole_models_in_shares(shared):
    """Prompts, single tokens and a token ahead: the bits are those of one thread."""
    from itertools import islice

    from tests.fast.metal.test_engine import model_of
    from tests.fast.models import gpt_oss_config

    model, _ = model_of(gpt_oss_config(), encoding="affine8")
    tokens = np.arange(20)
    split, ahead = model.forward(tokens), list(islice(model.greedy(tokens[:5]), 6))
    with pytest.MonkeyPatch.context() as patch:
        from assay.fast.metal import shares

        patch.setattr(shares, "WORTH", 1 << 60)
        np.testing.assert_array_equal(split, model.forward(tokens))
        assert ahead == list(islice(model.greedy(tokens[:5]), 6))


def test_only_products_that_are_worth_it_are_shared_out():
    from assay.fast.metal import shares

    seen = []

    def product(share):
        seen.append(share)
        return inputs(0, share.stop - share.start)

    for work in (shares.WORTH - 1, shares.WORTH):
        seen.clear()
        assert shares.in_shares(product, 10, work, axis=0).shape == (10,)
        assert len(seen) == (1 if work < shares.WORTH else shares.SHARES)
