"""Rotary position embedding: plain, Llama-3 scaled, YaRN and LongRoPE (Su et al. 2021, arXiv:2104.09864).

Pair j of a head (j = 0 .. C/2 - 1) turns by the angle position * inv_freq_j. Which two channels form
pair j is a convention: here, as in Hugging Face checkpoints, j and j + C/2 (half-split, "NeoX");
llama.cpp's Llama and Meta's own weights pair the neighbours 2j and 2j + 1, which is the same
mathematics on permuted rows of W_q and W_k.
"""

import math

import numpy as np

from assay.reference.config import Config, FrequencyFactors, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling, length: int = 1) -> np.ndarray:
    """Radians per position of each rotary pair, after scaling; float64 [C/2].

    `length` is the number of positions up to the end of the call, by which LongRoPE chooses its factors.
    """
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # Su et al., eq. 15
    match scaling:
        case None:
            return plain
        case Llama3Scaling():
            return _llama3(plain, scaling)
        case YarnScaling():
            return _yarn(plain, head_dim, theta, scaling)
        case FrequencyFactors():
            return plain / np.asarray(scaling.factors)
        case LongRopeScaling():
            # by the length that the call reaches, as in transformers; llama.cpp goes by the size of its context
            is_long = length > scaling.original_max_position_embeddings
            return plain / np.asarray(scaling.long_factor if is_long else scaling.short_factor)


def _llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Long waves divided by the factor, short ones kept, a linear blend in rotations between the two."""
    rotations = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # turns within the old context
    keep = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor


def _yarn(plain: np.ndarray, head_dim: int, theta: float, scaling: YarnScaling) -> np.ndarray:
    """Interpolate slow pairs by the factor, keep fast ones, a linear ramp over pair indices between.

    arXiv:2309.00071 section 3.2 defines the ramp over rotations; every released implementation, and so
    every checkpoint, has it over the pair index instead, between the pairs that turn beta_fast and
    beta_slow times within the original context.
    """

    def pair_index(rotations: float) -> float:
        wavelengths = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = pair_index(scaling.beta_fast), pair_index(scaling.beta_slow)
    if scaling.truncate:  # gpt-oss says false; ggml and mlx-lm round regardless
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the released code's guard against a ramp of no width
    interpolate = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return interpolate * plain / scaling.factor + (1 - interpolate) * plain


def rope_tables(config: Config, position_T: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position and pair, the scaling's attention factor included, each [T, C/2].

    The angle is formed in `dtype`: in float32 its error grows with the position, as it does in every
    backend that computes so.
    """
    scaling, length = config.rope_scaling, int(position_T.max()) + 1
    inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, scaling, length)
    angle = position_T[:, None].astype(dtype) * inv_freq.astype(dtype)
    # a temperature: m on q and on k multiplies every score by m^2 (arXiv:2309.00071, eq. 22)
    m = scaling.attention_factor if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0
    return np.cos(angle) * dtype.type(m), np.sin(angle) * dtype.type(m)


def apply_rope(x_THC: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn pair (j, j + C/2) of every head by its angle; x [T,H,C], cos and sin [T,C/2]."""
    first, second = np.split(x_THC, 2, axis=-1)  # half-split layout
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
