"""Several sequences in one pass, and one sequence of which not all may stay.

Every weight is read once for all sequences, and each has a past of its own.
"""

from collections.abc import Callable, Sequence

import numpy as np

from assay.fast.cpu import jit
from assay.fast.cpu.attention import attend_each
from assay.fast.cpu.cache import CpuCache, LayerCache
from assay.fast.cpu.engine import CpuModel, KeyValue, Tables, dense, mixture_of_experts
from assay.fast.cpu.groups import one_group
from assay.fast.cpu.ops import apply_rope, rms_norm
from assay.fast.cpu.rope import rotary_tables
from assay.fast.cpu.weights import Layer, project
from assay.fast.inputs import checked_tokens
from assay.reference.config import Config, GptOssConfig

Pieces = list[slice]  # the rows of each sequence among the P rows of all


def forward_batch(model: CpuModel, rows: Sequence[np.ndarray], caches: Sequence[CpuCache]) -> np.ndarray:
    """Logits, float32 [B,V], of the last token of each of B sequences.

    Row b holds the tokens, one or more, that follow those in cache b, which grows by them. Every result is what
    the sequence would give alone: in mode `exact` to the bit. A pass that raises leaves the caches as they were.
    Raises ValueError for bad tokens, for a cache of another model or type, and for one that is given twice.
    """
    if len(rows) != len(caches) or not caches or len({id(cache) for cache in caches}) < len(caches):
        raise ValueError(f"a batch needs a cache of its own for each row: {len(rows)} rows, {len(caches)} caches")
    if any(cache.config != model.config for cache in caches):
        raise ValueError("a cache was made for a model of another configuration")
    if len(dtypes := {cache.dtype for cache in caches}) > 1:
        raise ValueError(f"a batch needs caches of one type: {', '.join(sorted(map(str, dtypes)))}")
    token_rows = [checked_tokens(model.config, row, cache.length) for row, cache in zip(rows, caches, strict=True)]
    with jit.threads(model.threads):
        x_PD, fresh = _body(model, token_rows, caches)
        ends = np.cumsum([len(row) for row in token_rows])
        logits_BV = _head(model, x_PD[ends - 1])
    for row, end, cache in zip(token_rows, ends, caches, strict=True):
        if len(row) == 1:
            cache.count_one()
        else:
            _keep(cache, fresh, slice(end - len(row), end))
    return logits_BV


def forward_some(model: CpuModel, tokens: np.ndarray, cache: CpuCache, keep: Callable[[np.ndarray], int]) -> np.ndarray:
    """Logits, float32 [T,V], of T tokens after those in the cache, which grows by the first `keep(logits)` of them.

    Otherwise as `CpuModel.forward`: in mode `exact` to the bit.
    """
    token_T = checked_tokens(model.config, tokens, cache.length)
    with jit.threads(model.threads):
        x_TD, fresh = _body(model, [token_T], [cache])
        logits_TV = _head(model, x_TD)
    _keep(cache, fresh, slice(0, keep(logits_TV)))
    return logits_TV


def _body(
    model: CpuModel, token_rows: list[np.ndarray], caches: Sequence[CpuCache]
) -> tuple[np.ndarray, list[KeyValue]]:
    """The last block's output [P,D], and the keys and values of all rows on each layer."""
    weights, config = model._weights, model.config
    ends = np.cumsum([len(row) for row in token_rows]).tolist()
    pieces = [slice(end - len(row), end) for row, end in zip(token_rows, ends, strict=True)]
    each = [rotary_tables(config, cache.length, len(row)) for row, cache in zip(token_rows, caches, strict=True)]
    cos, sin = (np.concatenate(tables) for tables in zip(*each, strict=True))
    x_PD, fresh = weights.embed.decoded(np.concatenate(token_rows)), []
    for i, layer in enumerate(weights.layers):
        x_PD, kv = _block(x_PD, layer, config, (cos, sin), [cache.layers[i] for cache in caches], pieces)
        fresh.append(kv)
    return x_PD, fresh


def _head(model: CpuModel, x_PD: np.ndarray) -> np.ndarray:
    return model._weights.head(rms_norm(x_PD, model._weights.final_norm, model.config.rms_norm_eps))


def _keep(cache: CpuCache, fresh: list[KeyValue], piece: slice) -> None:
    for past, (k_PKC, v_PKC) in zip(cache.layers, fresh, strict=True):
        past.append(k_PKC[piece], v_PKC[piece])


def _block(
    x_PD: np.ndarray, layer: Layer, config: Config, tables: Tables, pasts: list[LayerCache], pieces: Pieces
) -> tuple[np.ndarray, KeyValue]:
    """`engine.block` on the rows of all sequences."""
    h_PD = rms_norm(x_PD, layer.attn_norm, config.rms_norm_eps)
    attn_out_PD, kv = _attention(h_PD, layer, config, tables, pasts, pieces)
    x_PD = x_PD + attn_out_PD
    h_PD = rms_norm(x_PD, layer.mlp_norm, config.rms_norm_eps)
    if isinstance(config, GptOssConfig):
        return x_PD + mixture_of_experts(h_PD, layer, config, _unseen), kv
    return x_PD + dense(h_PD, layer, _unseen), kv


def _attention(
    x_PD: np.ndarray, layer: Layer, config: Config, tables: Tables, pasts: list[LayerCache], pieces: Pieces
) -> tuple[np.ndarray, KeyValue]:
    """`engine.attention` on the rows of all sequences: each attends to its own past and its own rows."""
    P, C = len(x_PD), config.head_dim
    projected = project((layer.q, layer.k, layer.v), one_group(P), x_PD)
    q_PHC, k_PKC, v_PKC = (y.reshape(P, -1, C) for y in projected)
    q_PHC, k_PKC = apply_rope(q_PHC, *tables), apply_rope(k_PKC, *tables)
    heads_PHC = attend_each(q_PHC, k_PKC, v_PKC, pieces, pasts, layer.sinks)
    return layer.o(heads_PHC.reshape(P, -1)), (k_PKC, v_PKC)


def _unseen(name: str, array: np.ndarray) -> np.ndarray:
    return array
