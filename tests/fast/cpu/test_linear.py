"""Matrix products against float64, within what float32 sums can be held to."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.fast.cpu.groups import by_expert
from assay.fast.cpu.linear import grouped_linear, linear
from assay.fast.cpu.rows import encoded_rows
from tests.fast.cpu.poison import poisoned
from tests.fast.models import float_tensor, quantised_tensor

ENCODINGS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "MXFP4", "MXFP4_BLOCKS", "affine4", "affine8"]
SUPERBLOCKS = ["Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
COLUMNS = [1, 2, 4, 5, 6, 7, 9, 10, 12, 13, 23]  # columns: few, whole panels, panels and up to three more, or padded
U = 2.0**-24  # half a unit in the last place of 1


def tensor_of(rng, shape, encoding):
    """A random matrix, or stack of them."""
    if encoding in ("F32", "F16", "BF16"):
        return float_tensor("w", rng.normal(size=shape) * shape[-1] ** -0.5, encoding)
    return quantised_tensor(rng, "w", shape, encoding)


def assert_float32_dot(got, x, w, bias):
    """Each result within 2 (1 + I^0.5 / 4) U of the sum of |x w|, the worst of I products in at least 16 partial sums.

    Rounding errors of a sum of n terms add up to about n^0.5 U of the sum of magnitudes (Higham & Mary 2019,
    SIAM J. Sci. Comput. 41(5)); with p partial sums n is I / p + log2(p).
    """
    x, w = x.astype(np.float64), w.astype(np.float64)
    allowance = 2 * (1 + x.shape[1] ** 0.5 / 4) * U * (np.abs(x) @ np.abs(w).T + np.abs(bias))
    np.testing.assert_array_less(np.abs(got - (x @ w.T + bias)), allowance)


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_linear(encoding, T):
    """Rows in number no multiple of the tile; 33 to 70 outputs."""
    rng = np.random.default_rng(T)
    for O, I in [(1, 32), (33, 96), (70, 416)]:  # noqa: E741
        tensor = tensor_of(rng, (O, I), encoding)
        x, bias = rng.normal(size=(T, I)).astype(np.float32), rng.normal(size=(1, O)).astype(np.float32)
        assert_float32_dot(poisoned(linear, encoded_rows(tensor), x, bias), x, tensor.decode(), bias)


@settings(max_examples=30, deadline=None)
@given(T=st.integers(1, 9), O=st.integers(1, 50), I=st.integers(1, 300), seed=st.integers(0, 99))
def test_any_size(T, O, I, seed):  # noqa: E741
    rng = np.random.default_rng(seed)
    tensor = tensor_of(rng, (O, I), "F32")
    x, bias = rng.normal(size=(T, I)).astype(np.float32), np.zeros((1, O), np.float32)
    assert_float32_dot(poisoned(linear, encoded_rows(tensor), x, bias), x, tensor.decode(), bias + 1e-30)


@pytest.mark.parametrize("encoding", ["MXFP4", "MXFP4_BLOCKS", "BF16"])
@given(ids=st.lists(st.permutations(range(5)).map(lambda p: p[:2]), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_experts(encoding, ids):
    """Each (token, expert) pair by its own matrix and bias, experts used by no token left out."""
    rng = np.random.default_rng(3)
    tensor = tensor_of(rng, (5, 19, 64), encoding)
    w, bias = tensor.decode(), rng.normal(size=(5, 19)).astype(np.float32)
    ids_TA = np.array(ids)
    x_TI = rng.normal(size=(len(ids), 64)).astype(np.float32)
    groups = by_expert(ids_TA)
    got = poisoned(grouped_linear, encoded_rows(tensor), groups, x_TI, bias).reshape(len(ids), 2, 19)
    x_TAI = rng.normal(size=(len(ids), 2, 64)).astype(np.float32)
    own = groups._replace(x_row=groups.y_row)
    got_own = grouped_linear(encoded_rows(tensor), own, x_TAI.reshape(-1, 64), bias).reshape(len(ids), 2, 19)
    for t in range(len(ids)):
        for a, e in enumerate(ids_TA[t]):
            assert_float32_dot(got[t, a], x_TI[t : t + 1], w[e], bias[e])
            assert_float32_dot(got_own[t, a], x_TAI[t, a : a + 1], w[e], bias[e])


def test_nan_and_infinity_pass_through():
    """In the row that holds them and in no other."""
    w = np.ones((20, 40), np.float32)
    w[3, 7], w[17, 39] = np.nan, np.inf
    y = linear(encoded_rows(float_tensor("w", w, "F32")), np.ones((2, 40), np.float32), np.zeros((1, 20), np.float32))
    assert np.isnan(y[:, 3]).all()
    assert (y[:, 17] == np.inf).all()
    assert (np.delete(y, [3, 17], axis=1) == 40).all()


def assert_one_by_one(rows, x, bias):
    """The same bits alone and in a chunk: what makes any chunking equal."""
    alone = np.concatenate([linear(rows, x[t : t + 1], bias) for t in range(len(x))])
    np.testing.assert_array_equal(poisoned(linear, rows, x, bias), alone)


@pytest.mark.parametrize("encoding", [*ENCODINGS, *SUPERBLOCKS])
@pytest.mark.parametrize("T", COLUMNS)
def test_a_row_does_not_depend_on_the_others(encoding, T):
    """Rows beyond a tile and beyond a panel of them, vectors of 16 in number no multiple of a sum's four parts."""
    rng = np.random.default_rng(5)
    for O, I in [(37, 512)] if encoding in SUPERBLOCKS else [(3, 32), (16, 96), (37, 224), (19, 3104)]:  # noqa: E741
        rows, bias = encoded_rows(tensor_of(rng, (O, I), encoding)), rng.normal(size=(1, O)).astype(np.float32)
        assert_one_by_one(rows, rng.normal(size=(T, I)).astype(np.float32), bias)


