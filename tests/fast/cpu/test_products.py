"""Products with quantised inputs against float64 on the same inputs: every encoding, odd sizes, many columns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.fast.cpu.groups import by_expert, one_group
from assay.fast.cpu.jit import checked_threads, threads
from assay.fast.cpu.phases import new_counters
from assay.fast.cpu.products import (
    FEWEST,
    IN_REGISTERS,
    ROWS,
    ROWS_BY_PANEL,
    TILES,
    product,
    rows_by_panel,
    rows_by_tile,
    rows_in_registers,
    some_shares,
)
from assay.fast.cpu.quantise import NO_ROWS, empty_columns, quantise, quantise_column
from assay.fast.cpu.rows import encoded_rows
from assay.reference.formats import BF16, F16, GGML_BLOCKS, AffineGroups
from assay.reference.precision import round_q8, round_q8_K
from assay.reference.weights import Tensor
from tests.fast.cpu.poison import poisoned
from tests.fast.models import quantised_tensor

GGUF = ["MXFP4_BLOCKS", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
ENCODINGS = [*GGUF, "MXFP4", "affine4", "affine8"]
REGISTERS = ["MXFP4_BLOCKS", "Q8_0", "Q4_1"]  # that are decoded there
# Each block's integers are exact; the sum of up to 90 blocks in float32, each rounded three times, with the bias's
# term once more, stays far below this share of the sum of magnitudes (1e-6 is 17 U; the largest seen is 5 U).
ALLOWANCE = 1e-6


def multiply(tensor, groups, x, bias):
    """The product as the engine does it, with buffers poisoned."""
    rows = encoded_rows(tensor)
    return poisoned(lambda: product(rows, groups, quantise(x, groups, rows.kind), bias))


def block_of(encoding):
    """Elements that a row's length is a multiple of."""
    return 256 if encoding.endswith("_K") else 32


def assert_product(got, x, w, bias, encoding):
    """Within the allowance of the sum of magnitudes."""
    rounding = round_q8 if block_of(encoding) == 32 else round_q8_K
    x, w = rounding(x).astype(np.float64), w.astype(np.float64)
    limit = ALLOWANCE * (np.abs(x) @ np.abs(w).T + np.abs(bias))
    np.testing.assert_array_less(np.abs(got - (x @ w.T + bias)), limit)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 8, 9, 12, 13, 25, 101])
