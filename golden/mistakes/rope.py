"""Mistakes of rotary positions."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from assay.golden.mistakes.mistake import (
    ROPE,
    SECOND_CHUNK,
    SECOND_POSITION,
    Mistake,
    Needs,
    has_llama3,
    has_longrope,
    has_yarn,
)
from assay.golden.mistakes.recipe import Array, Recipe, Variant, configure, exchange, scaling
from assay.golden.rounding import to_bfloat16
from assay.reference.config import Config, LongRopeScaling, YarnScaling
from assay.reference.rope import apply_rope, inverse_frequencies, rope_tables


def _plain_frequencies(config: Config) -> Array:
    return inverse_frequencies(config.head_dim, config.rope_theta, None)


def _tables(angle: Array, dtype: Any, factor: float) -> tuple[Array, Array]:
    return (np.cos(angle) * factor).astype(dtype), (np.sin(angle) * factor).astype(dtype)


def _factor(config: Config) -> float:
    scaled = config.rope_scaling
    return scaled.attention_factor if isinstance(scaled, YarnScaling | LongRopeScaling) else 1.0


def _frequencies(config: Config, position_T: Array) -> Array:
    length = int(position_T.max()) + 1
    return inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, length)


def _positions_scaled(config: Config, position_T: Array, dtype: Any) -> tuple[Array, Array]:
    assert isinstance(config.rope_scaling, YarnScaling)
    angle = np.outer(position_T / config.rope_scaling.factor, _plain_frequencies(config))
    return _tables(angle, dtype, _factor(config))


def _frequencies_plain(config: Config, position_T: Array, dtype: Any) -> tuple[Array, Array]:
    return _tables(np.outer(position_T, _plain_frequencies(config)), dtype, _factor(config))


def _ramp_by_channel(config: Config, position_T: Array, dtype: Any) -> tuple[Array, Array]:
    """YaRN whose ramp counts channels: pair j is placed at 2j."""
    scaled = config.rope_scaling
    assert isinstance(scaled, YarnScaling)
    plain = _plain_frequencies(config)
    C, base, context = config.head_dim, math.log(config.rope_theta), scaled.original_max_position_embeddings
    low, high = (C * math.log(context / (2 * math.pi * b)) / (2 * base) for b in (scaled.beta_fast, scaled.beta_slow))
    low, high = max(low, 0), min(high, C - 1)
    place = np.clip((2 * np.arange(C // 2) - low) / max(high - low, 0.001), 0, 1)
    return _tables(np.outer(position_T, (1 - place + place / scaled.factor) * plain), dtype, scaled.attention_factor)


def _angle_in_bfloat16(config: Config, position_T: Array, dtype: Any) -> tuple[Array, Array]:
    angle = np.outer(position_T, _frequencies(config, position_T).astype(np.float32))
    return _tables(to_bfloat16(angle), dtype, _factor(config))


def _tables_in_bfloat16(config: Config, position_T: Array, dtype: Any) -> tuple[Array, Array]:
    cos, sin = rope_tables(config, position_T, dtype)
    return to_bfloat16(cos), to_bfloat16(sin)


def _positions_in(bits: int) -> Variant:
    """Positions rounded to a float of so many significant bits."""

    def rounded(config: Config, position_T: Array, dtype: Any) -> tuple[Array, Array]:
        step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(position_T, 1))) + 1 - bits, 0))
        return rope_tables(config, np.round(position_T / step) * step, dtype)

    return exchange(tables=rounded)


def _neighbours(kind: str, x_THC: Array, cos: Array, sin: Array) -> Array:
    even, odd, cos, sin = x_THC[..., ::2], x_THC[..., 1::2], cos[:, None], sin[:, None]
    return np.stack((even * cos - odd * sin, odd * cos + even * sin), axis=-1).reshape(x_THC.shape)


def _longrope(which: str) -> Variant:
    """Always the same one of LongRoPE's two sets."""

    def fixed(config: Config) -> Any:
        scaled = config.rope_scaling
        assert isinstance(scaled, LongRopeScaling)
        factors = getattr(scaled, which)
        return replace(scaled, short_factor=factors, long_factor=factors)

    return configure(rope_scaling=fixed)


