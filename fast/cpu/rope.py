"""Rotary tables, pair by pair in Python floats; twin of `reference/rope.py`, with none of its code."""

import math

import numpy as np

from assay.reference.config import Config, FrequencyFactors, Llama3Scaling, LongRopeScaling, YarnScaling


def rotary_frequencies(config: Config, end: int = 1) -> list[float]:
    """Radians per position of each of the C/2 rotary pairs, after scaling, in a chunk that goes up to `end` - 1."""
    C, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    pairs = range(C // 2)
    plain = [math.exp(-2 * j / C * math.log(theta)) for j in pairs]
    if isinstance(scaling, FrequencyFactors):
        return [plain[j] / scaling.factors[j] for j in pairs]
    if isinstance(scaling, LongRopeScaling):
        # transformers' convention, as in the oracle: the chunk's end decides, keys cached before stay as they are
        within = end <= scaling.original_max_position_embeddings
        divisors = scaling.short_factor if within else scaling.long_factor
        return [frequency / divisor for frequency, divisor in zip(plain, divisors, strict=True)]
    if isinstance(scaling, Llama3Scaling):
        return [_llama3(frequency, scaling) for frequency in plain]
    if isinstance(scaling, YarnScaling):
        fast, slow = _yarn_ends(C, theta, scaling)
        return [_yarn(plain[j], (j - fast) / (slow - fast), scaling.factor) for j in pairs]
    return plain


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    """Kept for short waves, divided for long ones, blended between (meta-llama/llama-models `apply_scaling`)."""
    wavelength = 2 * math.pi / frequency
    context = scaling.original_max_position_embeddings
    if wavelength <= context / scaling.high_freq_factor:
        return frequency
    if wavelength >= context / scaling.low_freq_factor:
        return frequency / scaling.factor
    share = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return frequency / scaling.factor + share * (frequency - frequency / scaling.factor)


def _yarn_ends(C: int, theta: float, scaling: YarnScaling) -> tuple[float, float]:
    """The pair indices between which YaRN goes over from keeping a frequency to dividing it."""
    # pair j turns context * theta^(-2j/C) / 2 pi times within the original context; solved for j
    context = scaling.original_max_position_embeddings
    fast, slow = (
        C / 2 * math.log(context / (2 * math.pi * turns), theta) for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, C - 1)
    return fast, slow if slow != fast else fast + 0.001  # the released code's guard against an empty ramp


def _yarn(frequency: float, place: float, factor: float) -> float:
    """A frequency at this place of the ramp: 0 and before kept, 1 and beyond divided by the factor."""
    place = min(max(place, 0.0), 1.0)
    return (1 - place) * frequency + place * frequency / factor


def rotary_tables(config: Config, start: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [T,C/2], of the positions from `start` on, times the attention factor of YaRN or LongRoPE.

    Formed in float64 and rounded once, so that the angle's error does not grow with the position.
    """
    angle = np.outer(np.arange(start, start + T), rotary_frequencies(config, start + T))
    scaling = config.rope_scaling
    factor = scaling.attention_factor if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0
    return (np.cos(angle) * factor).astype(np.float32), (np.sin(angle) * factor).astype(np.float32)
