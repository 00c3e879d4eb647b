"""Fused attention: scores, softmax with the sink, and weighted values of one query head at a time.

Twin of `attention_scores`, `attention_weights` and `attention_heads` in `reference/ops.py`; the [H,T,S]
matrices between them are never formed.
"""

import math

import numpy as np

from assay.fast.cpu.cache import LayerCache
from assay.fast.cpu.jit import kernel, parallel_kernel, prange
from assay.fast.cpu.linear import dot


@kernel
def at(past_SKC, chunk_TKC, length, s, head):
    """Key or value of position s: in the ring before the chunk begins, in the chunk from there on."""
    if s < length:
        return past_SKC[s % len(past_SKC), head]
    return chunk_TKC[s - length, head]


@kernel
def attend_one(q_C, past, chunk, length, first, last, head, sink, out_C):
    """One query head over the keys first .. last; `past` and `chunk` are (keys, values) pairs."""
    weights = np.empty(last + 1 - first, np.float32)
    scale = np.float32(1 / math.sqrt(len(q_C)))
    largest = sink
    for s in range(first, last + 1):
        score = dot(q_C, at(past[0], chunk[0], length, s, head)) * scale
        weights[s - first] = score
        largest = max(largest, score)
    total = np.float64(math.exp(sink - largest))  # the sink takes weight but has no value
    sums = np.zeros(len(q_C), np.float64)  # over S terms one after the other: float32 would round too often
    for s in range(first, last + 1):
        weight = math.exp(weights[s - first] - largest)
        total += weight
        v_C = at(past[1], chunk[1], length, s, head)
        for c in range(len(v_C)):
            sums[c] += weight * v_C[c]
    for c in range(len(out_C)):
        out_C[c] = sums[c] / total


@parallel_kernel
def _attend(q_THC, past, chunk, length, window, sink_H, out_THC):
    T, H = q_THC.shape[0], q_THC.shape[1]
    G = H // chunk[0].shape[1]
    for job in prange(T * H):
        t, h = np.int64(job) % T, np.int64(job) // T  # all of a head's queries: threads share long and short ones
        last = length + t
        first = max(np.int64(0), last + 1 - window)  # the window counts the query's own position
        attend_one(q_THC[t, h], past, chunk, length, first, last, h // G, sink_H[h], out_THC[t, h])


def attend(
    q_THC: np.ndarray, k_TKC: np.ndarray, v_TKC: np.ndarray, layer: LayerCache, sink_H: np.ndarray
) -> np.ndarray:
    """Causal grouped-query attention of a chunk to the layer's past and to itself: [T,H,C], float32.

    Query head h reads key head h // G. A sink of -inf is none. The cache is not changed.
    """
    out_THC = np.empty_like(q_THC)
    _attend(q_THC, (layer.k, layer.v), (k_TKC, v_TKC), layer.length, layer.window, sink_H, out_THC)
    return out_THC