def _linear_in_place_of_llama3(config: Config, position_T: Array, dtype: Any) -> tuple[Array, Array]:
    factor = config.rope_scaling.factor  # type: ignore[union-attr]
    return _tables(np.outer(position_T, _plain_frequencies(config) / factor), dtype, 1.0)


def _long_needs(config: Config) -> Needs:
    scaled = config.rope_scaling
    return Needs(tokens=scaled.original_max_position_embeddings + 1) if isinstance(scaled, LongRopeScaling) else Needs()


def _without_rotation_of(kind: str) -> Variant:
    def variant(recipe: Recipe) -> Recipe:
        return replace(recipe, rotate=lambda k, x, cos, sin: x if k == kind else recipe.rotate(k, x, cos, sin))

    return variant


MISTAKES = (
    Mistake(
        "yarn-ramp-rounded",
        "YaRN ramp rounded",
        "The ends of YaRN's ramp are rounded to whole pair indices; gpt-oss's config says truncate = false.",
        ROPE,
        scaling(truncate=True),
        "Read rope_scaling.truncate and leave the ends of the ramp as they are where it is false.",
        ("vLLM #27722, #28244", "SGLang #14270", "ggml, mlx-lm and ik_llama.cpp as of 2025"),
        lambda c: has_yarn(c) and not c.config.rope_scaling.truncate,  # type: ignore[union-attr]
        SECOND_POSITION,
    ),
    Mistake(
        "yarn-betas-ignored",
        "YaRN betas of the config ignored",
        "The ramp is placed by beta_fast = 32 and beta_slow = 1, gpt-oss's own, whatever the config says.",
        ROPE,
        scaling(beta_fast=32.0, beta_slow=1.0),
        "Read rope_scaling.beta_fast and beta_slow (in GGUF rope.scaling.yarn_beta_fast and yarn_beta_slow).",
        ("llama.cpp src/models/openai-moe.cpp (not read for gpt-oss) as of 2025",),
        lambda c: has_yarn(c) and (c.config.rope_scaling.beta_fast, c.config.rope_scaling.beta_slow) != (32.0, 1.0),  # type: ignore[union-attr]
        SECOND_POSITION,
    ),
    Mistake(
        "yarn-factor-missing",
        "YaRN attention factor missing",
        "cos and sin are not multiplied by YaRN's attention factor, so that scores are too small by its square.",
        ROPE,
        scaling(attention_factor=1.0),
        "Multiply cos and sin by 0.1 ln(factor) + 1, or by the config's attention_factor.",
        ("llama.cpp #17945, #18004, #18006", "mlx-lm 060aa434"),
        has_yarn,
    ),
    Mistake(
        "yarn-factor-twice",
        "YaRN attention factor applied twice",
        "cos and sin carry the square of YaRN's attention factor.",
        ROPE,
        scaling(attention_factor=lambda config: config.rope_scaling.attention_factor**2),
        "Apply the factor once to cos and sin; do not scale q and k or the scores by it again.",
        ("llama.cpp #17945, #18004, #18006",),
        has_yarn,
    ),
    Mistake(
        "yarn-missing",
        "YaRN dropped: plain RoPE",
        "Neither frequencies nor attention factor are scaled.",
        ROPE,
        configure(rope_scaling=None),
        "Read rope_scaling; newer configs call it rope_parameters.",
        ("TensorRT-Model-Connect #399", "SGLang #30050"),
        has_yarn,
    ),
    Mistake(
        "yarn-frequencies-plain",
        "YaRN's attention factor without its frequencies",
        "cos and sin carry the attention factor but turn by the unscaled frequencies.",
        ROPE,
        exchange(tables=_frequencies_plain),
        "Divide the frequencies of the slow pairs as rope_scaling says.",
        (),
        has_yarn,
        SECOND_POSITION,
    ),
    Mistake(
        "yarn-scales-positions",
        "YaRN scales positions, not frequencies",
        "All positions are divided by the factor, as in linear interpolation; fast pairs should keep theirs.",
        ROPE,
        exchange(tables=_positions_scaled),
        "Interpolate each pair's frequency by its place on the ramp; leave positions alone.",
        ("rasbt/LLMs-from-scratch #940",),
        has_yarn,
        SECOND_POSITION,
    ),
    Mistake(
        "yarn-new-context",
        "YaRN ramp from the extended context",
        "The ramp is placed by max_position_embeddings in place of original_max_position_embeddings.",
        ROPE,
        scaling(original_max_position_embeddings=lambda config: config.max_position_embeddings),
        "Place the ramp by rope_scaling.original_max_position_embeddings.",
        (),
        has_yarn,
        SECOND_POSITION,
    ),
    Mistake(
        "yarn-ramp-by-channel",
        "YaRN ramp counted in channels",
        "The ramp is placed by channel index, 2j, in place of pair index, j.",
        ROPE,
        exchange(tables=_ramp_by_channel),
        "Let the ramp run over pairs: head size / 2 of them.",
        ("llama.cpp #2268, #4093",),
        has_yarn,
        SECOND_POSITION,
    ),
    Mistake(
        "llama3-missing",
        "Llama-3 RoPE scaling missing",
        "Frequencies are those of plain RoPE: nothing is wrong on a short prompt's fast pairs, everything far out.",
        ROPE,
        configure(rope_scaling=None),
        "Apply rope_scaling of type llama3, or GGUF's rope_freqs.weight.",
        ("ik_llama.cpp #2291", "llama.cpp #8676", "mlxcel #1355", "tiny-vllm #1", "felafax #59"),
        has_llama3,
        SECOND_POSITION,
    ),
    Mistake(
        "llama3-linear",
        "Llama-3 RoPE scaling applied to all pairs",
        "Every frequency is divided by the factor; short waves should keep theirs.",
        ROPE,
        exchange(tables=_linear_in_place_of_llama3),
        "Scale by wavelength: keep the short, divide the long, blend between.",
        (),
        has_llama3,
        SECOND_POSITION,
    ),
    Mistake(
        "longrope-always-long",
        "LongRoPE's long factors on a short prompt",
        "The long factors are used although the sequence is within the original context.",
        ROPE,
        _longrope("long_factor"),
        "Choose the set by the length that the call reaches.",
        ("mlx-lm as of 0.32",),
        has_longrope,
        SECOND_POSITION,
    ),
    Mistake(
        "longrope-always-short",
        "LongRoPE's short factors on a long prompt",
        "The short factors are used although the sequence is beyond the original context.",
        ROPE,
        _longrope("short_factor"),
        "Choose the set by the length that the call reaches.",
        (),
        has_longrope,
        _long_needs,
    ),
    Mistake(
        "longrope-factor-missing",
        "LongRoPE attention factor missing",
        "cos and sin are not multiplied by LongRoPE's attention factor.",
        ROPE,
        scaling(attention_factor=1.0),
        "Multiply cos and sin by sqrt(1 + ln(new / old context) / ln(old context)).",
        (),
        has_longrope,
    ),
    Mistake(
        "rope-base-10000",
        "RoPE base 10000",
        "The default base is used in place of rope_theta.",
        ROPE,
        configure(rope_theta=10000.0),
        "Read rope_theta; newer configs keep it in rope_parameters.",
        ("SGLang #30050",),
        lambda c: c.config.rope_theta != 10000.0,
        SECOND_POSITION,
    ),
    Mistake(
        "rope-neighbours",
        "RoPE turns neighbours, not halves",
        "Pair j is taken as channels 2j and 2j + 1; these weights are for j and j + C/2.",
        ROPE,
        exchange(rotate=_neighbours),
        "Pair channel j with j + C/2, or permute the rows of W_q and W_k for the other layout once.",
        ("TinyLlama #24", "transformers #25199", "llama2.c #286", "rasbt/LLMs-from-scratch #747, #750"),
        needs=SECOND_POSITION,
    ),
    Mistake(
        "rope-backwards",
        "RoPE turns backwards",
        "The sign of the sine is the other one: every pair turns by minus its angle.",
        ROPE,
        exchange(rotate=lambda kind, x, cos, sin: apply_rope(x, cos, -sin)),
        "first' = first cos - second sin, second' = second cos + first sin.",
        needs=SECOND_POSITION,
    ),
    Mistake(
        "rope-missing",
        "RoPE missing",
        "Queries and keys are not turned at all.",
        ROPE,
        exchange(rotate=lambda kind, x, cos, sin: x),
        "Turn queries and keys before they meet (and before keys are cached).",
        needs=SECOND_POSITION,
    ),
    Mistake(
        "rope-missing-on-keys",
        "RoPE missing on keys",
        "Queries are turned and keys are not.",
        ("k_rope",),
        _without_rotation_of("k_rope"),
        "Turn keys too, before they are cached.",
        needs=SECOND_POSITION,
    ),
    Mistake(
        "rope-angles-bfloat16",
        "RoPE angles in bfloat16",
        "position x frequency is rounded to bfloat16, so that the error grows with the position.",
        ROPE,
        exchange(tables=_angle_in_bfloat16),
        "Form the angle, its cosine and its sine in float32 and round those.",
        ("transformers #29285", "TransformerEngine #1245", "sglang-jax #1473", "gpt-neox #1016"),
        needs=SECOND_POSITION,
        grain=2.0**-9,
    ),
    Mistake(
        "rope-tables-bfloat16",
        "cos and sin rounded to bfloat16",
        "Angles are exact but the tables are kept in bfloat16; for a bfloat16 backend this is no mistake.",
        ROPE,
        exchange(tables=_tables_in_bfloat16),
        "Keep cos and sin in float32.",
        ("by design in openai/gpt-oss torch",),
        needs=SECOND_POSITION,
        grain=2.0**-9,
    ),
    Mistake(
        "rope-positions-bfloat16",
        "Positions in bfloat16",
        "Position ids are kept in bfloat16: above 256 several tokens share one.",
        ROPE,
        _positions_in(8),
        "Keep positions as integers, or in float32.",
        ("transformers #29285", "gpt-neox #1016"),
        needs=lambda config: Needs(tokens=258),
    ),
    Mistake(
        "rope-positions-float16",
        "Positions in float16",
        "Position ids are kept in float16: above 2048 two tokens share one.",
        ROPE,
        _positions_in(11),
        "Keep positions as integers, or in float32.",
        ("sglang-jax #1473",),
        needs=lambda config: Needs(tokens=2050),
    ),
    Mistake(
        "positions-from-one",
        "Positions start at 1",
        "Every token is turned by one position too many; harmless by itself, but cached keys no longer fit others'.",
        ROPE,
        exchange(positions=lambda position_T, start_T: position_T + 1),
        "Count positions from 0.",
    ),
    Mistake(
        "positions-restart",
        "Positions restart in each chunk",
        "Each call counts its tokens from 0 again.",
        ROPE,
        exchange(positions=lambda position_T, start_T: position_T - start_T),
        "Begin at the number of positions in the cache.",
        ("transformers #43082", "mlx-vlm #1983", "maclocal-api #92", "omlx #543"),
        needs=SECOND_CHUNK,
    ),
    Mistake(
        "positions-one-late",
        "Positions one too large after the first chunk",
        "Calls after the first count from one too many.",
        ROPE,
        exchange(positions=lambda position_T, start_T: position_T + (start_T > 0)),
        "Begin at the number of positions in the cache, not at one more.",
        ("fla #766", "transformers #43082"),
        needs=SECOND_CHUNK,
    ),
    Mistake(
        "positions-one-early",
        "Positions one too small after the first chunk",
        "Calls after the first begin at the last position that is already in the cache.",
        ROPE,
        exchange(positions=lambda position_T, start_T: position_T - (start_T > 0)),
        "Begin at the number of positions in the cache, not at one less.",
        ("omlx #543",),
        needs=SECOND_CHUNK,
    ),
)
