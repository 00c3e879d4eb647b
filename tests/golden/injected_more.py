"""More of the catalogue made in a transformers model (see injection.py), by the catalogue's ids."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.golden.injected_attention import change_attention, permute_pairs, rope_with, set_positions
from tests.golden.injected_layers import activate_by, glu, route_by
from tests.golden.injection import FLOAT32, Apply, Mistake, attentions, experts, modeling, norms

if TYPE_CHECKING:
    import torch

Tables = tuple["torch.Tensor", "torch.Tensor"]


# --- means


def tables(change: Callable[["torch.Tensor", "torch.Tensor"], Tables]) -> Apply:
    """The rotary tables, once formed."""

    def apply(model: Any, patch: pytest.MonkeyPatch) -> None:
        rope = model.model.rotary_emb
        forward = rope.forward
        rope.forward = lambda *arguments, **keywords: change(*forward(*arguments, **keywords))

    return apply


def each_attention(change: Callable[[Any], None]) -> Apply:
    def apply(model: Any, patch: pytest.MonkeyPatch) -> None:
        for attention in attentions(model):
            change(attention)

    return apply


def each_experts(change: Callable[[Any], object]) -> Apply:
    def apply(model: Any, patch: pytest.MonkeyPatch) -> None:
        for module in experts(model):
            change(module)

    return apply


def each_norm(change: Callable[[Any], None]) -> Apply:
    def apply(model: Any, patch: pytest.MonkeyPatch) -> None:
        for norm in norms(model):
            change(norm)

    return apply


def each_mlp(change: Callable[[Any], None]) -> Apply:
    def apply(model: Any, patch: pytest.MonkeyPatch) -> None:
        for layer in model.model.layers:
            change(layer.mlp)

    return apply


def masked(change: Callable[[int, "torch.Tensor"], "torch.Tensor"]) -> Apply:
    """The additive mask [1,1,T,S] that attention gets, for so many keys in the past."""
    return lambda model, patch: change_attention(model, patch, lambda past, v, mask: (v, change(past, mask)))


def weighed(change: Callable[["torch.Tensor"], "torch.Tensor"]) -> Apply:
    """The experts' weights, as the sum over experts gets them."""

    def before(module: Any, inputs: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        return inputs[0], inputs[1], change(inputs[2])

    return each_experts(lambda module: module.register_forward_pre_hook(before))


def activated(change: Callable[[Any, Any, Any], Any]) -> Apply:
    return lambda model, patch: activate_by(model, patch, change)


def routed(choose: Callable[["torch.Tensor", int], tuple[Any, Any]]) -> Apply:
    """Weights and ids by the router's logits and the number of experts."""

    def route(router: Any, hidden: "torch.Tensor") -> tuple[Any, Any, Any]:
        import torch

        logits = torch.nn.functional.linear(hidden, router.weight, router.bias)
        return logits, *choose(logits, router.top_k)

    return lambda model, patch: route_by(model, patch, route)


def dense(change: Callable[[Any, Any, Any], Any]) -> Apply:
    """Llama's activation by its module, gate and up."""

    def apply(mlp: Any) -> None:
        mlp.forward = lambda x: mlp.down_proj(change(mlp, mlp.gate_proj(x), mlp.up_proj(x)))

    return each_mlp(apply)


# --- what is more than a line


def keys_not_turned(model: Any, patch: pytest.MonkeyPatch) -> None:
    turn = modeling(model).apply_rotary_pos_emb
    patch.setattr(modeling(model), "apply_rotary_pos_emb", lambda q, k, *rest: (turn(q, k, *rest)[0], k))


def heads_moved_on(model: Any, patch: pytest.MonkeyPatch) -> None:
    eager = modeling(model).eager_attention_forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        heads, weights = eager(*arguments, **keywords)
        return heads.roll(1, dims=2), weights

    patch.setattr(modeling(model), "eager_attention_forward", forward)


def k_v_swapped(attention: Any) -> None:
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


def permuted_back(projection: Any, C: int) -> None:
    """Rows of every head from neighbours to halves."""
    rows = projection.weight.data.unflatten(0, (-1, C // 2, 2))
    projection.weight.data = rows.transpose(1, 2).flatten(0, 2)


def causal_missing(past: int, mask: "torch.Tensor") -> "torch.Tensor":
    import torch

    return mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(past + 1), 0.0)


def first_key_masked(past: int, mask: "torch.Tensor") -> "torch.Tensor":
    mask[..., 1:, 0] = -math.inf
    return mask


def gates_transposed(module: Any) -> None:
    module.gate_up_proj.data[..., ::2] = module.gate_up_proj.data[..., ::2].transpose(1, 2).clone()


def ups_transposed(module: Any) -> None:
    module.gate_up_proj.data[..., 1::2] = module.gate_up_proj.data[..., 1::2].transpose(1, 2).clone()


def half_of_bias(start: int) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        module.gate_up_proj_bias.data[:, start::2] = 0

    return change


def both(change: Callable[["torch.Tensor"], "torch.Tensor"]) -> Apply:
    """Both matrices of the experts, [N,in,out]."""

    def apply(module: Any) -> None:
        module.gate_up_proj.data, module.down_proj.data = (
            change(module.gate_up_proj.data),
            change(module.down_proj.data),
        )

    return each_experts(apply)


def in_groups(order: Callable[[np.ndarray], np.ndarray]) -> Apply:
    """Inputs of the experts' matrices in another order within each 32."""
    places = order(np.arange(32)).tolist()
    return both(lambda w: w.unflatten(1, (-1, 32))[:, :, places].flatten(1, 2))


def swap_gate_and_up(module: Any) -> None:
    module.gate_up_proj.data = module.gate_up_proj.data.unflatten(2, (-1, 2)).flip(3).flatten(2)
    module.gate_up_proj_bias.data = module.gate_up_proj_bias.data.unflatten(1, (-1, 2)).flip(2).flatten(1)


def norms_exchanged(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = layer.post_attention_layernorm, layer.input_layernorm


def normed(change: Callable[[Any, "torch.Tensor"], "torch.Tensor"]) -> Apply:
    def apply(norm: Any) -> None:
        norm.forward = lambda x: change(norm, x.float()).to(x.dtype)

    return each_norm(apply)


def root(x: "torch.Tensor", eps: float) -> "torch.Tensor":
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def set_data(name: str, change: Callable[["torch.Tensor"], "torch.Tensor"]) -> Callable[[Any], None]:
    def apply(module: Any) -> None:
        for part in name.split(".")[:-1]:
            module = getattr(module, part)
        parameter = getattr(module, name.split(".")[-1])
        parameter.data = change(parameter.data)

    return apply


def zero(x: "torch.Tensor") -> "torch.Tensor":
    return x * 0


CLEAR = lambda g, module: g * (g * module.alpha).sigmoid()  # noqa: E731
GPT_OSS: dict[str, Mistake] = {
    "rope-backwards": Mistake(tables(lambda cos, sin: (cos, -sin)), "layers.0.q_rope", 2),
    "rope-missing": Mistake(tables(lambda cos, sin: (cos * 0 + 1, sin * 0)), "layers.0.q_rope"),
    "rope-missing-on-keys": Mistake(keys_not_turned, "layers.0.k_rope"),
    "rope-tables-bfloat16": Mistake(
        tables(lambda cos, sin: (cos.bfloat16().to(cos), sin.bfloat16().to(sin))), "layers.0.q_rope", 1, FLOAT32
    ),
    "positions-from-one": Mistake(
        lambda model, patch: set_positions(model, lambda past, T: range(past + 1, past + T + 1)), "layers.0.q_rope"
    ),
    "causal-mask-missing": Mistake(masked(causal_missing), "layers.0.attn_heads", 2),
    "first-key-masked": Mistake(masked(first_key_masked), "layers.0.attn_heads", 2),
    "scale-missing": Mistake(each_attention(lambda a: setattr(a, "scaling", 1.0)), "layers.0.attn_heads"),
    "scale-twice": Mistake(each_attention(lambda a: setattr(a, "scaling", 1 / a.head_dim)), "layers.0.attn_heads"),
    "values-of-the-next-head": Mistake(heads_moved_on, "layers.0.attn_heads"),
    "sinks-scaled": Mistake(
        each_attention(lambda a: setattr(a.sinks, "data", a.sinks.data * a.scaling)), "layers.0.attn_heads"
    ),
    "k-v-swapped": Mistake(each_attention(k_v_swapped), "layers.0.k"),
    "k-bias-missing": Mistake(each_attention(set_data("k_proj.bias", zero)), "layers.0.k"),
    "v-bias-missing": Mistake(each_attention(set_data("v_proj.bias", zero)), "layers.0.v"),
    "o-bias-missing": Mistake(each_attention(set_data("o_proj.bias", zero)), "layers.0.attn_out"),
    "o-bias-twice": Mistake(each_attention(set_data("o_proj.bias", lambda b: 2 * b)), "layers.0.attn_out"),
    "smallest-experts-chosen": Mistake(
        routed(lambda x, k: (x.topk(k, largest=False).values.softmax(-1), x.topk(k, largest=False).indices)),
        "layers.0.expert_ids",
    ),
    "sigmoid-router": Mistake(
        routed(lambda x, k: ((s := x.topk(k).values.sigmoid()) / s.sum(-1, keepdim=True), x.topk(k).indices)),
        "layers.0.expert_weights",
    ),
    "expert-weights-equal": Mistake(weighed(lambda w: w * 0 + 1 / w.shape[-1]), "layers.0.mlp_out"),
    "expert-weights-not-applied": Mistake(weighed(lambda w: w * 0 + 1), "layers.0.mlp_out"),
    "reduced-four-times": Mistake(
        each_experts(lambda m: m.register_forward_hook(lambda module, inputs, output: 4 * output)), "layers.0.mlp_out"
    ),
    "clamp-of-gate-missing": Mistake(
        activated(lambda m, g, u: CLEAR(g, m) * (u.clamp(-m.limit, m.limit) + 1)), "layers.0.expert_act"
    ),
    "gate-clamped-both-ways": Mistake(
        activated(lambda m, g, u: glu(m, g.clamp(min=-m.limit), u)), "layers.0.expert_act", 1, FLOAT32
    ),
    "clamp-after-one": Mistake(
        activated(lambda m, g, u: CLEAR(g.clamp(max=m.limit), m) * (u + 1).clamp(-m.limit, m.limit)),
        "layers.0.expert_act",
    ),
    "up-bias-missing": Mistake(each_experts(half_of_bias(1)), "layers.0.expert_up"),
    "gate-bias-missing": Mistake(each_experts(half_of_bias(0)), "layers.0.expert_gate"),
    "gate-up-weights-swapped": Mistake(each_experts(swap_gate_and_up), "layers.0.expert_gate"),
    "expert-gate-transposed": Mistake(each_experts(gates_transposed), "layers.0.expert_gate"),
    "expert-up-transposed": Mistake(each_experts(ups_transposed), "layers.0.expert_up"),
    "mxfp4-read-as-neighbours": Mistake(in_groups(lambda i: i // 2 + i % 2 * 16), "layers.0.expert_gate"),
    "mxfp4-halves-swapped": Mistake(in_groups(lambda i: i ^ 16), "layers.0.expert_gate"),
    "mxfp4-exponent-high": Mistake(both(lambda w: 2 * w), "layers.0.expert_gate"),
    "mxfp4-exponent-low": Mistake(both(lambda w: w / 2), "layers.0.expert_gate"),
    "mxfp4-exponent-two-low": Mistake(both(lambda w: w / 4), "layers.0.expert_gate"),
    "mxfp4-sign-ignored": Mistake(both(lambda w: w.abs()), "layers.0.expert_gate"),
    "mxfp4-down-exponent-low": Mistake(each_experts(set_data("down_proj", lambda w: w / 2)), "layers.0.mlp_out"),
    "norm-epsilon-larger": Mistake(
        each_norm(lambda n: setattr(n, "variance_epsilon", 10 * n.variance_epsilon)), "layers.0.attn_norm"
    ),
    "norm-epsilon-missing": Mistake(each_norm(lambda n: setattr(n, "variance_epsilon", 0.0)), "layers.0.attn_norm"),
    "norm-epsilon-outside": Mistake(
        normed(lambda n, x: n.weight * x / (root(x, 0) + n.variance_epsilon)), "layers.0.attn_norm"
    ),
    "norm-weight-missing": Mistake(each_norm(set_data("weight", lambda w: w * 0 + 1)), "layers.0.attn_norm"),
    "norm-subtracts-mean": Mistake(
        normed(lambda n, x: n.weight * (y := x - x.mean(-1, keepdim=True)) / root(y, n.variance_epsilon)),
        "layers.0.attn_norm",
    ),
    "norms-exchanged": Mistake(norms_exchanged, "layers.0.attn_norm"),
}
GPT_OSS_CHUNKED: dict[str, Mistake] = {
    "positions-one-early": Mistake(
        lambda model, patch: set_positions(model, lambda past, T: range(past - (past > 0), past - (past > 0) + T)),
        "layers.0.q_rope",
        31,
    ),
}
LLAMA: dict[str, Mistake] = {
    "llama3-linear": Mistake(lambda model, patch: rope_with(model, rope_type="linear"), "layers.0.q_rope", 2),
    "q-transposed": Mistake(each_attention(set_data("q_proj.weight", lambda w: w.T)), "layers.0.q"),
    "qk-rows-to-halves": Mistake(
        each_attention(lambda a: [permuted_back(p, a.head_dim) for p in (a.q_proj, a.k_proj)] and None), "layers.0.q"
    ),
    "q-rows-to-neighbours": Mistake(each_attention(lambda a: permute_pairs(a.q_proj, a.head_dim)), "layers.0.q"),
    "q-rows-to-halves": Mistake(each_attention(lambda a: permuted_back(a.q_proj, a.head_dim)), "layers.0.q"),
    "k-rows-to-halves": Mistake(each_attention(lambda a: permuted_back(a.k_proj, a.head_dim)), "layers.0.k"),
    "plus-one-on-dense": Mistake(dense(lambda m, g, u: m.act_fn(g) * (u + 1)), "layers.0.act"),
    "gate-up-swapped": Mistake(dense(lambda m, g, u: m.act_fn(u) * g), "layers.0.act"),
    "gelu-tanh": Mistake(
        dense(lambda m, g, u: 0.5 * g * (1 + (math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)).tanh()) * u),
        "layers.0.act",
    ),
    "relu": Mistake(dense(lambda m, g, u: g.relu() * u), "layers.0.act"),
    "mlp-gate-bias-missing": Mistake(each_mlp(set_data("gate_proj.bias", zero)), "layers.0.gate"),
    "mlp-up-bias-missing": Mistake(each_mlp(set_data("up_proj.bias", zero)), "layers.0.up"),
}
TABLE = {"gpt-oss": GPT_OSS, "gpt-oss chunked": GPT_OSS_CHUNKED, "llama": LLAMA}
