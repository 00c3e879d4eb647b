"""Products with quantised inputs against float64 on the same inputs: every encoding, odd sizes, many columns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.fast.cpu.groups import by_expert, one_group
from assay.fast.cpu.products import columns, product
from assay.fast.cpu.rows import encoded_rows
from assay.reference.formats import BF16, F16, AffineGroups
from assay.reference.precision import round_q8
from assay.reference.weights import Tensor
from tests.fast.cpu.poison import poisoned
from tests.fast.models import quantised_tensor

ENCODINGS = ["MXFP4", "MXFP4_BLOCKS", "Q8_0", "Q4_0", "Q4_1", "affine4", "affine8"]
# Each block's integers are exact; the sum of up to 90 blocks in float32, each rounded three times, with the bias's
# term once more, stays far below this share of the sum of magnitudes (1e-6 is 17 U; the largest seen is 5 U).
ALLOWANCE = 1e-6


def multiply(tensor, groups, x, bias):
    """The product as the engine does it, with buffers poisoned."""
    rows = encoded_rows(tensor)
    return poisoned(lambda: product(rows, groups, columns(x, groups, rows.kind), bias))


def assert_product(got, x, w, bias):
    """Within the allowance of the sum of magnitudes."""
    x, w = round_q8(x).astype(np.float64), w.astype(np.float64)
    limit = ALLOWANCE * (np.abs(x) @ np.abs(w).T + np.abs(bias))
    np.testing.assert_array_less(np.abs(got - (x @ w.T + bias)), limit)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 8, 9, 12, 13, 25])
def test_linear(encoding, T):
    """From registers and by tile; rows no multiple of 16, blocks no multiple of 4."""
    rng = np.random.default_rng(T)
    for O, I in [(1, 32), (33, 96), (18, 416), (16, 2880)]:  # noqa: E741
        tensor = quantised_tensor(rng, "w", (O, I), encoding)
        x, bias = rng.normal(size=(T, I)).astype(np.float32), rng.normal(size=(1, O)).astype(np.float32)
        assert_product(multiply(tensor, one_group(T), x, bias), x, tensor.decode(), bias)


@settings(max_examples=60, deadline=None)
@given(
    encoding=st.sampled_from(ENCODINGS),
    T=st.integers(1, 30),
    O=st.integers(1, 50),
    blocks=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_any_size(encoding, T, O, blocks, seed):  # noqa: E741
    rng = np.random.default_rng(seed)
    tensor = quantised_tensor(rng, "w", (O, 32 * blocks), encoding)
    x = rng.normal(size=(T, 32 * blocks)).astype(np.float32)
    bias = rng.normal(size=(1, O)).astype(np.float32)
    assert_product(multiply(tensor, one_group(T), x, bias), x, tensor.decode(), bias)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("T", [1, 7, 40])
def test_experts(encoding, T):
    """Groups of few and of many products side by side, each with its own matrix and bias."""
    rng = np.random.default_rng(T)
    tensor = quantised_tensor(rng, "w", (6, 19, 96), encoding)
    w, bias = tensor.decode(), rng.normal(size=(6, 19)).astype(np.float32)
    ids_TA = np.array([rng.permutation([0, 0, 0, 1, 2, 3, 4])[:2] for _ in range(T)])  # expert 0 often, 5 never
    x = rng.normal(size=(T, 96)).astype(np.float32)
    got = multiply(tensor, by_expert(ids_TA), x, bias).reshape(T, 2, 19)
    for t in range(T):
        for a, e in enumerate(ids_TA[t]):
            assert_product(got[t, a], x[t : t + 1], w[e], bias[e])


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("side", [F16, BF16])
@pytest.mark.parametrize("T", [1, 6])
def test_affine_groups(size, side, T):
    """A scale for one, two or four blocks, in either 16-bit format."""
    rng = np.random.default_rng(size)
    scale = rng.uniform(0.01, 0.02, (21, 384 // size)).astype(np.float16)
    stored = scale if side is F16 else (scale.astype("<f4").view("<u4") >> 16).astype("<u2")
    parts = {"weight": rng.integers(0, 2**32, (21, 48), dtype=np.uint32), "scales": stored, "biases": stored}
    tensor = Tensor("w", (21, 384), AffineGroups(4, size, side), parts)
    x, bias = rng.normal(size=(T, 384)).astype(np.float32), np.full((1, 21), 1e-30, np.float32)
    assert_product(multiply(tensor, one_group(T), x, bias), x, tensor.decode(), bias)


@pytest.mark.parametrize("T", [2, 7])
def test_nan_stays_in_its_row_and_column(T):
    """A NaN scale in a row, a NaN in an input."""
    rng = np.random.default_rng(0)
    tensor = quantised_tensor(rng, "w", (20, 160), "MXFP4_BLOCKS")
    tensor.parts["blocks"][7, 2, 0] = 255
    x = rng.normal(size=(T, 160)).astype(np.float32)
    x[1, 33] = np.nan
    y = multiply(tensor, one_group(T), x, np.zeros((1, 20), np.float32))
    expected = np.zeros((T, 20), bool)
    expected[1], expected[:, 7] = True, True
    np.testing.assert_array_equal(np.isnan(y), expected)


def test_extreme_scales():
    """E8M0's smallest is 2^-127, not 0; the largest finite one is kept."""
    rng = np.random.default_rng(1)
    tensor = quantised_tensor(rng, "w", (4, 128), "MXFP4_BLOCKS")
    tensor.parts["blocks"][0, :, 0], tensor.parts["blocks"][1, :, 0] = 0, 240
    x = np.ones((1, 128), np.float32)
    assert_product(multiply(tensor, one_group(1), x, np.zeros((1, 4), np.float32))[:, :2], x, tensor.decode()[:2], 0)
