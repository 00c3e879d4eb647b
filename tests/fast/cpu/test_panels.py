"""The pieces of the many-column products against plain NumPy: where everything lies, and the order of the sums."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.fast.cpu.jit import kernel
from assay.fast.cpu.panels import (
    COLUMNS,
    FEW,
    PARTS,
    ROWS,
    add_up,
    in_panels,
    lay_out,
    lay_out_columns,
    multiply_panels,
    totals_of_panel,
)


def numpy_panel(rows_NI: np.ndarray) -> np.ndarray:
    """N rows as a panel: part by part, vector by vector, row by row."""
    vectors_NV16 = rows_NI[:, : rows_NI.shape[1] // 16 * 16].reshape(len(rows_NI), -1, 16)
    return np.concatenate([vectors_NV16[:, part::PARTS].swapaxes(0, 1).ravel() for part in range(PARTS)])


def laid_out(rows_NI: np.ndarray) -> np.ndarray:
    """The same by the kernel, in memory that holds NaN."""
    panel = np.full(len(rows_NI) * (rows_NI.shape[1] // 16) * 16, np.nan, np.float32)
    for lane, row in enumerate(rows_NI):
        lay_out(row, 0, len(rows_NI), lane, panel)
    return panel


@given(I=st.integers(1, 300), N=st.integers(1, 6))
@settings(deadline=None)
def test_lay_out(I, N):  # noqa: E741
    rows_NI = np.arange(N * I, dtype=np.float32).reshape(N, I)
    np.testing.assert_array_equal(laid_out(rows_NI), numpy_panel(rows_NI))


@given(P=st.integers(1, 20), shares=st.integers(1, 9))
@settings(deadline=None)
def test_lay_out_columns(P, shares):
    """Rows chosen in any order, by any number of threads; beyond the last that one again; nothing left as it was."""
    x, x_row = (
        np.random.default_rng(P).normal(size=(30, 83)).astype(np.float32),
        np.random.default_rng(P).permutation(P),
    )
    blocks = -(-P // COLUMNS)
    panels = np.full(5 + blocks * COLUMNS * 80, np.nan, np.float32)
    for share in range(shares):
        lay_out_columns(x, x_row, 5, 5, share, shares, panels)
    chosen = x[np.pad(x_row, (0, blocks * COLUMNS - P), mode="edge")]
    want = [numpy_panel(chosen[b * COLUMNS : (b + 1) * COLUMNS]) for b in range(blocks)]
    np.testing.assert_array_equal(panels[5:], np.concatenate(want))
    assert np.isnan(panels[:5]).all()


@pytest.mark.parametrize("I", [16, 48, 64, 80, 416, 3200])  # 3200: 50 vectors to a part, more than are used at a time
@pytest.mark.parametrize("panels", [1, 4])
def test_products_of_panels(I, panels):  # noqa: E741
    """Small integers, whose sums are exact in any order: each product at its place, each vector once."""
    rng = np.random.default_rng(I)
    rows, columns = (rng.integers(-8, 9, (n, I)).astype(np.float32) for n in (panels * ROWS, COLUMNS))
    weights = np.concatenate([numpy_panel(rows[p * ROWS : (p + 1) * ROWS]) for p in range(panels)])
    sums = np.full(panels * PARTS * ROWS * COLUMNS * 16, np.nan, np.float32)
    multiply_panels(weights, panels, numpy_panel(columns), 0, I // 16, sums)
    for panel in range(panels):
        totals = np.full(-(-ROWS * COLUMNS // 16) * 16, np.nan, np.float32)
        totals_of_panel(panel, sums, totals)
        got = totals[: ROWS * COLUMNS].reshape(ROWS, COLUMNS)
        np.testing.assert_array_equal(got, rows[panel * ROWS : (panel + 1) * ROWS] @ columns.T)


@kernel
def _add_up(sums, at, totals):
    add_up(sums, at, totals)


def test_the_order_of_the_totals():
    """(a + b) + (c + d), then halves to halves, in float32 at each step: as `linear.dot` ends."""
    sums = np.random.default_rng(0).normal(size=(PARTS, ROWS * COLUMNS, 16)).astype(np.float32)
    totals = np.full(-(-ROWS * COLUMNS // 16) * 16, np.nan, np.float32)
    _add_up(np.append(np.float32([np.nan]), sums), 1, totals)
    vectors = (sums[0] + sums[1]) + (sums[2] + sums[3])
    while vectors.shape[1] > 1:
        half = vectors.shape[1] // 2
        vectors = vectors[:, :half] + vectors[:, half:]
    np.testing.assert_array_equal(totals[: ROWS * COLUMNS], vectors[:, 0])


def test_which_columns_stand_in_panels():
    """None of a few; whole panels, with the rest where it fills most of one."""
    if COLUMNS == 6:
        counts = (1, 4, 5, 6, 7, 9, 10, 12, 15, 16)
        assert [in_panels(count) for count in counts] == [0, 0, 5, 6, 6, 6, 10, 12, 12, 16]
    for count in range(40):
        many = in_panels(count)
        assert count <= FEW or count - many < FEW
        assert many == count or many % COLUMNS == 0
