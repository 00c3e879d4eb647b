"""Fused attention over the cache against the oracle's three steps over all keys, in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.fast.cpu.attention import attend
from assay.fast.cpu.cache import LayerCache
from assay.reference.ops import attention_heads, attention_mask, attention_scores, attention_weights
from tests.fast.cpu.poison import poisoned

DTYPES = [np.float32, np.float16]


def oracle(q, k, v, window, sink):
    """[T,H,C] in float64, all T queries over all T keys."""
    q, k, v, sink = (a.astype(np.float64) for a in (q, k, v, sink))
    mask = attention_mask(np.arange(len(q)), np.arange(len(k)), window)
    return attention_heads(attention_weights(attention_scores(q, k, mask), mask, sink), v)


def in_chunks(q, k, v, window, sink, chunks, dtype=np.float32):
    """[T,H,C] from the kernel, chunk by chunk; slots of the cache that were never written hold NaN."""
    layer, parts, start = LayerCache(window, *k.shape[1:], np.dtype(dtype)), [], 0
    layer.slots.k.fill(np.nan)
    layer.slots.v.fill(np.nan)
    for T in chunks:
        rows = slice(start, start + T)
        parts.append(poisoned(attend, q[rows], k[rows], v[rows], layer, sink))
        layer.append(k[rows], v[rows])
        start += T
    return np.concatenate(parts)


def inputs(T, H, K, C, seed=0, sinks=True):
    """Random q, k, v and sinks, or none (-inf)."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(T, heads, C)).astype(np.float32) for heads in (H, K, K))
    return q, k, v, rng.normal(size=H).astype(np.float32) if sinks else np.full(H, -np.inf, np.float32)


def assert_float32(got, q, k, v, window, sink):
    """Within 1e-6: values are of size 1, weights sum to 1, and each score of size up to about 10 is rounded to
    10 U = 6e-7, which the exponential turns into as much relative error of its weight."""
    np.testing.assert_allclose(got, oracle(q, k, v, window, sink), atol=1e-6)


def stored(dtype, *arrays):
    """What a cache of that dtype holds of some arrays."""
    with np.errstate(over="ignore"):
        return [array.astype(dtype).astype(np.float32) for array in arrays]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize(("T", "H", "K", "C"), [(1, 1, 1, 2), (2, 6, 2, 20), (5, 4, 4, 7), (40, 8, 1, 32)])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_single_pass(T, H, K, C, window, sinks, dtype):
    """A float16 cache against the oracle on keys and values rounded to float16."""
    q, k, v, sink = inputs(T, H, K, C, sinks=sinks)
    assert_float32(in_chunks(q, k, v, window, sink, [T], dtype), q, *stored(dtype, k, v), window, sink)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(window=st.none() | st.integers(1, 9), chunks=st.lists(st.integers(1, 25), min_size=1, max_size=6))
def test_any_chunks_across_the_ring(window, chunks, dtype):
    """Chunks longer than the window, wraps, ends on and beside the boundary."""
    q, k, v, sink = inputs(sum(chunks), 4, 2, 8)
    got = in_chunks(q, k, v, window, sink, chunks, dtype)
    assert_float32(got, q, *stored(dtype, k, v), window, sink)
    np.testing.assert_array_equal(got, in_chunks(q, k, v, window, sink, [len(q)], dtype))


def test_a_key_beyond_float16_s_range_is_infinity():
    """NaN comes out where the oracle has it, given a key with an infinity in it; and 65519 is a number still."""
    q, k, v, sink = inputs(6, 2, 1, 16)
    k[2, 0, 5] = 65520
    k16, v16 = stored(np.float16, k, v)
    assert np.isinf(k16).sum() == 1
    with np.errstate(invalid="ignore"):
        want = oracle(q, k16, v16, 3, sink)
    np.testing.assert_allclose(in_chunks(q, k, v, 3, sink, [6], np.float16), want, atol=1e-6)
    assert np.isnan(want[2:5]).any()
    k[2, 0, 5] = 65519
    assert np.isfinite(in_chunks(q, k, v, 3, sink, [6], np.float16)).all()


def test_a_value_beyond_float16_s_range_is_infinity():
    """For the queries that see it, in its channel; all else as if it were another number."""
    q, k, v, sink = inputs(6, 2, 1, 16)
    v[2, 0, 5] = -65520
    got, others = in_chunks(q, k, v, 3, sink, [6], np.float16), np.arange(16) != 5
    assert (got[2:5, :, 5] == -np.inf).all()
    assert np.isfinite(got[[0, 1, 5]]).all()
    np.testing.assert_array_equal(got[..., others], in_chunks(q, k, v * 0.5, 3, sink, [6], np.float16)[..., others] * 2)


@pytest.mark.parametrize("last", [127, 128, 129, 300])
def test_the_window_of_gpt_oss(last):
    """A prompt, then token by token over the boundary."""
    q, k, v, sink = inputs(last + 3, 4, 2, 16)
    assert_float32(in_chunks(q, k, v, 128, sink, [last, 1, 1, 1]), q, k, v, 128, sink)


def test_literal_window_and_sink():
    """Equal scores: each visible key and the sink share the weight alike."""
    q, k = np.zeros((4, 1, 1), np.float32), np.ones((4, 1, 1), np.float32)
    v = np.float32([1, 10, 100, 1000]).reshape(4, 1, 1)
    got = in_chunks(q, k, v, 2, np.zeros(1, np.float32), [4]).ravel()
    np.testing.assert_allclose(got, [1 / 2, 11 / 3, 110 / 3, 1100 / 3], rtol=1e-6)


def test_large_scores_do_not_overflow():
    """The maximum is subtracted, the sink's too."""
    q, k, v, sink = inputs(3, 2, 1, 4)
    q, k = q * 1000, k * 1000
    assert np.isfinite(in_chunks(q, k, v, None, sink, [3])).all()
    np.testing.assert_array_equal(in_chunks(q, k, v, None, np.full(2, 1e30, np.float32), [3]), 0)


def test_nan_reaches_the_queries_that_see_it_only():
    q, k, v, sink = inputs(5, 2, 1, 4)
    k[2] = np.nan
    got = in_chunks(q, k, v, 2, sink, [5])
    np.testing.assert_array_equal(np.isnan(got).all(axis=(1, 2)), [False, False, True, True, False])
    assert not np.isnan(got[[0, 1, 4]]).any()