@settings(max_examples=30, deadline=None)
@given(T=st.integers(1, 30), O=st.integers(1, 40), I=st.integers(1, 200), encoding=st.sampled_from(ENCODINGS[:3]))
def test_any_width_alone_and_together(T, O, I, encoding):  # noqa: E741
    """Also one that vectors of 16 do not divide, and one shorter than a vector."""
    rng = np.random.default_rng(T)
    rows, bias = encoded_rows(tensor_of(rng, (O, I), encoding)), rng.normal(size=(1, O)).astype(np.float32)
    assert_one_by_one(rows, rng.normal(size=(T, I)).astype(np.float32), bias)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 14), min_size=5, max_size=5).filter(any))
def test_groups_of_any_size_alone_and_together(counts):
    """Experts with few inputs and with many in one product: each pair as if it were alone."""
    rng = np.random.default_rng(sum(counts))
    rows, bias = encoded_rows(tensor_of(rng, (5, 21, 96), "BF16")), rng.normal(size=(5, 21)).astype(np.float32)
    ids_T1 = rng.permutation(np.repeat(np.arange(5), counts))[:, None]
    x = rng.normal(size=(len(ids_T1), 96)).astype(np.float32)
    got = poisoned(grouped_linear, rows, by_expert(ids_T1), x, bias)
    alone = [grouped_linear(rows, by_expert(ids_T1[t : t + 1]), x[t : t + 1], bias) for t in range(len(x))]
    np.testing.assert_array_equal(got, np.concatenate(alone))


def test_nan_of_one_input_stays_with_it():
    """Of the columns of a panel, and of those that fill it up, only its own results are lost."""
    rng = np.random.default_rng(0)
    rows, bias = encoded_rows(tensor_of(rng, (18, 96), "F32")), np.zeros((1, 18), np.float32)
    x = rng.normal(size=(10, 96)).astype(np.float32)
    x[9, 40] = np.nan
    np.testing.assert_array_equal(np.isnan(linear(rows, x, bias)).all(axis=1), np.arange(10) == 9)
    assert np.isnan(linear(rows, x, bias)).sum() == 18
