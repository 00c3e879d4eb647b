"""Faults of hand-written kernels that the catalogue does not know, to be made in a transformers model."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.golden.injected_attention import set_positions
from tests.golden.injected_layers import activate_by
from tests.golden.injected_more import each_attention, each_experts, normed, set_data
from tests.golden.injected_outside import ALL, LAYER, after, at, heads
from tests.golden.injection import FLOAT32, Apply, Mistake, modeling

if TYPE_CHECKING:
    import torch

TILE = 16


def attend(softmax: Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]) -> Apply:
    """Attention whose `softmax(scores [1,H,T,S], sinks [1,H,1,1], values [1,H,S,C])` answers the heads.

    Its weights are never whole in such a kernel: nobody asks for what stands in their place here.
    """

    def apply(model: Any, patch: pytest.MonkeyPatch) -> None:
        def forward(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **keywords: Any) -> Any:
            k, v = (modeling(model).repeat_kv(x, module.num_key_value_groups) for x in (k, v))
            scores = (q @ k.transpose(2, 3)) * scaling
            hidden = mask.expand_as(scores) < -1
            sinks = module.sinks.reshape(1, -1, 1, 1)
            return softmax(scores.masked_fill(hidden, -math.inf), sinks, v).transpose(1, 2).contiguous(), scores

        patch.setattr(modeling(model), "eager_attention_forward", forward)

    return apply


def not_rescaled(scores: "torch.Tensor", sinks: "torch.Tensor", v: "torch.Tensor") -> "torch.Tensor":
    """Softmax tile by tile: what was added up is not rescaled when a later tile has a larger maximum."""
    largest, total, added = sinks.expand(*scores.shape[:3], 1), 1.0, 0.0
    for tile, values in zip(scores.split(TILE, -1), v.split(TILE, -2), strict=True):
        new = largest.maximum(tile.amax(-1, keepdim=True))
        weights = (tile - new).exp()
        total = total * (largest - new).exp() + weights.sum(-1, keepdim=True)
        added = added + weights @ values
        largest = new
    return added / total


def base_two(scores: "torch.Tensor", sinks: "torch.Tensor", v: "torch.Tensor") -> "torch.Tensor":
    """exp2 in place of exp, without log2(e) in the scale."""
    weights = 2.0**scores
    return weights / (weights.sum(-1, keepdim=True) + 2.0**sinks) @ v


def exp_by_bits(scores: "torch.Tensor", sinks: "torch.Tensor", v: "torch.Tensor") -> "torch.Tensor":
    """Schraudolph's exponential, 3 % off: the number's bits are a line of the exponent."""

    def exp(x: "torch.Tensor") -> "torch.Tensor":
        import torch

        bits = (x.float().clamp(-80, 80) * (2**23 / math.log(2)) + (127 * 2**23 - 366_393)).to(torch.int32)
        return bits.view(torch.float32).to(x.dtype)

    weights = exp(scores).masked_fill(scores.isneginf(), 0)
    return weights / (weights.sum(-1, keepdim=True) + exp(sinks)) @ v


def keys_in_8_bits(model: Any, patch: pytest.MonkeyPatch) -> None:
    """The cache keeps each head's key with one scale, in 8 bits."""
    eager = modeling(model).eager_attention_forward

    def forward(module: Any, q: Any, k: Any, *rest: Any, **keywords: Any) -> Any:
        scale = k.abs().amax(-1, keepdim=True) / 127
        return eager(module, q, (k / scale).round() * scale, *rest, **keywords)

    patch.setattr(modeling(model), "eager_attention_forward", forward)


