"""ggml's roundings of activations, spelled out; against ggml's own code in test_precision_peers.py."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.reference.precision import SUPERBLOCK, round_q8_K


def test_q8_K_literally():
    """The step is 2 downwards: codes -127, -0.5, -1.5, 2.5, -1, halves to even."""
    x = np.zeros((2, SUPERBLOCK))
    x[0, :5] = [254, 1, 3, -5, 2]
    rounded = round_q8_K(x)
    assert rounded[0, :6].tolist() == [254, 0, 4, -4, 2, 0]
    assert not rounded[1].any()
    assert rounded.dtype == x.dtype


def test_q8_K_of_values_that_have_no_integers():
    """NaN and infinity take their block along and no other; a factor beyond float32 leaves zeros, as 1 over it."""
    x = np.ones((4, 2 * SUPERBLOCK), np.float32)
    x[0, 3], x[1, 3] = np.nan, -np.inf
    x[2] = 1e-39
    rounded = round_q8_K(x)
    assert np.isnan(rounded[:2, :SUPERBLOCK]).all()
    np.testing.assert_allclose(rounded[:2, SUPERBLOCK:], 1, rtol=1e-6)
    assert not rounded[2].any()
    np.testing.assert_allclose(rounded[3], 1, rtol=1e-6)


@given(arrays(np.float32, (2, SUPERBLOCK), elements=st.integers(-(2**20), 2**20).map(lambda n: n / 1024)))
def test_q8_K_is_within_half_a_step_and_keeps_the_extreme(x):
    rounded = round_q8_K(x)
    largest = np.abs(x).max(axis=1, keepdims=True)
    assert np.all(np.abs(rounded - x) <= largest / 127 * 0.5001)
    at = np.abs(x).argmax(axis=1)
    np.testing.assert_allclose(rounded[[0, 1], at], x[[0, 1], at], rtol=1e-6)
