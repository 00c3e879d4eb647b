"""gpt-oss (OpenAI 2025): what it adds to the Llama family of llama.py, one idea at a time.

1. Every projection, the router's too, has a bias.
2. Even layers attend within a sliding window, odd ones to everything (config `layer_types`).
3. Each head has a sink: a learned logit in the softmax's denominator that leads to no value.
4. RoPE is stretched by YaRN, with the ends of its ramp not rounded.
5. The feed-forward is a mixture of experts: a router picks A of N for each token and weights them by
   a softmax over the chosen logits only. Their activation is a clamped SwiGLU.

Facts from openai/gpt-oss `gpt_oss/torch/model.py`.
"""

import numpy as np

from assay.reference.cache import KVCache
from assay.reference.config import GptOssConfig
from assay.reference.llama import Positions
from assay.reference.model import Model
from assay.reference.ops import (
    attention_heads,
    attention_mask,
    attention_scores,
    attention_weights,
    clamped_swiglu,
    linear,
    rms_norm,
    softmax,
    top_k,
)
from assay.reference.rope import apply_rope, rope_tables
from assay.reference.taps import Tap


def attention(
    x_TD: np.ndarray, model: Model[GptOssConfig], i: int, positions: Positions, cache: KVCache, tap: Tap
) -> np.ndarray:
    """Attention with biases and sinks, windowed or not by the mask: [T,D] -> [T,D]."""
    T, C, prefix = len(x_TD), model.config.head_dim, f"model.layers.{i}.self_attn"

    def project(x: np.ndarray, name: str) -> np.ndarray:
        bias = model.weight(f"{prefix}.{name}.bias") if model.config.attention_bias else None
        return linear(x, model.weight(f"{prefix}.{name}.weight"), bias)

    q_THC = tap("q", project(x_TD, "q_proj").reshape(T, -1, C))
    k_TKC = tap("k", project(x_TD, "k_proj").reshape(T, -1, C))
    v_TKC = tap("v", project(x_TD, "v_proj").reshape(T, -1, C))
    q_THC = tap("q_rope", apply_rope(q_THC, positions.cos, positions.sin))
    k_TKC = tap("k_rope", apply_rope(k_TKC, positions.cos, positions.sin))
    k_SKC, v_SKC = cache.extend(i, k_TKC, v_TKC)
    scores_HTS = tap("attn_scores", attention_scores(q_THC, k_SKC, positions.mask_TS))
    sink_H = model.weight(f"{prefix}.sinks")
    weights_HTS = tap("attn_weights", attention_weights(scores_HTS, positions.mask_TS, sink_H))
    heads_THC = tap("attn_heads", attention_heads(weights_HTS, v_SKC))
    return tap("attn_out", project(heads_THC.reshape(T, -1), "o_proj"))


def route(x_TD: np.ndarray, model: Model[GptOssConfig], i: int, tap: Tap) -> tuple[np.ndarray, np.ndarray]:
    """The chosen experts and their weights, each [T,A]."""
    prefix = f"model.layers.{i}.mlp.router"
    router = linear(x_TD, model.weight(f"{prefix}.weight"), model.weight(f"{prefix}.bias"))
    logits_TN = tap("router_logits", router)
    ids_TA = tap("expert_ids", top_k(logits_TN, model.config.num_experts_per_tok))
    # softmax over the chosen A only: choosing first and normalising after (not over all N before)
    weights_TA = tap("expert_weights", softmax(np.take_along_axis(logits_TN, ids_TA, axis=-1)))
    return ids_TA, weights_TA


def per_expert(x: np.ndarray, ids_TA: np.ndarray, model: Model[GptOssConfig], name: str) -> np.ndarray:
    """Each (token, chosen expert) pair through its own expert's projection with bias.

    x is [T,I], the same for all of a token's experts, or [T,A,I]; the result is [T,A,O]. An expert's
    weights are decoded only if some token chose it.
    """
    biases_NO = model.weight(f"{name}.bias")
    y_TAO = np.empty((*ids_TA.shape, biases_NO.shape[1]), x.dtype)
    for e in np.unique(ids_TA):
        t, a = np.nonzero(ids_TA == e)
        rows = x[t] if x.ndim == 2 else x[t, a]
        y_TAO[t, a] = linear(rows, model.weight(f"{name}.weight", int(e)), biases_NO[e])
    return y_TAO


def mixture_of_experts(x_TD: np.ndarray, model: Model[GptOssConfig], i: int, tap: Tap) -> np.ndarray:
    """Weighted sum of the chosen experts' outputs: [T,D] -> [T,D]."""
    config = model.config
    ids_TA, weights_TA = route(x_TD, model, i, tap)
    experts = f"model.layers.{i}.mlp.experts"
    # gate and up are interleaved rows of one matrix in Hugging Face files (gate even, up odd); split at loading
    gate_TAF = tap("expert_gate", per_expert(x_TD, ids_TA, model, f"{experts}.gate_proj"))
    up_TAF = tap("expert_up", per_expert(x_TD, ids_TA, model, f"{experts}.up_proj"))
    act_TAF = tap("expert_act", clamped_swiglu(gate_TAF, up_TAF, config.swiglu_alpha, config.swiglu_limit))
    out_TAD = tap("expert_out", per_expert(act_TAF, ids_TA, model, f"{experts}.down_proj"))
    # the down projection's bias is inside the weighted sum, not after it
    return tap("mlp_out", np.einsum("TA,TAD->TD", weights_TA, out_TAD))


def block(
    x_TD: np.ndarray, model: Model[GptOssConfig], i: int, positions: Positions, cache: KVCache, tap: Tap
) -> np.ndarray:
    """One layer: norm, attention, add; norm, mixture of experts, add."""
    eps, prefix = model.config.rms_norm_eps, f"model.layers.{i}"
    h_TD = tap("attn_norm", rms_norm(x_TD, model.weight(f"{prefix}.input_layernorm.weight"), eps))
    x_TD = tap("attn_residual", x_TD + attention(h_TD, model, i, positions, cache, tap))
    h_TD = tap("mlp_norm", rms_norm(x_TD, model.weight(f"{prefix}.post_attention_layernorm.weight"), eps))
    return tap("block_out", x_TD + mixture_of_experts(h_TD, model, i, tap))


def forward(model: Model[GptOssConfig], token_T: np.ndarray, cache: KVCache, tap: Tap) -> np.ndarray:
    """Logits [T,V] of the tokens that follow those in the cache, which grows by them."""
    config = model.config
    query_T, key_S = cache.length + np.arange(len(token_T)), np.arange(cache.length + len(token_T))
    cos, sin = rope_tables(config, query_T, model.dtype)
    x_TD = tap("embed", model.embed(token_T))
    for i in range(config.num_hidden_layers):
        in_layer = lambda name, array, i=i: tap(f"layers.{i}.{name}", array)  # noqa: E731
        positions = Positions(cos, sin, attention_mask(query_T, key_S, config.window(i)))
        x_TD = block(x_TD, model, i, positions, cache, in_layer)
    cache.advance(len(token_T))
    x_TD = tap("final_norm", rms_norm(x_TD, model.weight("model.norm.weight"), config.rms_norm_eps))
    return tap("logits", model.unembed(x_TD))
