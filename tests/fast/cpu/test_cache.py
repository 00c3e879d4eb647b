"""The ring and the growing cache hold exactly the positions that a later query may see."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from assay.fast.cpu.cache import FIRST_CAPACITY, LayerCache

CHUNKS = st.lists(st.integers(1, 25), min_size=1, max_size=12)


def keys_values(position_T):
    """Keys [T,2,3] that say their position, head and channel, and values that are their negatives."""
    k = position_T[:, None, None] + np.float32([[0, 0.1, 0.2], [0.5, 0.6, 0.7]])
    return k.astype(np.float32), -k.astype(np.float32)


def assert_holds(kv, position_T):
    for got, want in zip(kv, keys_values(position_T), strict=True):
        np.testing.assert_array_equal(got, want)


@given(window=st.none() | st.integers(1, 40), chunks=CHUNKS)
def test_holds_the_last_positions(window, chunks):
    """After any chunks, for all or for the window's last; and together with the next chunk, which is not counted."""
    layer = LayerCache(window, 2, 3)
    for T in chunks:
        start = layer.length
        position_T = np.arange(start, start + T)
        slots = layer.with_chunk(*keys_values(position_T))
        visible = np.arange(max(0, start + 1 - (window or start + 1)), start + T)
        assert_holds(slots.get(visible), visible)
        assert layer.length == start
        layer.append(*keys_values(position_T))
        kept = np.arange(max(0, layer.length - (window or layer.length)), layer.length)
        assert_holds(layer.past(), kept)
    assert layer.length == sum(chunks)


def test_float16_to_nearest_even():
    """Ties, subnormals and what has no float16; and growth keeps the type."""
    numbers = np.float32([1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25, 65519.99, 65520, -1e30, np.nan])
    wanted = np.float16([1, 1 + 2**-9, 0, 2**-23, 65504, np.inf, -np.inf, np.nan])
    layer = LayerCache(None, 1, 8, np.dtype(np.float16))
    for start in range(0, FIRST_CAPACITY + 1, 13):
        T = min(13, FIRST_CAPACITY + 1 - start)
        layer.append(*[np.tile(numbers, (T, 1, 1))] * 2)
    for array in layer.past():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, np.tile(wanted, (FIRST_CAPACITY + 1, 1, 1)))
    slots = layer.slots.in_bytes()
    assert slots.half
    assert (slots.v.nbytes, slots.blocks) == (2 * FIRST_CAPACITY * 8 * 2, 2 * FIRST_CAPACITY // 16)


def test_keys_of_a_block_stand_side_by_side():
    layer = LayerCache(None, 2, 3)
    layer.append(*keys_values(np.arange(20)))
    np.testing.assert_array_equal(layer.slots.k[1, 1, 2, :4], np.float32([16, 17, 18, 19]) + np.float32(0.7))
    np.testing.assert_array_equal(layer.slots.v[17, 1], -np.float32([17.5, 17.6, 17.7]))


@given(window=st.integers(1, 40), length=st.integers(1, 100), T=st.integers(1, 100))
def test_a_chunk_not_counted_hides_nothing_of_a_ring(window, length, T):
    layer = LayerCache(window, 2, 3)
    layer.append(*keys_values(np.arange(length)))
    layer.with_chunk(*keys_values(np.arange(length, length + T)))
    visible = np.arange(max(0, length + 1 - window), length)
    assert_holds(layer.slots.get(visible), visible)


def test_a_ring_does_not_grow():
    layer = LayerCache(24, 2, 3)
    layer.append(*keys_values(np.arange(1000)))
    assert len(layer.slots.v) == 32
    assert layer.slots.k.size == layer.slots.v.size


def test_growth_keeps_what_was_there():
    layer = LayerCache(None, 2, 3)
    layer.append(*keys_values(np.arange(FIRST_CAPACITY)))
    layer.append(*keys_values(np.arange(FIRST_CAPACITY, FIRST_CAPACITY + 1)))
    assert len(layer.slots.v) == 2 * FIRST_CAPACITY
    assert_holds(layer.past(), np.arange(FIRST_CAPACITY + 1))
