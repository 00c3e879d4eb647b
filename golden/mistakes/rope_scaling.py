"""Mistakes of scaled rotary positions: YaRN, Llama 3's, LongRoPE."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from assay.golden.mistakes.mistake import (
    ROPE,
    SECOND_POSITION,
    Mistake,
    Needs,
    has_llama3,
    has_longrope,
    has_yarn,
)
from assay.golden.mistakes.recipe import Array, Variant, configure, exchange, scaling
from assay.golden.mistakes.rope import angle_tables, attention_factor, plain_frequencies
from assay.reference.config import Config, LongRopeScaling, YarnScaling

FAMILY = "scaled rotary positions"


def _positions_scaled(config: Config, position_T: Array, dtype: Any) -> tuple[Array, Array]:
    assert isinstance(config.rope_scaling, YarnScaling)
    angle = np.outer(position_T / config.rope_scaling.factor, plain_frequencies(config))
    return angle_tables(angle, dtype, attention_factor(config))


def _frequencies_plain(config: Config, position_T: Array, dtype: Any) -> tuple[Array, Array]:
    return angle_tables(np.outer(position_T, plain_frequencies(config)), dtype, attention_factor(config))


def _ramp_by_channel(config: Config, position_T: Array, dtype: Any) -> tuple[Array, Array]:
    """YaRN whose ramp counts channels: pair j is placed at 2j."""
    scaled = config.rope_scaling
    assert isinstance(scaled, YarnScaling)
    plain = plain_frequencies(config)
    C, base, context = config.head_dim, math.log(config.rope_theta), scaled.original_max_position_embeddings
    low, high = (C * math.log(context / (2 * math.pi * b)) / (2 * base) for b in (scaled.beta_fast, scaled.beta_slow))
    low, high = max(low, 0), min(high, C - 1)
    place = np.clip((2 * np.arange(C // 2) - low) / max(high - low, 0.001), 0, 1)
    return angle_tables(
        np.outer(position_T, (1 - place + place / scaled.factor) * plain), dtype, scaled.attention_factor
    )


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
    return angle_tables(np.outer(position_T, plain_frequencies(config) / factor), dtype, 1.0)


def _long_needs(config: Config) -> Needs:
    scaled = config.rope_scaling
    if isinstance(scaled, LongRopeScaling):
        return Needs(tokens=scaled.original_max_position_embeddings + 1)
    return Needs(else_="more tokens than the original context")


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
)
