"""Several sequences in one pass: every weight is read once for all of them, and each has a past of its own."""

from collections.abc import Sequence

import numpy as np

from assay.fast.cpu import jit
from assay.fast.cpu.attention import attend
from assay.fast.cpu.cache import CpuCache, LayerCache
from assay.fast.cpu.decode import decode_rows
from assay.fast.cpu.engine import CpuModel, KeysValues, Tables, dense, mixture_of_experts
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
    Raises ValueError for bad tokens, for a cache of another model, and for one that is given twice.
    """
    if len(rows) != len(caches) or not caches or len({id(cache) for cache in caches}) < len(caches):
        raise ValueError(f"a batch needs a cache of its own for each row: {len(rows)} rows, {len(caches)} caches")
    if any(cache.config != model.config for cache in caches):
        raise ValueError("a cache was made for a model of another configuration")
    token_rows = [checked_tokens(model.config, row, cache.length) for row, cache in zip(rows, caches, strict=True)]
    with jit.threads(model.threads):
        return _forward(model, token_rows, caches)


def _forward(model: CpuModel, token_rows: list[np.ndarray], caches: Sequence[CpuCache]) -> np.ndarray:
    weights, config = model._weights, model.config
    ends = np.cumsum([len(row) for row in token_rows])
    pieces = [slice(end - len(row), end) for row, end in zip(token_rows, ends.tolist(), strict=True)]
    each = [rotary_tables(config, cache.length, len(row)) for row, cache in zip(token_rows, caches, strict=True)]
    cos, sin = (np.concatenate(tables) for tables in zip(*each, strict=True))
    x_PD = decode_rows(weights.embed, np.concatenate(token_rows))
    fresh = []
    for i, layer in enumerate(weights.layers):
        x_PD, kv = _block(x_PD, layer, config, (cos, sin), [cache.layers[i] for cache in caches], pieces)
        fresh.append(kv)
    last_BD = rms_norm(x_PD[ends - 1], weights.final_norm, config.rms_norm_eps)
    logits_BV = weights.head(last_BD)
    for b, piece in enumerate(pieces):
        for past, (k_PKC, v_PKC) in zip(caches[b].layers, fresh, strict=True):
            past.append(k_PKC[piece], v_PKC[piece])
    return logits_BV


def _block(
    x_PD: np.ndarray, layer: Layer, config: Config, tables: Tables, pasts: list[LayerCache], pieces: Pieces
) -> tuple[np.ndarray, KeysValues]:
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
) -> tuple[np.ndarray, KeysValues]:
    """`engine.attention` on the rows of all sequences: each attends to its own past and its own rows."""
    P, C = len(x_PD), config.head_dim
    projected = project((layer.q, layer.k, layer.v), one_group(P), x_PD)
    q_PHC, k_PKC, v_PKC = (y.reshape(P, -1, C) for y in projected)
    q_PHC, k_PKC = apply_rope(q_PHC, *tables), apply_rope(k_PKC, *tables)
    heads_PHC = np.empty_like(q_PHC)
    for piece, past in zip(pieces, pasts, strict=True):
        heads_PHC[piece] = attend(q_PHC[piece], k_PKC[piece], v_PKC[piece], past, layer.sinks)
    return layer.o(heads_PHC.reshape(P, -1)), (k_PKC, v_PKC)


def _unseen(name: str, array: np.ndarray) -> np.ndarray:
    return array
