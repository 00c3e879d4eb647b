"""Mistakes of position, mask, cache and attention, to be made in a transformers model (see injection.py)."""

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.golden.injection import attentions, modeling

if TYPE_CHECKING:
    import torch


# --- RoPE


def rope_with(model: Any, **changes: Any) -> Any:
    """transformers' rotary embedding for other RoPE parameters, put in place of the model's."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, **changes}
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.model.rotary_emb


def yarn_ramp_rounded(model: Any, patch: pytest.MonkeyPatch) -> None:
    rope_with(model, truncate=True)


def yarn_attention_factor_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.model.rotary_emb.attention_scaling = 1.0


def yarn_attention_factor_squared(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.model.rotary_emb.attention_scaling **= 2


def rope_scaling_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    rope_with(model, rope_type="default")


def yarn_scales_positions(model: Any, patch: pytest.MonkeyPatch) -> None:
    factor = model.model.rotary_emb.attention_scaling
    rope_with(model, rope_type="linear").attention_scaling = factor


def yarn_from_the_new_context(model: Any, patch: pytest.MonkeyPatch) -> None:
    rope_with(model, original_max_position_embeddings=model.config.max_position_embeddings)


def rope_base_10000(model: Any, patch: pytest.MonkeyPatch) -> None:
    rope_with(model, rope_theta=10000.0)


def rope_angles_in_bfloat16(model: Any, patch: pytest.MonkeyPatch) -> None:
    rope = model.model.rotary_emb

    def forward(x: "torch.Tensor", position_ids: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        angle = (position_ids[..., None].float() * rope.inv_freq).bfloat16().float()
        if "GptOss" not in type(rope).__name__:
            angle = angle.repeat(1, 1, 2)  # tables of whole heads
        return (angle.cos() * rope.attention_scaling).to(x.dtype), (angle.sin() * rope.attention_scaling).to(x.dtype)

    rope.forward = forward


def rope_turns_neighbours(model: Any, patch: pytest.MonkeyPatch) -> None:
    import torch

    def turn(x: "torch.Tensor", cos: "torch.Tensor", sin: "torch.Tensor") -> "torch.Tensor":
        cos, sin = cos[..., : x.shape[-1] // 2], sin[..., : x.shape[-1] // 2]  # Llama's tables hold both halves
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    def apply(q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        return turn(q, cos[:, None], sin[:, None]), turn(k, cos[:, None], sin[:, None])

    patch.setattr(modeling(model), "apply_rotary_pos_emb", apply)


def positions_restart_in_each_chunk(model: Any, patch: pytest.MonkeyPatch) -> None:
    set_positions(model, lambda past, T: range(T))


def positions_one_late_after_the_first_chunk(model: Any, patch: pytest.MonkeyPatch) -> None:
    set_positions(model, lambda past, T: range(past + (past > 0), past + (past > 0) + T))


def set_positions(model: Any, positions: Callable[[int, int], range]) -> None:
    """Position ids of each call from how many tokens came before it and how many it brings."""
    import torch

    def before(module: Any, inputs: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        past = kwargs["past_key_values"]
        seen = 0 if past is None else past.get_seq_length()
        return inputs, kwargs | {"position_ids": torch.tensor([list(positions(seen, kwargs["input_ids"].shape[1]))])}

    model.model.register_forward_pre_hook(before, with_kwargs=True)


# --- attention


def window_one_more(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.config.sliding_window += 1


def window_one_less(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.config.sliding_window -= 1


def window_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.config.layer_types = ["full_attention"] * len(model.config.layer_types)


def window_on_all_layers(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.config.layer_types = ["sliding_attention"] * len(model.config.layer_types)


def window_on_the_other_layers(model: Any, patch: pytest.MonkeyPatch) -> None:
    kinds = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}
    model.config.layer_types = [kinds[kind] for kind in model.config.layer_types]


def mistral_window_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.config.sliding_window = None


def sinks_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    for attention in attentions(model):
        attention.sinks.data.fill_(-math.inf)


def sinks_counted_twice(model: Any, patch: pytest.MonkeyPatch) -> None:
    for attention in attentions(model):
        attention.sinks.data += math.log(2)


def sinks_of_the_next_head(model: Any, patch: pytest.MonkeyPatch) -> None:
    for attention in attentions(model):
        attention.sinks.data = attention.sinks.data.roll(1)


def scores_scaled_by_hidden_size(model: Any, patch: pytest.MonkeyPatch) -> None:
    for attention in attentions(model):
        attention.scaling = model.config.hidden_size**-0.5


def query_heads_share_keys_by_turns(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling(model), "repeat_kv", lambda hidden, n_rep: hidden.repeat(1, n_rep, 1, 1))


def change_attention(model: Any, patch: pytest.MonkeyPatch, change: Callable[..., tuple[Any, Any]]) -> None:
    """Let `change(past, v, mask)` answer the values and mask that transformers' eager attention gets."""
    eager = modeling(model).eager_attention_forward

    def forward(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        return eager(module, q, k, *change(k.shape[2] - q.shape[2], v.clone(), mask.clone()), **kwargs)

    patch.setattr(modeling(model), "eager_attention_forward", forward)


def cached_keys_skipped(model: Any, patch: pytest.MonkeyPatch) -> None:
    def change(past: int, v: "torch.Tensor", mask: "torch.Tensor") -> tuple[Any, Any]:
        mask[..., :past] = -math.inf
        return v, mask

    change_attention(model, patch, change)


def cached_values_rolled(model: Any, patch: pytest.MonkeyPatch) -> None:
    def change(past: int, v: "torch.Tensor", mask: "torch.Tensor") -> tuple[Any, Any]:
        v[:, :, :past] = v[:, :, :past].roll(1, dims=2)
        return v, mask

    change_attention(model, patch, change)


def own_key_masked(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Without sinks the first position then sees nothing, and its softmax is 0 / 0."""

    def change(past: int, v: "torch.Tensor", mask: "torch.Tensor") -> tuple[Any, Any]:
        mask.diagonal(past, dim1=-2, dim2=-1).fill_(-math.inf)
        return v, mask.masked_fill(mask < -1, -math.inf)

    change_attention(model, patch, change)


def query_bias_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    for attention in attentions(model):
        attention.q_proj.bias = None


def queries_and_keys_permuted(model: Any, patch: pytest.MonkeyPatch) -> None:
    for attention in attentions(model):
        permute_pairs(attention.q_proj, attention.head_dim)
        permute_pairs(attention.k_proj, attention.head_dim)


def keys_permuted(model: Any, patch: pytest.MonkeyPatch) -> None:
    for attention in attentions(model):
        permute_pairs(attention.k_proj, attention.head_dim)


def permute_pairs(projection: Any, head_dim: int) -> None:
    """Rows of every head from halves to neighbours, as conversion to Meta's layout has them."""
    rows = projection.weight.data.unflatten(0, (-1, 2, head_dim // 2))
    projection.weight.data = rows.transpose(1, 2).flatten(0, 2)


def output_projection_transposed(model: Any, patch: pytest.MonkeyPatch) -> None:
    for attention in attentions(model):
        attention.o_proj.weight.data = attention.o_proj.weight.data.T
