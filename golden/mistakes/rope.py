"""Mistakes of rotary positions, scaled or not."""

from dataclasses import replace
from typing import Any

import numpy as np

from assay.golden.mistakes.mistake import ROPE, SECOND_CHUNK, SECOND_POSITION, Mistake, Needs
from assay.golden.mistakes.recipe import Array, Recipe, Variant, configure, exchange
from assay.golden.rounding import to_bfloat16
from assay.reference.config import Config, LongRopeScaling, YarnScaling
from assay.reference.rope import apply_rope, inverse_frequencies, rope_tables

FAMILY = "rotary positions"


def plain_frequencies(config: Config) -> Array:
    return inverse_frequencies(config.head_dim, config.rope_theta, None)


def angle_tables(angle: Array, dtype: Any, factor: float) -> tuple[Array, Array]:
    return (np.cos(angle) * factor).astype(dtype), (np.sin(angle) * factor).astype(dtype)


def attention_factor(config: Config) -> float:
    scaled = config.rope_scaling
    return scaled.attention_factor if isinstance(scaled, YarnScaling | LongRopeScaling) else 1.0


def _frequencies(config: Config, position_T: Array) -> Array:
    length = int(position_T.max()) + 1
    return inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, length)


def _angle_in_bfloat16(config: Config, position_T: Array, dtype: Any) -> tuple[Array, Array]:
    angle = np.outer(position_T, _frequencies(config, position_T).astype(np.float32))
    return angle_tables(to_bfloat16(angle), dtype, attention_factor(config))


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


def _without_rotation_of(kind: str) -> Variant:
    def variant(recipe: Recipe) -> Recipe:
        return replace(recipe, rotate=lambda k, x, cos, sin: x if k == kind else recipe.rotate(k, x, cos, sin))

    return variant


MISTAKES = (
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