def over_capacity_dropped(module: Any) -> None:
    """Each expert takes its share of the tokens, the first that come; the others get nothing of it."""

    def before(module: Any, inputs: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        import torch

        hidden, ids, weights = inputs
        capacity = ids.numel() // module.num_experts
        taken = torch.nn.functional.one_hot(ids.flatten(), module.num_experts).cumsum(0)
        place = taken.gather(1, ids.flatten()[:, None]).reshape(ids.shape)
        return hidden, ids, weights.masked_fill(place > capacity, 0)

    module.register_forward_pre_hook(before)


def bias_by_slot(module: Any) -> None:
    """The down projection's bias is looked up by the place among the chosen experts, not by the expert."""

    def hook(module: Any, inputs: tuple[Any, Any, Any], output: Any) -> Any:
        _, ids, weights = inputs
        bias = module.down_proj_bias
        wrong = bias[: ids.shape[-1]] - bias[ids]
        return output + (weights[..., None] * wrong).sum(1)

    module.register_forward_hook(hook)


def last_expert_lost(module: Any) -> None:
    """The loop over the chosen experts ends one too early."""

    def before(module: Any, inputs: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        hidden, ids, weights = inputs
        weights = weights.clone()
        weights[:, -1] = 0
        return hidden, ids, weights

    module.register_forward_pre_hook(before)


def sigmoid_by_table(module: Any, gate: "torch.Tensor", up: "torch.Tensor") -> "torch.Tensor":
    """The sigmoid from a table of 64 steps between -8 and 8, the nearest entry."""
    gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
    nearest = ((module.alpha * gate).clamp(-8, 8) * 4).round() / 4
    return gate * nearest.sigmoid() * (up + 1)


def tail_of_the_tile_lost(x: "torch.Tensor") -> "torch.Tensor":
    """Positions behind the last whole tile are not computed: [1,T,H,C]."""
    x[:, x.shape[1] // TILE * TILE :] = 0
    return x


def mean_over_padding(norm: Any, x: "torch.Tensor") -> "torch.Tensor":
    """The mean square divides by the width that the buffer is padded to."""
    padded = -(-(x.shape[-1] + 1) // 32) * 32
    return norm.weight * x / (x.pow(2).sum(-1, keepdim=True) / padded + norm.variance_epsilon).sqrt()


# for float32 alone what is within four times the noise of bfloat16
KERNELS: dict[str, Mistake] = {
    "softmax in tiles, not rescaled": Mistake(attend(not_rescaled), "layers.0.attn_heads"),
    "exp2 without log2(e)": Mistake(attend(base_two), "layers.0.attn_heads"),
    "exp by its bits": Mistake(attend(exp_by_bits), "layers.0.attn_heads", modes=FLOAT32),
    "cached keys in 8 bits": Mistake(keys_in_8_bits, "layers.0.attn_heads", modes=FLOAT32),
    "sinks by key head": Mistake(
        each_attention(lambda a: set_data("sinks", lambda s: s[[i // 2 for i in range(len(s))]])(a)),
        "layers.0.attn_heads",
    ),
    "the last tile of positions lost": Mistake(heads(tail_of_the_tile_lost), "layers.0.attn_heads"),
    "one key head on both ranks": Mistake(
        after(LAYER + "self_attn.k_proj", lambda x: x[..., : x.shape[-1] // 2].repeat(1, 1, 2)), "layers.0.k"
    ),
    "positions of a padded batch": Mistake(
        lambda model, patch: set_positions(model, lambda past, T: range(past + 5, past + T + 5)), "layers.0.q_rope"
    ),
    "tokens over an expert's capacity dropped": Mistake(each_experts(over_capacity_dropped), "layers.0.mlp_out"),
    "the down bias by slot": Mistake(each_experts(bias_by_slot), "layers.0.mlp_out"),
    "the last chosen expert lost": Mistake(each_experts(last_expert_lost), "layers.0.mlp_out"),
    "sigmoid by a table": Mistake(
        lambda model, patch: activate_by(model, patch, sigmoid_by_table), "layers.0.expert_act", modes=FLOAT32
    ),
    "mean over padding": Mistake(normed(mean_over_padding), "layers.0.attn_norm"),
    "rows of the head over 256 lost": Mistake(
        after("lm_head", at((ALL, ALL, slice(256, None)), lambda x: 0 * x)), "logits"
    ),
}