def test_linear(encoding, T):
    """Row by row and by tile; rows no multiple of 16, blocks no multiple of 4 or of a tile's chunk; many panels."""
    rng = np.random.default_rng(T)
    for O, blocks in [(1, 1), (33, 3), (18, 13), (16, 90)]:  # noqa: E741
        I = blocks * 32 if block_of(encoding) == 32 else -(-blocks // 8) * 256  # noqa: E741
        tensor = quantised_tensor(rng, "w", (O, I), encoding)
        x, bias = rng.normal(size=(T, I)).astype(np.float32), rng.normal(size=(1, O)).astype(np.float32)
        assert_product(multiply(tensor, one_group(T), x, bias), x, tensor.decode(), bias, encoding)


@settings(max_examples=100, deadline=None)
@given(
    encoding=st.sampled_from(ENCODINGS),
    T=st.integers(1, 30),
    O=st.integers(1, 50),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_size(encoding, T, O, blocks, seed):  # noqa: E741
    rng = np.random.default_rng(seed)
    I = block_of(encoding) * blocks  # noqa: E741
    tensor = quantised_tensor(rng, "w", (O, I), encoding)
    x = rng.normal(size=(T, I)).astype(np.float32)
    bias = rng.normal(size=(1, O)).astype(np.float32)
    assert_product(multiply(tensor, one_group(T), x, bias), x, tensor.decode(), bias, encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("T", [1, 7, 40])
def test_experts(encoding, T):
    """Groups of few and of many products side by side, each with its own matrix and bias."""
    rng = np.random.default_rng(T)
    I = 3 * block_of(encoding)  # noqa: E741
    tensor = quantised_tensor(rng, "w", (6, 19, I), encoding)
    w, bias = tensor.decode(), rng.normal(size=(6, 19)).astype(np.float32)
    ids_TA = np.array([rng.permutation([0, 0, 0, 1, 2, 3, 4])[:2] for _ in range(T)])  # expert 0 often, 5 never
    x = rng.normal(size=(T, I)).astype(np.float32)
    got = multiply(tensor, by_expert(ids_TA), x, bias).reshape(T, 2, 19)
    for t in range(T):
        for a, e in enumerate(ids_TA[t]):
            assert_product(got[t, a], x[t : t + 1], w[e], bias[e], encoding)


SHARED = 2 * TILES * ROWS + 21  # rows of a matrix that makes three shares, none of them like another


def shared_product():
    """Five matrices of so many rows, four of them asked for, and what each of 7 inputs' two products should be."""
    rng = np.random.default_rng(3)
    tensor = quantised_tensor(rng, "w", (5, SHARED, 32 * FEWEST), "MXFP4_BLOCKS")
    bias, ids_TA = rng.normal(size=(5, SHARED)).astype(np.float32), np.array([[0, 3]] * 4 + [[4, 0], [1, 4], [0, 1]])
    return tensor, by_expert(ids_TA), rng.normal(size=(7, tensor.shape[-1])).astype(np.float32), bias, ids_TA


def assert_shared_product(got, tensor, x, bias, ids_TA):
    w = tensor.decode()
    for t, ids in enumerate(ids_TA):
        for a, e in enumerate(ids):
            assert_product(got[2 * t + a], x[t : t + 1], w[e], bias[e], "MXFP4_BLOCKS")


def test_threads_share_rows():
    """The same bits on any number of threads, and the right ones."""
    tensor, groups, x, bias, ids_TA = shared_product()
    results = []
    for count in range(1, min(3, checked_threads(None)) + 1):
        with threads(count):
            results.append(multiply(tensor, groups, x, bias))
    for got in results:
        np.testing.assert_array_equal(got, results[0])
    assert_shared_product(results[0], tensor, x, bias, ids_TA)


def test_a_thread_does_what_the_others_have_not_begun():
    """Of three threads only the second ever runs; the others, coming late, find nothing left to do."""
    tensor, groups, x, bias, ids_TA = shared_product()
    rows, counters = encoded_rows(tensor), new_counters(3)
    panels, y = quantise(x, groups, rows.kind), np.full((14, SHARED), np.nan, np.float32)
    at = ROWS_BY_PANEL.of((rows, 0, 0, 0, panels, 0, 0, groups.y_row, bias[0], y))
    some_shares(at, rows, groups, panels, 1, 3, counters, bias, y)
    assert_shared_product(y, tensor, x, bias, ids_TA)
    y.fill(np.nan)
    some_shares(at, rows, groups, panels, 0, 3, counters, bias, y)
    assert np.isnan(y).all()


@pytest.mark.parametrize("encoding", REGISTERS)
@pytest.mark.parametrize("T", [2, 3, 14])
def test_runs_of_rows(encoding, T):
    """Rows of one matrix by runs that begin and end anywhere: each run writes its own outputs and no others."""
    rng = np.random.default_rng(T)
    tensor = quantised_tensor(rng, "w", (2, 45, 32 * FEWEST + 96), encoding)
    rows, groups, x = encoded_rows(tensor), one_group(T), rng.normal(size=(T, tensor.shape[-1])).astype(np.float32)
    bias, panels = rng.normal(size=(2, 45)).astype(np.float32), quantise(x, groups, rows.kind)
    whole = np.full((T, 45), np.nan, np.float32)
    for first, count in ((0, 7), (7, 33), (40, 5)):
        y = np.full((T, 45), np.nan, np.float32)
        rows_by_panel(rows, 45, first, count, panels, 0, len(panels.at), groups.y_row, bias[1], y)
        run = slice(first, first + count)
        assert np.isnan(y[:, :first]).all()
        assert np.isnan(y[:, first + count :]).all()
        whole[:, run] = y[:, run]
    assert_product(whole, x, tensor.decode()[1], bias[1], encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_columns_alone(encoding):
    """A vector at a time, each in its place of a workspace, by runs of rows that begin and end anywhere."""
    rng = np.random.default_rng(1)
    I = 3 * block_of(encoding)  # noqa: E741
    tensor = quantised_tensor(rng, "w", (2, 45, I), encoding)
    rows, x = encoded_rows(tensor), rng.normal(size=(3, I)).astype(np.float32)
    bias, y = rng.normal(size=(2, 45)).astype(np.float32), np.full((3, 45), np.nan, np.float32)
    panels = poisoned(empty_columns, 3, I + 64)
    for k in range(3):
        quantise_column(x[k], rows.kind, k, panels)
    for k in range(3):
        for first, count in ((0, 7), (7, 33), (40, 5)):
            if IN_REGISTERS[rows.kind]:
                rows_in_registers(rows, 45, first, count, panels, k, bias[1], y[k])
            else:
                rows_by_tile(rows, 45, first, count, panels, k, k + 1, NO_ROWS, bias[1], y[k : k + 1])
    assert_product(y, x, tensor.decode()[1], bias[1], encoding)


# Where codes start, and those that stand for the second term, of products that are a sum of two: with the codes and
# with the biases, or, row by row, with codes made unsigned and with what that added.
TERMS = {"Q4_1": (4, 0), "Q5_1": (4, 0), "Q4_K": (16, 0), "Q5_K": (16, 0), "Q8_0": (2, 0x80), "MXFP4_BLOCKS": (1, 0xFF)}


@pytest.mark.parametrize("encoding", GGUF)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), T=st.sampled_from([1, 3, 5, 14]))
def test_any_bytes(encoding, data, T):
    """Whatever the blocks hold: a NaN among the weights is not lost; where all are numbers the product is right."""
    record = {record.name: record for record in GGML_BLOCKS.values()}[encoding.removesuffix("_BLOCKS")]
    blocks = data.draw(arrays(np.uint8, (3, 2, record.nbytes)))
    tensor = Tensor("w", (3, 2 * record.elements), record, {"blocks": blocks})
    x = np.random.default_rng(T).normal(size=(T, 2 * record.elements)).astype(np.float32)
    second, (start, codes) = blocks.copy(), TERMS.get(encoding, (0, 0))
    second[..., start:] = codes
    with np.errstate(all="ignore"):
        w = tensor.decode()
        term = Tensor("w", tensor.shape, record, {"blocks": second}).decode() if encoding in TERMS else 0 * w
        magnitude = np.abs(w - term) + np.abs(term)
    got = multiply(tensor, one_group(T), x, np.zeros((1, 3), np.float32))
    assert not np.isfinite(got[:, np.isnan(w).any(axis=1)]).any()
    # beyond, sums leave float32's range, or all of a row's scales times the inputs' are subnormal
    sane = (magnitude < 1e30).all(axis=1) & (magnitude > 1e-25).any(axis=1)
    rounded = (round_q8 if block_of(encoding) == 32 else round_q8_K)(x).astype(np.float64)
    limit = ALLOWANCE * np.abs(rounded) @ magnitude[sane].astype(np.float64).T
    np.testing.assert_array_less(np.abs(got[:, sane] - rounded @ w[sane].astype(np.float64).T), limit)


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
    assert_product(multiply(tensor, one_group(T), x, bias), x, tensor.decode(), bias, "affine4")


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
    y = multiply(tensor, one_group(1), x, np.zeros((1, 4), np.float32))
    assert_product(y[:, :2], x, tensor.decode()[:2], 0, "MXFP4_BLOCKS")
