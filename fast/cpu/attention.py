"""Fused attention: scores, softmax with the sink, and weighted values of the query heads of one key head.

Twin of `attention_scores`, `attention_weights` and `attention_heads` in `reference/ops.py`; the [H,T,S]
matrices between them are never formed. Sums over keys start at a query's first visible key and never depend on
how the keys came into the cache. Keys and values in float16 are widened as they are read.
"""

import math
from collections.abc import Sequence

import numpy as np

from assay.fast.cpu import simd
from assay.fast.cpu.cache import LANES, LayerCache, Slots
from assay.fast.cpu.decode import float_at, half_at
from assay.fast.cpu.elementwise import exp
from assay.fast.cpu.heads import COUNTS, add_weighted_values, scores_of_block
from assay.fast.cpu.jit import Address, inlined, kernel, parallel_kernel, piece, prange
from assay.fast.cpu.phases import address, call_at, codes_at

RUN = 64  # keys whose weighted values are summed before the sum is added to the others: few roundings in a chain
TOGETHER = max(COUNTS)  # query heads that make a job


@inlined
def number_at(half, data, at):
    """Number `at`, float32 or float16."""
    return half_at(data, 2 * at) if half else float_at(data, 4 * at)


@inlined
def add_rest_of_values(n, weights, first, slots, slot, head, C, out, to):
    """What `add_weighted_values` leaves out of n values from a slot on: a query head's last C % 16 channels."""
    S, K = slots.blocks * LANES, slots.heads
    for c in range(C // LANES * LANES, C):
        total, s = np.float32(0), slot
        for i in range(first, first + n):
            total += weights[i] * number_at(slots.half, slots.v, (s * K + head) * C + c)
            s = s + 1 if s + 1 < S else 0
        out[to + c] += total


@inlined
def soften(weights, before, end, sink):
    """Make scores, float32 [S], their exponentials, zero before `before` and from `end` on; what one of them counts."""
    for n in range(before):
        weights[n] = -np.inf
    for n in range(end, len(weights)):
        weights[n] = -np.inf
    vector = simd.splat(np.float32(sink))
    for n in range(0, len(weights), LANES):
        vector = simd.larger(simd.load_floats(weights, n), vector)
    largest, total = simd.largest_float(vector), simd.zeros()
    for n in range(len(weights)):
        weights[n] = exp(weights[n] - largest)
    for n in range(0, len(weights), LANES):
        total = simd.add(total, simd.load_floats(weights, n))
    # the sink takes weight but has no value
    return np.float32(1) / (simd.sum_floats(total) + exp(np.float32(sink) - largest))


@piece
def attend_heads(q, at, C, sinks, h, heads, slots, start, first, last, head, out):
    """Query heads h and after, 1, 2 or 4, of one key head over the keys of positions first .. last.

    `q` and `out` are flat, float32: head h's query and output are C numbers from place `at` on. The slots begin at
    position `start`.
    """
    blocks, S, count = slots.blocks, slots.blocks * LANES, last + 1 - first
    begin = (first - start) // LANES  # the first block with a visible key
    before = first - start - begin * LANES
    size = (before + count + LANES - 1) // LANES * LANES
    weights = np.empty(heads * size, np.float32)
    scale = np.float32(1 / math.sqrt(C))
    for n in range(0, size, LANES):
        keys = (((begin + n // LANES) % blocks) * slots.heads + head) * C * LANES
        scores_of_block(slots.half, heads, q, at, C, slots.k, keys, scale, weights, n, size)
    outputs = out[at : at + heads * C]
    for i in range(len(outputs)):
        outputs[i] = 0
    shares = np.empty(heads, np.float32)
    for g in range(heads):
        shares[g] = soften(weights[g * size : (g + 1) * size], before, before + count, sinks[h + g])
    for n in range(0, count, RUN):
        some, slot = min(RUN, count - n), (first - start + n) % S
        row, place = slots.heads * C, head * C
        add_weighted_values(
            slots.half, heads, some, weights, before + n, size, slots.v, slot, S, row, place, C, out, at
        )
        for g in range(heads):
            add_rest_of_values(some, weights, g * size + before + n, slots, slot, head, C, out, at + g * C)
    for g in range(heads):
        for i in range(C):
            outputs[g * C + i] *= shares[g]


@inlined
def heads_of_job(job, G):
    """The key head, the first of its G query heads and how many: up to `TOGETHER` of one key head make a job."""
    parts = (G + TOGETHER - 1) // TOGETHER
    head, done = job // parts, job % parts * TOGETHER
    return head, head * G + done, min(TOGETHER, G - done)


@kernel
def attend_some(q, at, C, sinks, h, heads, slots, start, first, last, head, out):
    """`attend_heads` of any number of them."""
    done = 0
    while done < heads:
        some = 4 if heads - done >= 4 else 2 if heads - done >= 2 else 1
        attend_heads(q, at + done * C, C, sinks, h + done, some, slots, start, first, last, head, out)
        done += some


ATTEND_SOME = Address(attend_some)


@parallel_kernel
def _attend(run, q, past_P, position_P, pasts, K, half, H, C, window, sink_H, out):
    P, G = len(position_P), H // K
    for job in prange(P * K * ((G + TOGETHER - 1) // TOGETHER)):
        i = np.int64(job) % P
        p = i // 2 if i % 2 == 0 else P - 1 - i // 2  # threads share queries of few and of many keys
        head, h, some = heads_of_job(np.int64(job) // P, G)
        k, v, blocks, start = pasts[past_P[p]]
        size = blocks * LANES * K * C * (2 if half else 4)
        slots = Slots(codes_at(k, size), codes_at(v, size), blocks, K, half)
        last = position_P[p]
        first = max(np.int64(0), last + 1 - window)  # the window counts the query's own position
        call_at(run, (q, (p * H + h) * C, C, sink_H, h, some, slots, start, first, last, head, out))


def attend(
    q_THC: np.ndarray, k_TKC: np.ndarray, v_TKC: np.ndarray, layer: LayerCache, sink_H: np.ndarray
) -> np.ndarray:
    """Causal grouped-query attention of a chunk to the layer's past and to itself: [T,H,C], float32.

    Query head h reads key head h // G. A sink of -inf is none. The cache's length stays as it is.
    """
    return attend_each(q_THC, k_TKC, v_TKC, [slice(0, len(q_THC))], [layer], sink_H)


def attend_each(
    q_PHC: np.ndarray,
    k_PKC: np.ndarray,
    v_PKC: np.ndarray,
    pieces: Sequence[slice],
    layers: Sequence[LayerCache],
    sink_H: np.ndarray,
) -> np.ndarray:
    """`attend` of several sequences, each the piece of the rows that is its own, with a past of its own: [P,H,C]."""
    P, H, C = q_PHC.shape
    q, out_PHC = np.ascontiguousarray(q_PHC).reshape(-1), np.empty(q_PHC.shape, np.float32)
    held = [layer.with_chunk(k_PKC[own], v_PKC[own]) for own, layer in zip(pieces, layers, strict=True)]
    pasts = np.array([(address(slots.k), address(slots.v), len(slots.k), slots.start) for slots in held], np.int64)
    past_P, position_P = np.empty(P, np.int64), np.empty(P, np.int64)
    for number, (own, layer) in enumerate(zip(pieces, layers, strict=True)):
        past_P[own] = number
        position_P[own] = np.arange(layer.length, layer.length + own.stop - own.start)
    one, out = held[0].in_bytes(), out_PHC.reshape(-1)
    run = ATTEND_SOME.of((q, 0, C, sink_H, 0, 0, one, 0, 0, 0, 0, out))
    _attend(run, q, past_P, position_P, pasts, one.heads, one.half, H, C, layers[0].window, sink_H, out)
    return out_PHC
