"""Mistakes of projections, heads, scores and sinks."""

import numpy as np

from assay.golden.mistakes.mistake import Mistake, has_groups, has_tensor, is_gpt_oss, is_square
from assay.golden.mistakes.recipe import (
    Array,
    Recipe,
    Variant,
    exchange,
    tap_changed,
    weight_changed,
    weights_renamed,
)
from assay.reference import ops
from assay.reference.config import Config

FAMILY = "attention"

NAMES = {"q": "query", "k": "key", "v": "value", "o": "output"}
TAP = {"q": "q", "k": "k", "v": "v", "o": "attn_out"}


def _bias_missing(letter: str) -> Mistake:
    return Mistake(
        f"{letter}-bias-missing",
        f"Bias of the {NAMES[letter]} projection missing",
        f"W_{letter} x without b_{letter}.",
        (TAP[letter],),
        weight_changed(np.zeros_like, f"self_attn.{letter}_proj.bias"),
        f"Add self_attn.{letter}_proj.bias.",
        ("TGI #1036", "gpt-neox #962", "nano-vllm #99"),
        has_tensor(f"self_attn.{letter}_proj.bias"),
    )


def _bias_twice(letter: str) -> Mistake:
    return Mistake(
        f"{letter}-bias-twice",
        f"Bias of the {NAMES[letter]} projection added twice",
        "The bias is added on each of two ranks and then summed, or once in the kernel and once after it.",
        (TAP[letter],),
        weight_changed(lambda bias: 2 * bias, f"self_attn.{letter}_proj.bias"),
        "Add the bias on one rank only, after the reduction.",
        ("TGI #1036", "gpt-neox #962", "nano-vllm #99"),
        has_tensor(f"self_attn.{letter}_proj.bias"),
    )


def _transposed(letter: str) -> Mistake:
    return Mistake(
        f"{letter}-transposed",
        f"Weight of the {NAMES[letter]} projection transposed",
        "The matrix is square, so that its transpose fits and nothing else complains.",
        (TAP[letter],),
        weight_changed(np.transpose, f"self_attn.{letter}_proj.weight"),
        "Weights are stored [out, in]: y = x W^T.",
        ("Megatron-Bridge #3743, #3753", "unsloth-zoo #1114, #1251"),
        is_square(f"self_attn.{letter}_proj.weight"),
    )


