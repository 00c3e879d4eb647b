"""Mistakes of routers, experts and activations."""

import math
from collections.abc import Callable

import numpy as np

from assay.golden.mistakes.mistake import Mistake, Needs, has_tensor, is_dense, is_gpt_oss
from assay.golden.mistakes.recipe import (
    Array,
    Recipe,
    exchange,
    tap_changed,
    weight_changed,
    weights_renamed,
)
from assay.golden.rounding import to_bfloat16
from assay.reference import ops
from assay.reference.config import Config, GptOssConfig

ROUTER = "mlp.router"
CLAMPED = lambda config: Needs(else_="gates or ups beyond swiglu_limit")  # noqa: E731


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


def _unbiased_choice(recipe: Recipe, logits_TN: Array, router: str) -> Array:
    assert isinstance(recipe.config, GptOssConfig)
    return ops.top_k(logits_TN - recipe.weight(f"{router}.bias"), recipe.config.num_experts_per_tok)


def _smallest_chosen(recipe: Recipe, logits_TN: Array, router: str) -> Array:
    assert isinstance(recipe.config, GptOssConfig)
    return ops.top_k(-logits_TN, recipe.config.num_experts_per_tok)


def _router_in_bfloat16(recipe: Recipe, x_TD: Array, router: str) -> Array:
    weight, bias = (to_bfloat16(recipe.weight(f"{router}.{part}")) for part in ("weight", "bias"))
    return to_bfloat16(ops.linear(to_bfloat16(x_TD), weight, bias))


def _over_all(logits_TN: Array, ids_TA: Array) -> Array:
    return np.take_along_axis(ops.softmax(logits_TN), ids_TA, axis=-1)


def _sigmoid(logits_TN: Array, ids_TA: Array) -> Array:
    weights_TA = ops.sigmoid(np.take_along_axis(logits_TN, ids_TA, axis=-1))
    return weights_TA / weights_TA.sum(axis=-1, keepdims=True)


