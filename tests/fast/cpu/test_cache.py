"""The ring and the growing cache hold exactly the positions that a later query may see."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from assay.fast.cpu.cache import FIRST_CAPACITY, LayerCache


@given(window=st.none() | st.integers(1, 9), chunks=st.lists(st.integers(1, 25), min_size=1, max_size=12))
def test_holds_the_last_positions(window, chunks):
    """After any chunks, position s is in slot s % capacity, for all or for the window's last."""
    layer = LayerCache(window, 2, 3)
    for T in chunks:
        position_T = np.arange(layer.length, layer.length + T, dtype=np.float32)
        k_TKC = np.broadcast_to(position_T[:, None, None], (T, 2, 3))
        layer.append(k_TKC, -k_TKC)
    assert layer.length == sum(chunks)
    kept = np.arange(max(0, layer.length - (window or layer.length)), layer.length)
    assert (layer.k[kept % len(layer.k)] == kept[:, None, None]).all()
    assert (layer.v[kept % len(layer.v)] == -kept[:, None, None]).all()


def test_a_ring_does_not_grow():
    layer = LayerCache(8, 1, 2)
    layer.append(np.ones((1000, 1, 2), np.float32), np.ones((1000, 1, 2), np.float32))
    assert len(layer.k) == 8


def test_growth_keeps_what_was_there():
    layer = LayerCache(None, 1, 2)
    first = np.random.default_rng(0).normal(size=(FIRST_CAPACITY, 1, 2)).astype(np.float32)
    layer.append(first, 2 * first)
    layer.append(first[:1], first[:1])
    assert len(layer.k) == 2 * FIRST_CAPACITY
    np.testing.assert_array_equal(layer.k[:FIRST_CAPACITY], first)
    np.testing.assert_array_equal(layer.v[:FIRST_CAPACITY], 2 * first)
