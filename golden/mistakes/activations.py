"""Mistakes of the feed-forward's activation."""

import math

import numpy as np

from assay.golden.mistakes.mistake import Mistake, Needs, is_dense, is_gpt_oss
from assay.golden.mistakes.recipe import Array, configure, exchange
from assay.loaders.checkpoint import Checkpoint
from assay.reference import ops
from assay.reference.config import Config, GptOssConfig

FAMILY = "activation"
CLAMPED = lambda config: Needs(else_="gates or ups beyond swiglu_limit")  # noqa: E731
RELEASED_LIMIT = 7.0  # of gpt-oss-20b and 120b, a constant in engines that know only them


def _limited_otherwise(checkpoint: Checkpoint) -> bool:
    config = checkpoint.config
    return isinstance(config, GptOssConfig) and config.swiglu_limit != RELEASED_LIMIT


def _clamped(
    gate: Array, up: Array, config: Config, *, low: float = -math.inf, alpha: float | None = None, one: float = 1.0
) -> Array:
    """The clamped SwiGLU with some of its constants exchanged."""
    assert isinstance(config, GptOssConfig)
    limit = config.swiglu_limit
    g, u = np.clip(gate, low, limit), np.clip(up, -limit, limit)
    return g * ops.sigmoid(gate.dtype.type(config.swiglu_alpha if alpha is None else alpha) * g) * (u + one)


def _without_clamp(config: Config, gate: Array, up: Array) -> Array:
    assert isinstance(config, GptOssConfig)
    return gate * ops.sigmoid(gate.dtype.type(config.swiglu_alpha) * gate) * (up + 1)


def _clamp_of_gate_missing(config: Config, gate: Array, up: Array) -> Array:
    assert isinstance(config, GptOssConfig)
    u = np.clip(up, -config.swiglu_limit, config.swiglu_limit)
    return gate * ops.sigmoid(gate.dtype.type(config.swiglu_alpha) * gate) * (u + 1)


def _clamp_after_one(config: Config, gate: Array, up: Array) -> Array:
    assert isinstance(config, GptOssConfig)
    g = np.minimum(gate, config.swiglu_limit)
    u = np.clip(up + 1, -config.swiglu_limit, config.swiglu_limit)
    return g * ops.sigmoid(gate.dtype.type(config.swiglu_alpha) * g) * u


def _both_ways(config: Config, gate: Array, up: Array) -> Array:
    assert isinstance(config, GptOssConfig)
    return _clamped(gate, up, config, low=-config.swiglu_limit)


def _swapped(config: Config, gate: Array, up: Array) -> Array:
    if isinstance(config, GptOssConfig):
        return _clamped(up, gate, config)
    return ops.swiglu(up, gate)


def _not_interleaved(config: Config, gate: Array, up: Array) -> Array:
    """Gate and up of a fused projection taken as its halves where they alternate."""
    fused = np.stack((gate, up), axis=-1).reshape(*gate.shape[:-1], -1)
    first, second = np.split(fused, 2, axis=-1)
    return _clamped(first, second, config) if isinstance(config, GptOssConfig) else ops.swiglu(first, second)


def _interleaved(config: Config, gate: Array, up: Array) -> Array:
    """Gate and up of a fused projection taken in turn where they are its halves."""
    fused = np.concatenate((gate, up), axis=-1)
    return ops.swiglu(fused[..., ::2], fused[..., 1::2])


def _gelu(config: Config, gate: Array, up: Array) -> Array:
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return (gate * 0.5 * (1 + erf(gate / math.sqrt(2))) * up).astype(gate.dtype)


def _gelu_tanh(config: Config, gate: Array, up: Array) -> Array:
    return gate * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


