"""Rotary frequencies in float64, and their periods as `mx.fast.rope` takes them; twin of `reference/rope.py`."""

import math

import mlx.core as mx
import numpy as np

from assay.reference.config import Config, FrequencyFactors, Llama3Scaling, LongRopeScaling, YarnScaling


class Rotation:
    """Turns pair (j, j + C/2) of every head by its angle, the scaling's attention factor included."""

    def __init__(self, config: Config) -> None:
        self.scaling, self.C = config.rope_scaling, config.head_dim
        plain = config.rope_theta ** (np.arange(0, self.C, 2) / self.C)  # periods: radians' reciprocals
        if isinstance(self.scaling, LongRopeScaling):
            self.periods = [_as_mlx(plain * np.array(self.scaling.short_factor))]
            self.periods += [_as_mlx(plain * np.array(self.scaling.long_factor))]
        else:
            self.periods = [_as_mlx(_scaled(plain, config))]
        scaling = self.scaling
        self.factor = scaling.attention_factor if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0

    def __call__(self, x: mx.array, start: int) -> mx.array:
        """Heads [B,H,T,C] of positions from `start` on, turned in float32 and rounded once to their own dtype."""
        dtype, x, periods = x.dtype, x.astype(mx.float32), self.periods[0]
        if self.factor != 1:
            x = x * self.factor
        if isinstance(self.scaling, LongRopeScaling):
            # transformers' convention, as in the oracle: the chunk's end decides
            periods = self.periods[start + x.shape[2] > self.scaling.original_max_position_embeddings]
        turned = mx.fast.rope(x, self.C, traditional=False, base=None, scale=1.0, offset=start, freqs=periods)
        return turned.astype(dtype)


def _as_mlx(period: np.ndarray) -> mx.array:
    """float32 periods whose reciprocals in float32, which MLX forms, come nearest to the frequencies."""
    nearest = period.astype(np.float32)
    candidates = np.stack([np.nextafter(nearest, np.float32(0)), nearest, np.nextafter(nearest, np.float32(np.inf))])
    error = np.abs((np.float32(1) / candidates).astype(np.float64) * period - 1)
    return mx.array(np.take_along_axis(candidates, error.argmin(axis=0)[None], axis=0)[0])


def _scaled(plain: np.ndarray, config: Config) -> np.ndarray:
    scaling = config.rope_scaling
    if isinstance(scaling, FrequencyFactors):
        return plain * np.array(scaling.factors)
    if isinstance(scaling, Llama3Scaling):
        return _llama3(plain, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(plain, config.head_dim, config.rope_theta, scaling)
    return plain


def _llama3(period: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Long waves stretched, short ones kept, frequencies blended between (meta-llama/llama-models `apply_scaling`)."""
    turns = scaling.original_max_position_embeddings / (2 * math.pi * period)
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return period / (kept + (1 - kept) / scaling.factor)


def _yarn(period: np.ndarray, C: int, theta: float, scaling: YarnScaling) -> np.ndarray:
    """Slow pairs stretched, fast ones kept, a ramp over pair indices between, its ends rounded only if `truncate`."""
    turns = np.array([scaling.beta_fast, scaling.beta_slow])
    ends = C / 2 * np.log(scaling.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta)
    if scaling.truncate:
        ends = np.array([np.floor(ends[0]), np.ceil(ends[1])])
    low, high = max(ends[0], 0), min(ends[1], C - 1)
    high += 0.001 * (high == low)  # the released code's guard against an empty ramp
    stretched = np.clip((np.arange(C // 2) - low) / (high - low), 0, 1)
    return period / (stretched / scaling.factor + (1 - stretched))
