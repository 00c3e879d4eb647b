"""Mistakes of routers and of the sum over experts."""

from collections.abc import Callable

import numpy as np

from assay.golden.mistakes.mistake import Mistake, is_gpt_oss
from assay.golden.mistakes.recipe import Array, Recipe, exchange, tap_changed, weight_changed
from assay.golden.rounding import to_bfloat16
from assay.reference import ops
from assay.reference.config import GptOssConfig

FAMILY = "router"


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


MISTAKES = (
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
