"""Fused attention: scores, softmax with the sink, and weighted values of one query head at a time.

Twin of `attention_scores`, `attention_weights` and `attention_heads` in `reference/ops.py`; the [H,T,S]
matrices between them are never formed. Sums over keys start at a query's first visible key and never depend on
how the keys came into the cache. Keys and values in float16 are widened as they are read.
"""

import math

import numpy as np

from assay.fast.cpu import simd
from assay.fast.cpu.cache import LANES, LayerCache
from assay.fast.cpu.decode import float_at, half_at
from assay.fast.cpu.elementwise import exp
from assay.fast.cpu.jit import inlined, kernel, parallel_kernel, prange

RUN = 64  # keys whose weighted values are summed before the sum is added to the others: few roundings in a chain


@inlined
def load16(half, data, at):
    """16 numbers from number `at` on, float32 or float16."""
    if half:
        return simd.halves_to_floats(simd.load_16_halfwords(data, 2 * at))
    return simd.load_floats(data, 4 * at)


@inlined
def scores_of_block(half, q_C, slots, block, head):
    """q times 16 keys that stand side by side."""
    C, keys = len(q_C), slots.k
    a = b = c = d = simd.zeros()
    at = (block * slots.heads + head) * C * LANES
    for i in range(0, C - 3, 4):
        a = simd.multiply_add(simd.splat(q_C[i]), load16(half, keys, at + LANES * i), a)
        b = simd.multiply_add(simd.splat(q_C[i + 1]), load16(half, keys, at + LANES * (i + 1)), b)
        c = simd.multiply_add(simd.splat(q_C[i + 2]), load16(half, keys, at + LANES * (i + 2)), c)
        d = simd.multiply_add(simd.splat(q_C[i + 3]), load16(half, keys, at + LANES * (i + 3)), d)
    for i in range(C // 4 * 4, C):
        a = simd.multiply_add(simd.splat(q_C[i]), load16(half, keys, at + LANES * i), a)
    return simd.add(simd.add(a, b), simd.add(c, d))


@inlined
def weighted_values(half, weights, slots, slot, head, out_C):
    """Add the values from a slot on, times the weights, to `out_C`."""
    S, K, C, values = slots.blocks * LANES, slots.heads, len(out_C), slots.v
    for c in range(0, C - 15, 16):
        even = odd = simd.zeros()
        s = slot
        for n in range(0, len(weights) - 1, 2):
            after = s + 1 if s + 1 < S else 0
            even = simd.multiply_add(simd.splat(weights[n]), load16(half, values, (s * K + head) * C + c), even)
            at = (after * K + head) * C + c
            odd = simd.multiply_add(simd.splat(weights[n + 1]), load16(half, values, at), odd)
            s = after + 1 if after + 1 < S else 0
        if len(weights) % 2:
            last = weights[len(weights) - 1]
            even = simd.multiply_add(simd.splat(last), load16(half, values, (s * K + head) * C + c), even)
        simd.store_floats(out_C, c, simd.add(simd.load_floats(out_C, c), simd.add(even, odd)))
    for c in range(C // 16 * 16, C):
        total, s = np.float32(0), slot
        for n in range(len(weights)):
            at = (s * K + head) * C + c
            total += weights[n] * (half_at(values, 2 * at) if half else float_at(values, 4 * at))
            s = s + 1 if s + 1 < S else 0
        out_C[c] += total


@kernel
def largest_of(weights, least):
    """The largest of some numbers in whole vectors, at least `least`."""
    largest = np.empty(LANES, np.float32)
    vector = simd.splat(np.float32(least))
    for n in range(0, len(weights), LANES):
        vector = simd.larger(simd.load_floats(weights, n), vector)
    simd.store_floats(largest, 0, vector)
    for lane in range(LANES):
        least = max(least, largest[lane])
    return np.float32(least)


@kernel
def attend_one(q_C, slots, start, first, last, head, sink, out_C):
    """One query head over the keys of positions first .. last, in slots that begin at position `start`."""
    blocks, S, count = slots.blocks, slots.blocks * LANES, last + 1 - first
    begin = (first - start) // LANES  # the first block with a visible key
    before = first - start - begin * LANES
    weights = np.empty((before + count + LANES - 1) // LANES * LANES, np.float32)
    scale = simd.splat(np.float32(1 / math.sqrt(len(q_C))))
    for n in range(0, len(weights), LANES):
        block = (begin + n // LANES) % blocks
        if slots.half:  # asked here, so that there is one loop over the numbers of either kind
            score = scores_of_block(True, q_C, slots, block, head)
        else:
            score = scores_of_block(False, q_C, slots, block, head)
        simd.store_floats(weights, n, simd.multiply(score, scale))
    for n in range(before):
        weights[n] = -np.inf
    for n in range(before + count, len(weights)):
        weights[n] = -np.inf
    largest = largest_of(weights, np.float32(sink))
    total = simd.zeros()
    for n in range(len(weights)):
        weights[n] = exp(weights[n] - largest)
    for n in range(0, len(weights), LANES):
        total = simd.add(total, simd.load_floats(weights, n))
    for c in range(len(out_C)):
        out_C[c] = 0
    for n in range(0, count, RUN):
        run = weights[before + n : before + min(n + RUN, count)]
        if slots.half:
            weighted_values(True, run, slots, (first - start + n) % S, head, out_C)
        else:
            weighted_values(False, run, slots, (first - start + n) % S, head, out_C)
    # the sink takes weight but has no value
    share = np.float32(1) / (simd.sum_floats(total) + exp(np.float32(sink) - largest))
    for c in range(len(out_C)):
        out_C[c] *= share


@parallel_kernel
def _attend(q_THC, slots, start, length, window, sink_H, out_THC):
    T, H = q_THC.shape[0], q_THC.shape[1]
    G = H // slots.heads
    for job in prange(T * H):
        t, h = np.int64(job) % T, np.int64(job) // T  # all of a head's queries: threads share long and short ones
        last = length + t
        first = max(np.int64(0), last + 1 - window)  # the window counts the query's own position
        attend_one(q_THC[t, h], slots, start, first, last, h // G, sink_H[h], out_THC[t, h])


def attend(
    q_THC: np.ndarray, k_TKC: np.ndarray, v_TKC: np.ndarray, layer: LayerCache, sink_H: np.ndarray
) -> np.ndarray:
    """Causal grouped-query attention of a chunk to the layer's past and to itself: [T,H,C], float32.

    Query head h reads key head h // G. A sink of -inf is none. The cache's length stays as it is.
    """
    out_THC = np.empty_like(q_THC)
    slots = layer.with_chunk(k_TKC, v_TKC)
    _attend(q_THC, slots.in_bytes(), slots.start, layer.length, layer.window, sink_H, out_THC)
    return out_THC
