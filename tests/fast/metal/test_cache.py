"""Rings and growing arrays against a list of everything ever appended, and masks against small literal ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.peers


def array_of(start, T):
    """Keys whose value is their position: [1,1,T,1]."""
    import mlx.core as mx

    return mx.arange(start, start + T, dtype=mx.float32).reshape(1, 1, T, 1)


def seen_by_each(keys, mask, T):
    """Positions that each of T queries sees, as sets."""
    import mlx.core as mx

    held = np.array(keys).ravel().astype(int)
    if mask is None:
        mask = np.ones((T, len(held)), bool)
    elif isinstance(mask, str):
        mask = np.tri(T, len(held), len(held) - T, dtype=bool)
    else:
        assert mask.dtype == mx.bool_
        mask = np.array(mask)
    return [set(held[row]) for row in mask]


@settings(max_examples=60)
@given(
    st.sampled_from([None, 1, 3, 8, 257]), st.lists(st.sampled_from([1, 2, 3, 5, 8, 9, 300]), min_size=1, max_size=12)
)
def test_each_query_sees_its_window(window, chunks):
    from assay.fast.metal.cache import LayerCache, visible_keys

    cache, start = LayerCache(window), 0
    for T in chunks:
        k, v = cache.extend(array_of(start, T), -array_of(start, T))
        sets = seen_by_each(k, visible_keys(window, start, T), T)
        for t, seen in enumerate(sets):
            first = 0 if window is None else max(0, start + t - window + 1)
            assert seen == set(range(first, start + t + 1))
        np.testing.assert_array_equal(np.array(v), -np.array(k))
        cache.commit(T)
        start += T
        assert cache.length == start


@given(st.sampled_from([None, 3, 8]), st.integers(0, 10), st.sampled_from([1, 2, 9]))
@settings(max_examples=30)
def test_what_is_not_committed_leaves_no_trace(window, before, T):
    from assay.fast.metal.cache import LayerCache

    cache, untouched = LayerCache(window), LayerCache(window)
    for start in range(before):
        for each in (cache, untouched):
            each.extend(array_of(start, 1), array_of(start, 1))
            each.commit(1)
    cache.extend(array_of(900, T), array_of(900, T))
    assert cache.length == before
    for size in (3, 1):
        again, expected = (
            each.extend(array_of(before, size), array_of(before, size))[0] for each in (cache, untouched)
        )
        np.testing.assert_array_equal(np.array(again), np.array(expected))


def test_masks_by_hand():
    from assay.fast.metal.cache import visible_keys

    assert visible_keys(4, 7, 1) is None
    assert visible_keys(4, 1, 3) == visible_keys(None, 9, 2) == "causal"
    mask = visible_keys(2, 3, 3)  # keys 2 to 5, queries 3 to 5
    np.testing.assert_array_equal(np.array(mask), np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool))
