"""The Llama family: the warm-up for gpt_oss.py, which has the same shape with more in it.

Touvron et al. 2023 (arXiv:2302.13971): pre-norm blocks, RMSNorm, rotary positions, SwiGLU; grouped-query
attention since Llama 2 70B (arXiv:2307.09288); scaled RoPE since Llama 3.1. Mistral adds a window; phi-3
(arXiv:2404.14219) adds LongRoPE, and stores q, k and v as one matrix, gate and up as another: split at loading.
"""

from typing import NamedTuple

import numpy as np

from assay.reference.cache import KVCache
from assay.reference.config import LlamaConfig
from assay.reference.model import Model
from assay.reference.ops import (
    attention_heads,
    attention_mask,
    attention_scores,
    attention_weights,
    linear,
    rms_norm,
    swiglu,
)
from assay.reference.rope import apply_rope, rope_tables
from assay.reference.taps import Tap


class Positions(NamedTuple):
    """What a chunk's positions determine: rotary tables [T,C/2] and who sees whom [T,S]."""

    cos: np.ndarray
    sin: np.ndarray
    mask_TS: np.ndarray


def attention(
    x_TD: np.ndarray, model: Model[LlamaConfig], i: int, positions: Positions, cache: KVCache, tap: Tap
) -> np.ndarray:
    """Multi-head attention with grouped queries: [T,D] -> [T,D]."""
    config = model.config
    T, C, prefix = len(x_TD), config.head_dim, f"model.layers.{i}.self_attn"

    def project(x: np.ndarray, name: str) -> np.ndarray:
        bias = model.weight(f"{prefix}.{name}.bias") if config.attention_bias else None
        return linear(x, model.weight(f"{prefix}.{name}.weight"), bias)

    q_THC = tap("q", project(x_TD, "q_proj").reshape(T, -1, C))
    k_TKC = tap("k", project(x_TD, "k_proj").reshape(T, -1, C))
    v_TKC = tap("v", project(x_TD, "v_proj").reshape(T, -1, C))
    q_THC = tap("q_rope", apply_rope(q_THC, positions.cos, positions.sin))
    k_TKC = tap("k_rope", apply_rope(k_TKC, positions.cos, positions.sin))
    k_SKC, v_SKC = cache.extend(i, k_TKC, v_TKC)
    scores_HTS = tap("attn_scores", attention_scores(q_THC, k_SKC, positions.mask_TS))
    weights_HTS = tap("attn_weights", attention_weights(scores_HTS, positions.mask_TS))
    heads_THC = tap("attn_heads", attention_heads(weights_HTS, v_SKC))
    return tap("attn_out", project(heads_THC.reshape(T, -1), "o_proj"))


def mlp(x_TD: np.ndarray, model: Model[LlamaConfig], i: int, tap: Tap) -> np.ndarray:
    """SwiGLU feed-forward: down(silu(gate x) * up x); [T,D] -> [T,D]."""
    config = model.config
    prefix = f"model.layers.{i}.mlp"

    def project(x: np.ndarray, name: str) -> np.ndarray:
        bias = model.weight(f"{prefix}.{name}.bias") if config.mlp_bias else None
        return linear(x, model.weight(f"{prefix}.{name}.weight"), bias)

    gate_TF = tap("gate", project(x_TD, "gate_proj"))
    up_TF = tap("up", project(x_TD, "up_proj"))
    act_TF = tap("act", swiglu(gate_TF, up_TF))
    return tap("mlp_out", project(act_TF, "down_proj"))


def block(
    x_TD: np.ndarray, model: Model[LlamaConfig], i: int, positions: Positions, cache: KVCache, tap: Tap
) -> np.ndarray:
    """One layer: norm, attention, add; norm, feed-forward, add."""
    eps, prefix = model.config.rms_norm_eps, f"model.layers.{i}"
    h_TD = tap("attn_norm", rms_norm(x_TD, model.weight(f"{prefix}.input_layernorm.weight"), eps))
    x_TD = tap("attn_residual", x_TD + attention(h_TD, model, i, positions, cache, tap))
    h_TD = tap("mlp_norm", rms_norm(x_TD, model.weight(f"{prefix}.post_attention_layernorm.weight"), eps))
    return tap("block_out", x_TD + mlp(h_TD, model, i, tap))


def forward(model: Model[LlamaConfig], token_T: np.ndarray, cache: KVCache, tap: Tap) -> np.ndarray:
    """Logits [T,V] of the tokens that follow those in the cache, which grows by them."""
    config = model.config
    position_T = cache.length + np.arange(len(token_T))
    cos, sin = rope_tables(config, position_T, model.dtype)
    mask_TS = attention_mask(position_T, np.arange(cache.length + len(token_T)), config.sliding_window)
    x_TD = tap("embed", model.embed(token_T))
    for i in range(config.num_hidden_layers):
        in_layer = lambda name, array, i=i: tap(f"layers.{i}.{name}", array)  # noqa: E731
        x_TD = block(x_TD, model, i, Positions(cos, sin, mask_TS), cache, in_layer)
    cache.advance(len(token_T))
    x_TD = tap("final_norm", rms_norm(x_TD, model.weight("model.norm.weight"), config.rms_norm_eps))
    return tap("logits", model.unembed(x_TD))