MISTAKES = (
    Mistake(
        "clamp-missing",
        "SwiGLU clamp missing",
        "Gates and ups beyond swiglu_limit go on unclamped: rare, and only in some tokens.",
        ("expert_act",),
        exchange(activate=_without_clamp),
        "Clamp the gate from above and the linear branch on both sides.",
        ("SGLang #39920, #39939", "tokenspeed #1647", "atomic-llama #68"),
        is_gpt_oss,
        CLAMPED,
    ),
    Mistake(
        "clamp-of-gate-missing",
        "SwiGLU clamp only on the linear branch",
        "Gates beyond swiglu_limit go on unclamped.",
        ("expert_act",),
        exchange(activate=_clamp_of_gate_missing),
        "Clamp the gate from above too.",
        ("SGLang #39920",),
        is_gpt_oss,
        CLAMPED,
    ),
    Mistake(
        "clamp-at-seven",
        "SwiGLU clamp at 7 whatever the config says",
        "The limit is that of the released models, 7, and swiglu_limit is not read.",
        ("expert_act",),
        configure(swiglu_limit=RELEASED_LIMIT),
        "Read swiglu_limit.",
        ("mlx-lm 0.32.2",),
        _limited_otherwise,
        lambda config: Needs(else_="gates or ups beyond swiglu_limit or 7, whichever is less"),
    ),
    Mistake(
        "gate-clamped-both-ways",
        "SwiGLU gate clamped from below too",
        "Gates below -swiglu_limit are clamped; only the linear branch has a lower limit.",
        ("expert_act",),
        exchange(activate=_both_ways),
        "Clamp the gate from above only.",
        (),
        is_gpt_oss,
        CLAMPED,
    ),
    Mistake(
        "clamp-after-one",
        "SwiGLU linear branch clamped after 1 is added",
        "The limit is applied to up + 1.",
        ("expert_act",),
        exchange(activate=_clamp_after_one),
        "Clamp first, then add 1.",
        (),
        is_gpt_oss,
        CLAMPED,
    ),
    Mistake(
        "silu-plain",
        "Plain SiLU in place of alpha 1.702",
        "The gate's sigmoid has the slope 1.",
        ("expert_act",),
        exchange(activate=lambda config, gate, up: _clamped(gate, up, config, alpha=1.0)),
        "g sigmoid(1.702 g).",
        ("Hyperloom #1432", "vllm-ascend #11916"),
        is_gpt_oss,
    ),
    Mistake(
        "plus-one-missing",
        "SwiGLU without the 1 on its linear branch",
        "The activation is g sigmoid(alpha g) u in place of (u + 1).",
        ("expert_act",),
        exchange(activate=lambda config, gate, up: _clamped(gate, up, config, one=0.0)),
        "Add 1 to the clamped linear branch.",
        ("Hyperloom #1432", "vllm-ascend #11916"),
        is_gpt_oss,
    ),
    Mistake(
        "plus-one-on-dense",
        "gpt-oss's 1 on a plain SwiGLU",
        "The activation is silu(g) (u + 1); this model has no 1.",
        ("act",),
        exchange(activate=lambda config, gate, up: ops.swiglu(gate, up + 1)),
        "silu(gate) up.",
        (),
        is_dense,
    ),
    Mistake(
        "gate-up-swapped",
        "Gate and up swapped in the activation",
        "The activation takes the linear branch for the gate.",
        ("expert_act", "act"),
        exchange(activate=_swapped),
        "gpt-oss's fused projection has gates in even rows, ups in odd ones.",
        ("mlx-lm #767", "vLLM #46645", "SGLang #26884", "ik_llama.cpp #829"),
    ),
    Mistake(
        "gate-up-not-interleaved",
        "Gate and up taken as halves",
        "The fused projection's outputs alternate gate and up; they are split in the middle.",
        ("expert_act",),
        exchange(activate=_not_interleaved),
        "Take even outputs as gates and odd ones as ups.",
        ("vLLM #46645", "SGLang #26884", "mlx-lm #767"),
        is_gpt_oss,
    ),
    Mistake(
        "gate-up-interleaved",
        "Gate and up taken in turn",
        "The fused projection's outputs are gates, then ups; they are taken alternately.",
        ("act",),
        exchange(activate=_interleaved),
        "Split the outputs in the middle.",
        (),
        is_dense,
    ),
    Mistake(
        "gelu",
        "GELU in place of SiLU",
        "The gate goes through the error-function GELU.",
        ("act",),
        exchange(activate=_gelu),
        "silu(x) = x sigmoid(x); read hidden_act.",
        ("TensorRT-Model-Connect #720", "mlx-examples #579"),
        is_dense,
    ),
    Mistake(
        "gelu-tanh",
        "GELU (tanh) in place of SiLU",
        "The gate goes through GELU's tanh approximation.",
        ("act",),
        exchange(activate=_gelu_tanh),
        "silu(x) = x sigmoid(x); read hidden_act.",
        ("TensorRT-Model-Connect #720", "mlx-examples #579"),
        is_dense,
    ),
    Mistake(
        "relu",
        "ReLU in place of SiLU",
        "The gate goes through a ReLU.",
        ("act",),
        exchange(activate=lambda config, gate, up: np.maximum(gate, 0) * up),
        "silu(x) = x sigmoid(x); read hidden_act.",
        (),
        is_dense,
    ),
)