def _rows(letters: str, to_neighbours: bool) -> Variant:
    """Rows of each head of these projections permuted, biases alike, as between the two RoPE layouts."""

    def variant(recipe: Recipe) -> Recipe:
        C = recipe.config.head_dim

        def permuted(array: Array) -> Array:
            shape = (-1, 2, C // 2) if to_neighbours else (-1, C // 2, 2)
            return array.reshape(*shape, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)

        ends = [f"self_attn.{letter}_proj.weight" for letter in letters]
        return weight_changed(permuted, *ends)(recipe)

    return variant


def _rows_permuted(letters: str, to_neighbours: bool) -> Mistake:
    way = "neighbours" if to_neighbours else "halves"
    which = " and ".join(f"W_{letter}" for letter in letters)
    return Mistake(
        f"{letters}-rows-to-{way}",
        f"Rows of {which} permuted to {way}",
        f"The rows of each head went from one RoPE layout to the other ({way}) although the rotation is for the first: "
        "a permutation that a converter made once too often, or one that was not undone.",
        tuple(letters),
        _rows(letters, to_neighbours),
        f"Permute {which} exactly when the rotation pairs channels the other way than the file does.",
        ("TinyLlama #24", "transformers #25199", "llama2.c #286", "nanotron #241, #427", "AiDotNet #2074"),
    )


def _by_turns(x_SKC: Array, H: int) -> Array:
    return np.tile(x_SKC, (1, H // x_SKC.shape[1], 1))


def _channels_first(heads_THC: Array) -> Array:
    return heads_THC.transpose(0, 2, 1).reshape(len(heads_THC), -1)


def _sink_has_value(config: Config, layer: int, weights_HTS: Array, v_SHC: Array, start_T: Array) -> Array:
    """What the sink took is spent on the first key's value."""
    rest_HT = 1 - weights_HTS.sum(axis=-1)
    spent = weights_HTS.copy()
    spent[..., 0] += rest_HT
    return (spent @ v_SHC.transpose(1, 0, 2)).transpose(1, 0, 2)


def _sinks_scaled(recipe: Recipe) -> Recipe:
    return weight_changed(lambda sink_H: sink_H * recipe.scale(recipe.config), "self_attn.sinks")(recipe)


def _sink_not_shifted(scores_HTS: Array, mask_TS: Array, sink_H: Array | None) -> Array:
    """The largest score is subtracted from the scores but not from the sink."""
    assert sink_H is not None
    visible = np.where(mask_TS, scores_HTS, -np.inf)
    e_HTS = np.exp(visible - np.max(visible, axis=-1, keepdims=True))
    return e_HTS / (e_HTS.sum(axis=-1, keepdims=True) + np.exp(sink_H)[:, None, None])


SINKS = ("attn_weights",)
MISTAKES = (
    *(_bias_missing(letter) for letter in NAMES),
    *(_bias_twice(letter) for letter in "o"),
    *(_transposed(letter) for letter in NAMES),
    *(_rows_permuted(letters, way) for letters in ("qk", "q", "k") for way in (True, False)),
    Mistake(
        "k-v-swapped",
        "Key and value projections swapped",
        "Keys come from W_v and values from W_k, as when a fused matrix is split in another order.",
        ("k", "v"),
        weights_renamed({"self_attn.k_proj": "self_attn.v_proj", "self_attn.v_proj": "self_attn.k_proj"}),
        "Check the order in which a fused qkv matrix is split.",
    ),
    Mistake(
        "scale-by-hidden-size",
        "Scores scaled by the hidden size",
        "Scores are divided by sqrt(hidden size) in place of sqrt(head size).",
        ("attn_scores",),
        exchange(scale=lambda config: config.hidden_size**-0.5),
        "Divide by the square root of head_dim.",
        acts=lambda c: c.config.hidden_size != c.config.head_dim,
    ),
    Mistake(
        "scale-missing",
        "Scores not scaled",
        "Scores are not divided by sqrt(head size).",
        ("attn_scores",),
        exchange(scale=lambda config: 1.0),
        "Divide by the square root of head_dim.",
    ),
    Mistake(
        "scale-twice",
        "Scores scaled twice",
        "Scores are divided by the head size: once before and once within the kernel.",
        ("attn_scores",),
        exchange(scale=lambda config: 1 / config.head_dim),
        "Divide by the square root of head_dim once.",
    ),
    Mistake(
        "heads-share-by-turns",
        "Query heads share key heads by turns",
        "Query head h reads key head h mod K; heads of a group are neighbours: h div G.",
        ("attn_scores",),
        exchange(group=_by_turns),
        "Repeat each key head G times in place; do not tile the block of heads.",
        acts=has_groups,
    ),
    Mistake(
        "heads-not-transposed",
        "Heads joined channel by channel",
        "Before the output projection the heads are joined with channels first: a reshape without its transpose.",
        ("attn_out",),
        exchange(flatten=_channels_first),
        "Join heads as [T, H, C] -> [T, H C].",
    ),
    Mistake(
        "values-of-the-next-head",
        "Head outputs shifted by one head",
        "Each head's output stands where its neighbour's should.",
        ("attn_heads",),
        tap_changed(lambda heads_THC: np.roll(heads_THC, 1, axis=1), "attn_heads"),
        "Write head h at h C.",
    ),
    Mistake(
        "sinks-missing",
        "Attention sinks missing",
        "The softmax is over the keys alone.",
        SINKS,
        exchange(normalise=lambda scores, mask, sink: ops.attention_weights(scores, mask, None)),
        "Add exp(sink - max) to each head's denominator; check every attention path (prefill, decode, batched).",
        ("vllm-metal #212, #550", "ik_llama.cpp #2087", "vLLM #28660", "mlx-swift-lm #130, #210"),
        is_gpt_oss,
    ),
    Mistake(
        "sinks-twice",
        "Attention sinks counted twice",
        "The denominator has the sink two times, as when each part of a split softmax adds it.",
        SINKS,
        weight_changed(lambda sink_H: sink_H + np.log(2).astype(sink_H.dtype), "self_attn.sinks"),
        "Add the sink once, after the parts are joined.",
        ("mistral.rs #1872",),
        is_gpt_oss,
    ),
    Mistake(
        "sinks-of-the-next-head",
        "Attention sinks shifted by one head",
        "Each head has its neighbour's sink.",
        SINKS,
        weight_changed(lambda sink_H: np.roll(sink_H, 1), "self_attn.sinks"),
        "Index the sinks by the query head.",
        ("sgl-kernel-npu #216",),
        is_gpt_oss,
    ),
    Mistake(
        "sinks-scaled",
        "Attention sinks scaled like scores",
        "Sinks are divided by sqrt(head size); they are on the scale of the scaled scores already.",
        SINKS,
        _sinks_scaled,
        "Append the sink after the scaling.",
        ("sgl-kernel-npu #216",),
        is_gpt_oss,
    ),
    Mistake(
        "sinks-not-shifted",
        "Attention sinks without the maximum subtracted",
        "The scores' maximum is subtracted from the scores but not from the sink.",
        SINKS,
        exchange(normalise=_sink_not_shifted),
        "Subtract the same maximum from scores and sink.",
        (),
        is_gpt_oss,
    ),
    Mistake(
        "sinks-have-a-value",
        "Attention sinks take a value",
        "The sink's weight goes to the first key's value: it should go nowhere.",
        ("attn_heads",),
        exchange(combine=_sink_has_value),
        "Drop the sink's column after the softmax.",
        ("sgl-kernel-npu #216",),
        is_gpt_oss,
    ),
)
