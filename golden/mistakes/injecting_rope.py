"""Mistakes of rotary positions in the Numba path: other tables, other pairs, other rows."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from assay.golden.mistakes.injecting import Array, Injection, Weight, calls
from assay.golden.rounding import to_bfloat16
from assay.loaders.checkpoint import Checkpoint


def turned(change: Callable[[Array, Array], tuple[Array, Array]]) -> Injection:
    """The rotary tables, once formed."""
    return calls("rotary_tables", lambda f, config, start, T: change(*f(config, start, T)))


def placed(start_of: Callable[[int], int]) -> Injection:
    """The rotary tables for another first position."""
    return calls("rotary_tables", lambda f, config, start, T: f(config, start_of(start), T))


def rows(to_neighbours: bool) -> Weight:
    """Rows of every head from halves to neighbours, or back."""

    def change(w: Array, checkpoint: Checkpoint) -> Array:
        C = checkpoint.config.head_dim
        order = np.arange(C).reshape((2, -1) if to_neighbours else (-1, 2)).T.ravel()
        return w.reshape(-1, C, w.shape[1])[:, order].reshape(w.shape)

    return change


def neighbours(original: Any, x: Array, cos: Array, sin: Array) -> Array:
    y, c, s = np.empty_like(x), cos[:, None], sin[:, None]
    y[..., ::2], y[..., 1::2] = x[..., ::2] * c - x[..., 1::2] * s, x[..., 1::2] * c + x[..., ::2] * s
    return y


def angles(config: Any, start: int, T: int, dividing: float, rounding: bool) -> tuple[Array, Array]:
    """Tables of plain frequencies at divided positions, or of the right angles in bfloat16."""
    from assay.fast.cpu.rope import rotary_frequencies

    plain = [config.rope_theta ** (-2 * j / config.head_dim) for j in range(config.head_dim // 2)]
    turns = np.array(rotary_frequencies(config, start + T) if rounding else plain)
    angle = np.outer(np.arange(start, start + T), turns.astype(np.float32)).astype(np.float32) / np.float32(dividing)
    angle = to_bfloat16(angle) if rounding else angle
    factor = getattr(config.rope_scaling, "attention_factor", 1.0)
    return (np.cos(angle) * factor).astype(np.float32), (np.sin(angle) * factor).astype(np.float32)


def frequencies(change: Callable[[Any], list[float]]) -> Injection:
    """Rotary tables of other frequencies, asked for with the config."""

    def tables(original: Any, config: Any, start: int, T: int) -> tuple[Array, Array]:
        angle = np.outer(np.arange(start, start + T), change(config))
        factor = getattr(config.rope_scaling, "attention_factor", 1.0)
        return (np.cos(angle) * factor).astype(np.float32), (np.sin(angle) * factor).astype(np.float32)

    return calls("rotary_tables", tables)


def plain(config: Any) -> list[float]:
    return [config.rope_theta ** (-2 * j / config.head_dim) for j in range(config.head_dim // 2)]


def ramp_by_channel(config: Any) -> list[float]:
    """YaRN's frequencies with the ramp at 2j in place of j."""
    s, C = config.rope_scaling, config.head_dim
    pair = lambda turns: (  # noqa: E731
        C * math.log(s.original_max_position_embeddings / turns / 2 / math.pi) / 2 / math.log(config.rope_theta)
    )
    low, high = max(pair(s.beta_fast), 0), min(pair(s.beta_slow), C - 1)
    blend = [min(max((2 * j - low) / (high - low), 0), 1) for j in range(C // 2)]
    return [f * (1 - b) + f / s.factor * b for f, b in zip(plain(config), blend, strict=True)]


def positions_in(dtype: Callable[[Array], Array]) -> Injection:
    """Each position rounded before its row of the tables is formed."""

    def tables(original: Any, config: Any, start: int, T: int) -> tuple[Array, Array]:
        rows = [original(config, int(p), 1) for p in dtype(np.arange(start, start + T, dtype=np.float32))]
        return np.concatenate([cos for cos, _ in rows]), np.concatenate([sin for _, sin in rows])

    return calls("rotary_tables", tables)