def _mix(change: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda weights_TA, out_TAD: np.einsum("TA,TAD->TD", change(weights_TA), out_TAD)


def _bias_missing(which: str, tap: str, *names: str) -> Mistake:
    ends = tuple(f"mlp.experts.{name}_proj.bias" for name in names)
    return Mistake(
        f"{which}-bias-missing",
        f"Experts' {' and '.join(names)} bias missing",
        "The bias of an expert's projection is not added.",
        tuple(f"expert_{name}" if name != "down" else "expert_out" for name in names),
        weight_changed(np.zeros_like, *ends),
        f"Add {' and '.join(ends)} of each token's own expert.",
        ("vLLM #46641", "vllm-ascend #2436", "torchtitan #2106"),
        has_tensor(ends[0]),
    )


def _dense_bias_missing(name: str, tap: str) -> Mistake:
    return Mistake(
        f"mlp-{name}-bias-missing",
        f"Bias of the {name} projection missing",
        "The feed-forward's bias is not added.",
        (tap,),
        weight_changed(np.zeros_like, f"mlp.{name}_proj.bias"),
        f"Add mlp.{name}_proj.bias.",
        ("TGI #1036", "gpt-neox #962", "nano-vllm #99"),
        has_tensor(f"mlp.{name}_proj.bias"),
    )


ROUTING = (
    Mistake(
        "router-bias-missing",
        "Router bias missing",
        "Experts are scored without the router's bias.",
        ("router_logits",),
        weight_changed(np.zeros_like, "mlp.router.bias"),
        "Add mlp.router.bias.",
        acts=is_gpt_oss,
    ),
    Mistake(
        "router-bfloat16",
        "Router in bfloat16",
        "Inputs, weights and logits of the router are rounded to bfloat16, so that near ties fall otherwise.",
        ("router_logits",),
        exchange(route=_router_in_bfloat16),
        "Compute router logits in float32.",
        ("SGLang #33764, #29783", "vLLM #58076", "AstrAI #57"),
        is_gpt_oss,
        grain=2.0**-9,
    ),
    Mistake(
        "experts-chosen-without-bias",
        "Experts chosen without the bias",
        "The top-k is taken before the router's bias is added.",
        ("expert_ids",),
        exchange(choose=_unbiased_choice),
        "Choose by the logits with bias.",
        acts=is_gpt_oss,
    ),
    Mistake(
        "smallest-experts-chosen",
        "The smallest logits chosen",
        "The sort is ascending.",
        ("expert_ids",),
        exchange(choose=_smallest_chosen),
        "Choose the largest logits.",
        acts=is_gpt_oss,
    ),
    Mistake(
        "softmax-over-all-experts",
        "Softmax over all experts, not renormalised",
        "The softmax is over all N logits and the chosen ones' weights do not sum to 1.",
        ("expert_weights",),
        exchange(weigh=_over_all),
        "Choose first; softmax over the chosen logits only.",
        ("llama.cpp #16711, #16821, #18071", "SGLang #8892", "Megatron-LM #1482"),
        is_gpt_oss,
    ),
    Mistake(
        "sigmoid-router",
        "Sigmoid in place of softmax",
        "Chosen logits go through a sigmoid and are normalised, as in other mixtures of experts.",
        ("expert_weights",),
        exchange(weigh=_sigmoid),
        "Softmax over the chosen logits.",
        acts=is_gpt_oss,
    ),
    Mistake(
        "expert-weights-equal",
        "Experts weighted equally",
        "Every chosen expert has the weight 1 / A.",
        ("mlp_out",),
        exchange(mix=_mix(lambda weights: np.full_like(weights, 1 / weights.shape[1]))),
        "Weight each expert's output by its softmax weight.",
        acts=is_gpt_oss,
    ),
    Mistake(
        "expert-weights-not-applied",
        "Experts summed without weights",
        "Outputs of the chosen experts are added up as they are.",
        ("mlp_out",),
        exchange(mix=_mix(np.ones_like)),
        "Weight each expert's output by its softmax weight.",
        acts=is_gpt_oss,
    ),
    Mistake(
        "expert-weights-wrong-slot",
        "Expert weights in the wrong slot",
        "Weights and experts of a token are in opposite orders.",
        ("mlp_out",),
        exchange(mix=_mix(lambda weights: weights[:, ::-1])),
        "Sort weights and ids together.",
        ("vllm-xpu-kernels #66", "tokenspeed #605", "candle-vllm #296"),
        is_gpt_oss,
    ),
    Mistake(
        "expert-weights-next-slot",
        "Expert weights shifted by one slot",
        "Each chosen expert has its neighbour's weight.",
        ("mlp_out",),
        exchange(mix=_mix(lambda weights: np.roll(weights, 1, axis=1))),
        "Sort weights and ids together.",
        ("vllm-xpu-kernels #66", "tokenspeed #605"),
        lambda c: isinstance(c.config, GptOssConfig) and c.config.num_experts_per_tok > 2,
    ),
    Mistake(
        "reduced-twice",
        "Experts' sum reduced twice",
        "The sum over experts is doubled, as when two ranks that both hold it are reduced.",
        ("mlp_out",),
        tap_changed(lambda out: 2 * out, "mlp_out"),
        "Reduce over ranks once.",
        ("SGLang #37199", "vLLM #31422"),
    ),
    Mistake(
        "reduced-four-times",
        "Experts' sum reduced over four ranks",
        "The sum over experts is four times too large.",
        ("mlp_out",),
        tap_changed(lambda out: 4 * out, "mlp_out"),
        "Reduce over ranks once.",
        ("SGLang #37199",),
    ),
)
ACTIVATION = (
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
SWAPPED = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
BIASES = (
    _bias_missing("gate-up", "expert_gate", "gate", "up"),
    _bias_missing("gate", "expert_gate", "gate"),
    _bias_missing("up", "expert_up", "up"),
    _bias_missing("down", "expert_out", "down"),
    Mistake(
        "down-bias-per-rank",
        "Experts' down bias added on each of two ranks",
        "The down projection's bias is doubled by the reduction over ranks.",
        ("expert_out",),
        weight_changed(lambda bias: 2 * bias, "mlp.experts.down_proj.bias"),
        "Add the bias on one rank only.",
        ("vLLM #46641", "vllm-ascend #2436", "torchtitan #2106"),
        is_gpt_oss,
    ),
    _dense_bias_missing("gate", "gate"),
    _dense_bias_missing("up", "up"),
    _dense_bias_missing("down", "mlp_out"),
    Mistake(
        "gate-up-weights-swapped",
        "Gate and up projections swapped",
        "Gates come from the up projection and ups from the gate projection.",
        ("expert_gate", "expert_up", "gate", "up"),
        weights_renamed(SWAPPED),
        "gpt-oss's fused matrix has gates in even rows, ups in odd ones; llama.cpp's and MLX's are split already.",
        ("mlx-lm #767", "vLLM #46645", "SGLang #26884", "ik_llama.cpp #829"),
    ),
    Mistake(
        "gate-up-matrices-swapped",
        "Gate and up matrices swapped, their biases not",
        "The two matrices are exchanged and each bias stays where it was.",
        ("expert_gate", "expert_up"),
        weights_renamed({f"{old}.weight": f"{new}.weight" for old, new in SWAPPED.items()}),
        "De-interleave weights and biases alike.",
        ("mlx-lm #767", "ik_llama.cpp #829"),
        is_gpt_oss,
    ),
)
MISTAKES = ROUTING + ACTIVATION + BIASES
