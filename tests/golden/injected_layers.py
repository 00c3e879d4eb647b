"""Mistakes of everything but attention, to be made in a transformers model (see injection.py)."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.golden.injection import experts, modeling, norms

if TYPE_CHECKING:
    import torch


# --- norms, embedding, head, residual


def norm_epsilon_ten_times_smaller(model: Any, patch: pytest.MonkeyPatch) -> None:
    for norm in norms(model):
        norm.variance_epsilon /= 10


def norm_weight_plus_one(model: Any, patch: pytest.MonkeyPatch) -> None:
    for norm in norms(model):
        norm.weight.data += 1


def final_norm_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    import torch

    model.model.norm = torch.nn.Identity()


def embedding_scaled(model: Any, patch: pytest.MonkeyPatch) -> None:
    scale = model.config.hidden_size**0.5
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output * scale)


def head_tied(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def head_not_tied(model: Any, patch: pytest.MonkeyPatch) -> None:
    import torch

    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, False, dtype=model.dtype)


def residual_in_bfloat16(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: output.bfloat16().to(output.dtype))


# --- mixture of experts


def route_by(model: Any, patch: pytest.MonkeyPatch, route: Callable[[Any, Any], tuple[Any, Any, Any]]) -> None:
    """Let `route(router, hidden)` answer logits, weights and ids in place of transformers' router."""
    patch.setattr(modeling(model).GptOssTopKRouter, "forward", route)


def router_bias_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        layer.mlp.router.bias.data.zero_()


def router_in_bfloat16(model: Any, patch: pytest.MonkeyPatch) -> None:
    import torch

    def route(router: Any, hidden: "torch.Tensor") -> tuple[Any, Any, Any]:
        halves = (x.bfloat16() for x in (hidden, router.weight, router.bias))
        logits = torch.nn.functional.linear(*halves).to(hidden.dtype)
        values, ids = logits.topk(router.top_k)
        return logits, values.softmax(-1), ids

    route_by(model, patch, route)


def experts_chosen_without_bias(model: Any, patch: pytest.MonkeyPatch) -> None:
    def route(router: Any, hidden: "torch.Tensor") -> tuple[Any, Any, Any]:
        unbiased = hidden @ router.weight.T
        ids = unbiased.topk(router.top_k).indices
        logits = unbiased + router.bias
        return logits, logits.gather(1, ids).softmax(-1), ids

    route_by(model, patch, route)


def softmax_over_all_experts(model: Any, patch: pytest.MonkeyPatch) -> None:
    import torch

    def route(router: Any, hidden: "torch.Tensor") -> tuple[Any, Any, Any]:
        logits = torch.nn.functional.linear(hidden, router.weight, router.bias)
        weights, ids = logits.softmax(-1).topk(router.top_k)
        return logits, weights, ids

    route_by(model, patch, route)


def expert_weights_in_the_wrong_slot(model: Any, patch: pytest.MonkeyPatch) -> None:
    def before(module: Any, inputs: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        hidden, ids, weights = inputs
        return hidden, ids, weights.flip(-1)

    for module in experts(model):
        module.register_forward_pre_hook(before)


def reduced_twice(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in experts(model):
        module.register_forward_hook(lambda module, inputs, output: 2 * output)


def clamp_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in experts(model):
        module.limit = math.inf


def activation_is_plain_silu(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in experts(model):
        module.alpha = 1.0


def activate_by(model: Any, patch: pytest.MonkeyPatch, activate: Callable[[Any, Any, Any], Any]) -> None:
    """Let `activate(experts, gate, up)` answer the activation; gate and up are taken apart as they should be."""
    change = lambda module, gate_up: activate(module, gate_up[..., ::2], gate_up[..., 1::2])  # noqa: E731
    patch.setattr(modeling(model).GptOssExperts, "_apply_gate", change)


def glu(module: Any, gate: "torch.Tensor", up: "torch.Tensor", offset: float = 1.0) -> "torch.Tensor":
    gate = gate.clamp(max=module.limit)
    return gate * (gate * module.alpha).sigmoid() * (up.clamp(-module.limit, module.limit) + offset)


def plus_one_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    activate_by(model, patch, lambda module, gate, up: glu(module, gate, up, offset=0.0))


def gate_and_up_swapped(model: Any, patch: pytest.MonkeyPatch) -> None:
    activate_by(model, patch, lambda module, gate, up: glu(module, up, gate))


def gate_and_up_not_interleaved(model: Any, patch: pytest.MonkeyPatch) -> None:
    split = lambda module, gate_up: glu(module, *gate_up.chunk(2, dim=-1))  # noqa: E731
    patch.setattr(modeling(model).GptOssExperts, "_apply_gate", split)


def gate_and_up_swapped_in_the_weights(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in experts(model):
        module.gate_up_proj.data = module.gate_up_proj.data.unflatten(2, (-1, 2)).flip(3).flatten(2)


def gate_bias_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in experts(model):
        module.gate_up_proj_bias.data.zero_()


def down_bias_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in experts(model):
        module.down_proj_bias.data.zero_()


def down_bias_once_per_rank(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in experts(model):
        module.down_proj_bias.data *= 2


def down_projection_transposed(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in experts(model):
        module.down_proj.data = module.down_proj.data.transpose(1, 2)


def mxfp4_nibbles_swapped(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in experts(model):
        module.gate_up_proj.data = module.gate_up_proj.data.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def mxfp4_nibbles_from_block_halves(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in experts(model):
        blocks = module.gate_up_proj.data.unflatten(1, (-1, 16, 2))
        module.gate_up_proj.data = blocks.transpose(2, 3).flatten(1, 3)


def scale_exponents_one_too_large(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in experts(model):
        module.down_proj.data *= 2


def one_scale_one_too_large(model: Any, patch: pytest.MonkeyPatch) -> None:
    experts(model)[0].gate_up_proj.data[0, :32, 0] *= 2  # one block of 32 weights of expert 0


# --- Llama's feed-forward


def gelu_for_silu(model: Any, patch: pytest.MonkeyPatch) -> None:
    import torch

    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()


def mlp_bias_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = None
