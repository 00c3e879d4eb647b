"""Mistakes of norms, the residual stream, the embedding and the head."""

import numpy as np

from assay.golden.mistakes.mistake import Mistake, Needs
from assay.golden.mistakes.recipe import (
    Array,
    Recipe,
    Variant,
    configure,
    exchange,
    normed,
    tap_changed,
    weights_renamed,
)
from assay.golden.rounding import to_bfloat16

FAMILY = "norms, residual, head"

NORMS = ("attn_norm", "mlp_norm", "final_norm")
SMALL = lambda config: Needs(else_="a token whose embedding is small: only there does epsilon count")  # noqa: E731


def _plus_one(kind: str, x_TD: Array, weight_D: Array, eps: float) -> Array:
    return normed(kind, x_TD, 1 + weight_D, eps)


def _without_weight(kind: str, x_TD: Array, weight_D: Array, eps: float) -> Array:
    return normed(kind, x_TD, np.ones_like(weight_D), eps)


def _layer_norm(kind: str, x_TD: Array, weight_D: Array, eps: float) -> Array:
    return normed(kind, x_TD - x_TD.mean(axis=-1, keepdims=True), weight_D, eps)


def _eps_outside(kind: str, x_TD: Array, weight_D: Array, eps: float) -> Array:
    return x_TD / (np.sqrt(np.mean(x_TD * x_TD, axis=-1, keepdims=True)) + x_TD.dtype.type(eps)) * weight_D


def _missing(missing: str) -> Variant:
    return exchange(norm=lambda kind, x, weight, eps: x if kind == missing else normed(kind, x, weight, eps))


def _embedding_scaled(recipe: Recipe) -> Recipe:
    root = recipe.config.hidden_size**0.5
    return tap_changed(lambda x_TD: x_TD * x_TD.dtype.type(root), "embed")(recipe)


NORM_NAMES = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"}
MISTAKES = (
    Mistake(
        "norm-epsilon-smaller",
        "RMSNorm epsilon ten times too small",
        "1e-6 in place of 1e-5, or as the config says a tenth of it.",
        NORMS,
        configure(rms_norm_eps=lambda config: config.rms_norm_eps / 10),
        "Read rms_norm_eps.",
        ("llama.cpp #2373, #2374, #2384", "cutlass #1112", "lit-llama #339", "candle #271"),
        needs=SMALL,
    ),
    Mistake(
        "norm-epsilon-larger",
        "RMSNorm epsilon ten times too large",
        "1e-5 in place of 1e-6, or as the config says ten times it.",
        NORMS,
        configure(rms_norm_eps=lambda config: config.rms_norm_eps * 10),
        "Read rms_norm_eps.",
        ("llama.cpp #2373, #2374, #2384", "candle #271"),
        needs=SMALL,
    ),
    Mistake(
        "norm-epsilon-missing",
        "RMSNorm without epsilon",
        "Nothing is added to the mean square.",
        NORMS,
        configure(rms_norm_eps=0.0),
        "Add rms_norm_eps inside the root.",
        needs=SMALL,
    ),
    Mistake(
        "norm-epsilon-outside",
        "RMSNorm epsilon outside the root",
        "Epsilon is added to the root of the mean square.",
        NORMS,
        exchange(norm=_eps_outside),
        "sqrt(mean(x^2) + eps).",
        needs=SMALL,
    ),
    Mistake(
        "norm-plus-one",
        "RMSNorm gain is 1 + weight",
        "Gemma's convention on a model that stores the gain itself.",
        NORMS,
        exchange(norm=_plus_one),
        "Multiply by the weight as stored.",
        ("mlx-examples #579",),
    ),
    Mistake(
        "norm-weight-missing",
        "RMSNorm without its weight",
        "The normalised vector is not multiplied by the gain.",
        NORMS,
        exchange(norm=_without_weight),
        "Multiply by the norm's weight.",
    ),
    Mistake(
        "norm-subtracts-mean",
        "LayerNorm in place of RMSNorm",
        "The mean is subtracted first.",
        NORMS,
        exchange(norm=_layer_norm),
        "RMSNorm does not centre.",
    ),
    Mistake(
        "norms-exchanged",
        "The two norms of a layer exchanged",
        "input_layernorm and post_attention_layernorm have each other's weights.",
        ("attn_norm", "mlp_norm"),
        weights_renamed(NORM_NAMES),
        "input_layernorm is before attention, post_attention_layernorm before the feed-forward.",
    ),
    Mistake(
        "final-norm-missing",
        "Final norm missing",
        "The head reads the residual stream as it is.",
        ("final_norm",),
        _missing("final_norm"),
        "Apply model.norm before the head.",
    ),
    Mistake(
        "residual-bfloat16",
        "Residual stream in bfloat16",
        "Sums of the residual stream are rounded to bfloat16; for a bfloat16 backend this is no mistake.",
        ("attn_residual", "block_out"),
        tap_changed(to_bfloat16, "attn_residual", "block_out"),
        "Keep the residual stream in float32.",
        grain=2.0**-9,
    ),
    Mistake(
        "block-output-bfloat16",
        "Block output in bfloat16",
        "Each block's output is rounded to bfloat16; for a bfloat16 backend this is no mistake.",
        ("block_out",),
        tap_changed(to_bfloat16, "block_out"),
        "Keep the residual stream in float32.",
        grain=2.0**-9,
    ),
    Mistake(
        "residual-after-norm",
        "Residual taken after the norm",
        "The step's output is added to the normed vector in place of the one before the norm.",
        ("attn_residual", "block_out"),
        exchange(add=lambda x, normed_TD, y: normed_TD + y),
        "Pre-norm: x + f(norm(x)).",
    ),
    Mistake(
        "residual-missing",
        "Residual missing",
        "The step's output replaces the stream in place of being added to it.",
        ("attn_residual", "block_out"),
        exchange(add=lambda x, normed_TD, y: y),
        "Pre-norm: x + f(norm(x)).",
    ),
    Mistake(
        "embedding-scaled",
        "Embedding scaled by sqrt(hidden size)",
        "Gemma's convention on a model without it.",
        ("embed",),
        _embedding_scaled,
        "Take the embedding's rows as they are.",
    ),
    Mistake(
        "head-tied",
        "Output head tied to the embedding",
        "Logits come from the embedding matrix although the model has a head of its own.",
        ("logits",),
        configure(tie_word_embeddings=True),
        "Use lm_head.weight; read tie_word_embeddings.",
        ("candle #2930", "transformers #43429", "vLLM #53020", "TensorRT-LLM #3324"),
        lambda c: not c.config.tie_word_embeddings,
    ),
)
