"""Mistakes of the catalogue made in the Numba path, each by other means than the catalogue's; by id."""

import math

import numpy as np

from assay.golden.mistakes import MODULES
from assay.golden.mistakes.injecting import (
    Injection,
    activating,
    all_kinds,
    both,
    calls,
    chosen_without_bias,
    dense_activating,
    glu,
    halved,
    in_bfloat16,
    in_groups,
    in_turn,
    normed,
    over_all,
    recalling,
    root,
    routed,
    scaled,
    sigmoids,
    weights,
    without_window,
    zeros,
)
from assay.golden.mistakes.injecting_attention import (
    attending,
    first_hidden,
    from_chunk_start,
    heads_first,
    masked,
    queries,
    ring_rolled,
    rolled,
)
from assay.golden.mistakes.injecting_rope import (
    angles,
    frequencies,
    neighbours,
    placed,
    plain,
    positions_in,
    ramp_by_channel,
    rows,
    turned,
)
from assay.golden.rounding import to_bfloat16, to_float16

EXPERTS = tuple(f"experts.{name}_proj.weight" for name in ("gate", "up", "down"))
OTHER = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}
NORMS = ("layernorm.weight", "model.norm.weight")
INJECTIONS: dict[str, Injection] = {
    "yarn-ramp-rounded": scaled(truncate=True),
    "yarn-betas-ignored": scaled(beta_fast=32.0, beta_slow=1.0),
    "yarn-factor-missing": scaled(attention_factor=1.0),
    "yarn-factor-twice": scaled(attention_factor=lambda c: c.rope_scaling.attention_factor**2),
    "yarn-missing": Injection(lambda c: {"rope_scaling": None}),
    "yarn-new-context": scaled(original_max_position_embeddings=lambda c: c.max_position_embeddings),
    "yarn-scales-positions": calls(
        "rotary_tables", lambda f, c, start, T: angles(c, start, T, c.rope_scaling.factor, False)
    ),
    "yarn-frequencies-plain": calls("rotary_tables", lambda f, c, start, T: angles(c, start, T, 1, False)),
    "yarn-ramp-by-channel": frequencies(ramp_by_channel),
    "llama3-linear": frequencies(lambda c: [f / c.rope_scaling.factor for f in plain(c)]),
    "rope-missing-on-keys": recalling("k_rope", lambda seen: seen["k"], "k"),
    "rope-positions-bfloat16": positions_in(to_bfloat16),
    "rope-positions-float16": positions_in(to_float16),
    "llama3-missing": Injection(lambda c: {"rope_scaling": None}),
    "longrope-always-long": scaled(short_factor=lambda c: c.rope_scaling.long_factor),
    "longrope-always-short": scaled(long_factor=lambda c: c.rope_scaling.short_factor),
    "longrope-factor-missing": scaled(attention_factor=1.0),
    "rope-base-10000": Injection(lambda c: {"rope_theta": 10000.0}),
    "rope-neighbours": calls("apply_rope", neighbours),
    "rope-backwards": turned(lambda cos, sin: (cos, -sin)),
    "rope-missing": calls("apply_rope", lambda f, x, cos, sin: x.copy()),
    "rope-angles-bfloat16": calls("rotary_tables", lambda f, c, start, T: angles(c, start, T, 1, True)),
    "rope-tables-bfloat16": turned(lambda cos, sin: (to_bfloat16(cos), to_bfloat16(sin))),
    "positions-from-one": placed(lambda start: start + 1),
    "positions-restart": placed(lambda start: 0),
    "positions-one-late": placed(lambda start: start + (start > 0)),
    "positions-one-early": placed(lambda start: start - (start > 0)),
    "window-one-more": Injection(lambda c: {"sliding_window": c.sliding_window + 1}),
    "window-one-less": Injection(lambda c: {"sliding_window": c.sliding_window - 1}),
    "window-missing": Injection(without_window),
    "window-on-all-layers": Injection(all_kinds("sliding_attention")),
    "window-on-other-layers": Injection(lambda c: {"layer_types": tuple(OTHER[kind] for kind in c.layer_types)}),
    "own-key-masked": masked(lambda mask, past: mask & (np.tri(mask.shape[0], mask.shape[1], past - 1) > 0)),
    "causal-mask-missing": masked(lambda mask, past: mask | np.triu(np.ones(mask.shape, bool), past + 1)),
    "cached-keys-skipped": masked(lambda mask, past: mask & (np.arange(mask.shape[1]) >= past)),
    "first-key-masked": masked(first_hidden),
    "mask-from-chunk-start": attending(lambda a: (from_chunk_start(a), a.v_SHC)),
    "cache-rolled": rolled(1),
    "cache-rolled-back": rolled(-1),
    "cache-ring-rolled": Injection(configured=ring_rolled),
    "heads-share-by-turns": masked(lambda mask, past: mask, by_turns=True),
    "sinks-not-shifted": masked(lambda mask, past: mask, sink="not shifted"),
    "sinks-have-a-value": masked(lambda mask, past: mask, sink="valued"),
    "scale-by-hidden-size": Injection(
        configured=lambda c: queries(lambda C: (C / c.hidden_size) ** 0.5).functions  # on top of the kernel's own
    ),
    "scale-missing": queries(lambda C: C**0.5),
    "scale-twice": queries(lambda C: C**-0.5),
    "values-of-the-next-head": calls("attend", lambda f, *a: np.roll(f(*a), 1, axis=1)),
    **{f"{x}-bias-missing": weights(zeros, f"self_attn.{x}_proj.bias") for x in "qkvo"},
    "o-bias-twice": weights(lambda b: 2 * b, "self_attn.o_proj.bias"),
    **{f"{x}-transposed": weights(np.transpose, f"self_attn.{x}_proj.weight") for x in "qkvo"},
    "qk-rows-to-neighbours": Injection(weights={"q_proj.weight": rows(True), "k_proj.weight": rows(True)}),
    "qk-rows-to-halves": Injection(weights={"q_proj.weight": rows(False), "k_proj.weight": rows(False)}),
    "q-rows-to-neighbours": Injection(weights={"q_proj.weight": rows(True)}),
    "q-rows-to-halves": Injection(weights={"q_proj.weight": rows(False)}),
    "k-rows-to-neighbours": Injection(weights={"k_proj.weight": rows(True)}),
    "k-rows-to-halves": Injection(weights={"k_proj.weight": rows(False)}),
    "heads-not-transposed": Injection(weights={"o_proj.weight": heads_first}),
    "k-v-swapped": Injection(renamed={"k_proj": "v_proj", "v_proj": "k_proj"}),
    "sinks-missing": weights(lambda s: np.full_like(s, -1e30), "sinks"),
    "sinks-twice": weights(lambda s: s + math.log(2), "sinks"),
    "sinks-of-the-next-head": weights(lambda s: np.roll(s, 1), "sinks"),
    "sinks-scaled": Injection(weights={"sinks": lambda s, checkpoint: s / math.sqrt(checkpoint.config.head_dim)}),
    "router-bias-missing": weights(zeros, "router.bias"),
    "router-bfloat16": routed(in_bfloat16),
    "experts-chosen-without-bias": chosen_without_bias(),
    "smallest-experts-chosen": calls("top_k", lambda f, logits, A: f(-logits, A)),
    "softmax-over-all-experts": calls("expert_weights", over_all),
    "sigmoid-router": calls("expert_weights", sigmoids),
    "expert-weights-equal": calls("weighted_sum", lambda f, w, x: f(np.full_like(w, 1 / w.shape[1]), x)),
    "expert-weights-not-applied": calls("weighted_sum", lambda f, w, x: f(np.ones_like(w), x)),
    "expert-weights-wrong-slot": calls("weighted_sum", lambda f, w, x: f(np.ascontiguousarray(w[:, ::-1]), x)),
    "expert-weights-next-slot": calls("weighted_sum", lambda f, w, x: f(np.ascontiguousarray(np.roll(w, 1, 1)), x)),
    "reduced-twice": Injection(taps={"mlp_out": lambda x: 2 * x}),
    "reduced-four-times": Injection(taps={"mlp_out": lambda x: 4 * x}),
    "clamp-missing": Injection(lambda c: {"swiglu_limit": 1e30}),
    "clamp-at-seven": Injection(lambda c: {"swiglu_limit": 7.0}),
    "clamp-of-gate-missing": activating(
        lambda g, u, a, limit: g / (1 + np.exp(-a * g.astype(float))) * (np.clip(u, -limit, limit) + 1)
    ),
    "gate-clamped-both-ways": activating(lambda g, u, a, limit: glu(np.maximum(g, -limit), u, a, limit)),
    "clamp-after-one": activating(lambda g, u, a, limit: glu(g, 0 * u, a, limit) * np.clip(u + 1, -limit, limit)),
    "silu-plain": Injection(lambda c: {"swiglu_alpha": 1.0}),
    "plus-one-missing": activating(lambda g, u, a, limit: glu(g, u, a, limit, 0.0)),
    "gate-up-swapped": Injection(
        functions={
            "clamped_swiglu": lambda f: lambda g, u, *rest: f(u, g, *rest),
            "swiglu": lambda f: lambda g, u: f(u, g),
        }
    ),
    "gate-up-not-interleaved": activating(halved),
    "gelu": dense_activating(
        lambda g, u: g * np.vectorize(lambda x: 0.5 + 0.5 * math.erf(x / 2**0.5), otypes=[float])(g) * u
    ),
    "gelu-tanh": dense_activating(
        lambda g, u: 0.5 * g * (1 + np.tanh(0.7978845608028654 * (g + 0.044715 * g.astype(float) ** 3))) * u
    ),
    "gate-up-interleaved": dense_activating(in_turn),
    "relu": dense_activating(lambda g, u: np.where(g > 0, g, 0) * u),
    "plus-one-on-dense": dense_activating(lambda g, u: g / (1 + np.exp(-g.astype(float))) * (u + 1)),
    "gate-up-bias-missing": weights(zeros, "experts.gate_proj.bias", "experts.up_proj.bias"),
    "gate-bias-missing": weights(zeros, "experts.gate_proj.bias"),
    **{f"mlp-{x}-bias-missing": weights(zeros, f"mlp.{x}_proj.bias") for x in ("gate", "up")},
    "up-bias-missing": weights(zeros, "experts.up_proj.bias"),
    "down-bias-missing": weights(zeros, "experts.down_proj.bias"),
    "down-bias-per-rank": weights(lambda b: 2 * b, "experts.down_proj.bias"),
    "mlp-down-bias-missing": weights(zeros, "mlp.down_proj.bias"),
    "gate-up-weights-swapped": Injection(renamed={"gate_proj": "up_proj", "up_proj": "gate_proj"}),
    "gate-up-matrices-swapped": Injection(
        renamed={"gate_proj.weight": "up_proj.weight", "up_proj.weight": "gate_proj.weight"}
    ),
    **{
        f"expert-{x}-transposed": weights(lambda w: w.swapaxes(1, 2), f"experts.{x}_proj.weight")
        for x in ("gate", "up", "down")
    },
    **{f"mlp-{x}-transposed": weights(np.transpose, f"mlp.{x}_proj.weight") for x in ("gate", "up", "down")},
    "mxfp4-nibbles-swapped": weights(in_groups(lambda i: i ^ 1), *EXPERTS),
    "mxfp4-read-as-halves": weights(in_groups(lambda i: i % 16 * 2 + i // 16), *EXPERTS),
    "mxfp4-read-as-neighbours": weights(in_groups(lambda i: i // 2 + i % 2 * 16), *EXPERTS),
    "mxfp4-halves-swapped": weights(in_groups(lambda i: i ^ 16), *EXPERTS),
    "mxfp4-exponent-high": weights(lambda w: 2 * w, *EXPERTS),
    "mxfp4-exponent-low": weights(lambda w: w / 2, *EXPERTS),
    "mxfp4-exponent-two-low": weights(lambda w: w / 4, *EXPERTS),
    "mxfp4-down-exponent-high": weights(lambda w: 2 * w, EXPERTS[2]),
    "mxfp4-down-exponent-low": weights(lambda w: w / 2, EXPERTS[2]),
    "mxfp4-sign-ignored": weights(np.abs, *EXPERTS),
    "norm-epsilon-smaller": Injection(lambda c: {"rms_norm_eps": c.rms_norm_eps / 10}),
    "norm-epsilon-larger": Injection(lambda c: {"rms_norm_eps": c.rms_norm_eps * 10}),
    "norm-epsilon-missing": normed(lambda x, w, eps: x / root(x, 0.0) * w),
    "norm-epsilon-outside": normed(lambda x, w, eps: x / (root(x, 0.0) + eps) * w),
    "norm-plus-one": weights(lambda w: 1 + w, *NORMS),
    "norm-weight-missing": weights(lambda w: w * 0 + 1, *NORMS),
    "norm-subtracts-mean": normed(
        lambda x, w, eps: (x - x.mean(-1, keepdims=True)) / root(x - x.mean(-1, keepdims=True), eps) * w
    ),
    "norms-exchanged": Injection(
        renamed={"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"}
    ),
    "final-norm-missing": recalling("final_norm", lambda seen: seen["block_out"], "block_out"),
    "residual-after-norm": both(
        recalling("attn_residual", lambda seen: seen["attn_norm"] + seen["attn_out"], "attn_norm", "attn_out"),
        recalling("block_out", lambda seen: seen["mlp_norm"] + seen["mlp_out"], "mlp_norm", "mlp_out"),
    ),
    "residual-missing": both(
        recalling("attn_residual", lambda seen: seen["attn_out"], "attn_out"),
        recalling("block_out", lambda seen: seen["mlp_out"], "mlp_out"),
    ),
    "residual-bfloat16": Injection(taps={"attn_residual": to_bfloat16, "block_out": to_bfloat16}),
    "block-output-bfloat16": Injection(taps={"block_out": to_bfloat16}),
    "embedding-scaled": Injection(taps={"embed": lambda x: x * np.float32(x.shape[1] ** 0.5)}),
    "head-tied": Injection(lambda c: {"tie_word_embeddings": True}),
}
for _module in MODULES.values():  # a mistake that is one file brings its own
    INJECTIONS |= getattr(_module, "injections", dict)()
