"""Mistakes of attention in the Numba path: masks, values, sinks and heads changed, by attention in NumPy."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from assay.golden.mistakes.injecting import Array, Injection, Wrap, calls
from assay.loaders.checkpoint import Checkpoint


class Attended(NamedTuple):
    """What attention works on: who sees whom [T,S], values for every query head [S,H,C], how many keys came before."""

    mask_TS: Array
    v_SHC: Array
    past: int
    window: int


def attending(
    change: Callable[[Attended], tuple[Array, Array]], by_turns: bool = False, sink: str = "honest"
) -> Injection:
    """Attention in NumPy over all keys since the beginning, with the mask and values that `change` answers.

    `sink`: "honest", "not shifted" (by the scores' maximum), or "valued" (it leads to the first key's value).
    """
    history: dict[int, tuple[Array, Array]] = {}  # keys and values of each layer's cache, none of them dropped

    def attend(original: Any, q_THC: Array, k_TKC: Array, v_TKC: Array, layer: Any, sink_H: Array) -> Array:
        T, H, C = q_THC.shape
        past = layer.length
        if past:
            k, v = (np.concatenate(pair) for pair in zip(history[id(layer)], (k_TKC, v_TKC), strict=True))
        else:
            k, v = k_TKC.copy(), v_TKC.copy()
        history[id(layer)] = k, v
        repeat = np.tile(np.arange(k.shape[1]), H // k.shape[1]) if by_turns else np.arange(H) // (H // k.shape[1])
        distance_TS = (past + np.arange(T))[:, None] - np.arange(past + T)
        mask_TS, v = change(
            Attended((distance_TS >= 0) & (distance_TS < layer.window), v[:, repeat], past, layer.window)
        )
        scores = np.einsum("thc,shc->hts", q_THC, k[:, repeat], dtype=np.float64) / math.sqrt(C)
        scores = np.where(mask_TS, scores, -np.inf)
        top = np.maximum(scores.max(-1, keepdims=True), -1e30) if sink == "not shifted" else 0.0
        e, s = np.exp(scores - top), np.exp(sink_H.astype(np.float64))[:, None, None]
        with np.errstate(invalid="ignore"):
            weights = e / (e.sum(-1, keepdims=True) + s)
            if sink == "valued":
                weights[..., 0] += 1 - weights.sum(-1)
            return np.einsum("hts,shc->thc", weights, v).astype(np.float32)

    return calls("attend", attend)


def masked(change: Callable[[Array, int], Array], **more: Any) -> Injection:
    """Attention with a changed mask, [T,S], for so many keys in the past."""
    return attending(lambda a: (change(a.mask_TS, a.past), a.v_SHC), **more)


def first_hidden(mask_TS: Array, past: int) -> Array:
    """Key 0 hidden from all queries but the first."""
    later_T = past + np.arange(len(mask_TS)) > 0
    return mask_TS & ~(later_T[:, None] & (np.arange(mask_TS.shape[1]) == 0))


def from_chunk_start(a: Attended) -> Array:
    """The mask of a chunk that took its first query for position 0."""
    T, S = a.mask_TS.shape
    distance_TS = np.arange(T)[:, None] - np.arange(S)
    return (distance_TS >= 0) & (distance_TS < a.window)


def valued(change: Callable[[Attended], Array]) -> Injection:
    """Attention with other values."""
    return attending(lambda a: (a.mask_TS, change(a)))


def rolled(by: int) -> Injection:
    """Values of the past rolled among themselves."""
    return valued(lambda a: np.concatenate((np.roll(a.v_SHC[: a.past], by, 0), a.v_SHC[a.past :])))


def ring_rolled(config: Any) -> Mapping[str, Wrap]:
    """Values of the window - 1 newest positions of a windowed layer's past, of the whole past elsewhere, rolled."""

    def wrap(original: Any) -> Any:
        history: dict[int, Array] = {}

        def attend(q: Array, k: Array, v: Array, layer: Any, sink: Array) -> Array:
            past = history.get(id(layer), v[:0]) if layer.length else v[:0]
            history[id(layer)] = np.concatenate((past, v))
            kept = min(len(past), layer.window - 1)
            ours = np.concatenate((past[: len(past) - kept], np.roll(past[len(past) - kept :], 1, 0)))

            def change(a: Attended) -> tuple[Array, Array]:
                G = a.v_SHC.shape[1] // v.shape[1]
                return a.mask_TS, np.concatenate((np.repeat(ours, G, 1), a.v_SHC[a.past :]))

            changed.append(change)
            return honest(q, k, v, layer, sink)

        changed: list[Any] = []
        honest = attending(lambda a: changed.pop()(a)).functions["attend"](original)
        return attend

    return {"attend": wrap}


def queries(factor: Callable[[int], float]) -> Injection:
    """Queries multiplied within attention, so that all scores are; by the head size."""
    return calls("attend", lambda f, q, *rest: f(q * np.float32(factor(q.shape[2])), *rest))


def heads_first(w: Array, checkpoint: Checkpoint) -> Array:
    """Columns of the output projection as heads joined channel by channel meet them."""
    H, C = checkpoint.config.num_attention_heads, checkpoint.config.head_dim
    return w.reshape(-1, C, H).swapaxes(1, 2).reshape(w.shape)
