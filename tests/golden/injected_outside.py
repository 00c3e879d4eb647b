"""Faults that the catalogue does not know, to be made in a transformers model (see injection.py)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.golden.injected_attention import change_attention, rope_with, set_positions
from tests.golden.injected_layers import activate_by, glu
from tests.golden.injected_more import each_attention, each_experts, each_norm, routed, tables
from tests.golden.injection import Apply, Mistake, modeling

if TYPE_CHECKING:
    import torch

Change = Callable[["torch.Tensor"], "torch.Tensor"]


def after(path: str, change: Change) -> Apply:
    """What a module of the first layer, or of the model, answers."""

    def apply(model: Any, patch: pytest.MonkeyPatch) -> None:
        module = model
        for part in path.split("."):
            module = module[int(part)] if part.isdigit() else getattr(module, part)

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            return (change(output[0].clone()), *output[1:]) if isinstance(output, tuple) else change(output.clone())

        module.register_forward_hook(hook)

    return apply


def at(index: Any, change: Change) -> Change:
    """Some elements changed."""

    def changed(x: "torch.Tensor") -> "torch.Tensor":
        x[index] = change(x[index])
        return x

    return changed


def heads(change: Change) -> Apply:
    """What attention answers, [1,T,H,C]."""

    def apply(model: Any, patch: pytest.MonkeyPatch) -> None:
        eager = modeling(model).eager_attention_forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            output, weights = eager(*arguments, **keywords)
            return change(output.clone()), weights

        patch.setattr(modeling(model), "eager_attention_forward", forward)

    return apply


def noise(size: float) -> Change:
    def change(x: "torch.Tensor") -> "torch.Tensor":
        import torch

        generator = torch.Generator().manual_seed(5)
        return x + size * x.float().std().to(x.dtype) * torch.randn(x.shape, generator=generator).to(x.dtype)

    return change


def partial_rotary(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Only the first half of the pairs turns."""

    def change(cos: Any, sin: Any) -> Any:
        half = cos.shape[-1] // 2
        cos, sin = cos.clone(), sin.clone()
        cos[..., half:], sin[..., half:] = 1, 0
        return cos, sin

    tables(change)(model, patch)


def window_of_half(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.config.sliding_window //= 2


def every_fifth_key_masked(model: Any, patch: pytest.MonkeyPatch) -> None:
    def change(past: int, v: Any, mask: Any) -> tuple[Any, Any]:
        mask[..., 4::5] = mask.min()
        mask.diagonal(past, dim1=-2, dim2=-1).fill_(0)
        return v, mask

    change_attention(model, patch, change)


LAYER = "model.layers.0."
ALL = slice(None)
OUTSIDE: dict[str, Mistake] = {
    "embedding a tenth too large": Mistake(after("model.embed_tokens", lambda x: 1.1 * x), "embed"),
    "a constant added by the norm": Mistake(after(LAYER + "input_layernorm", lambda x: x + 0.05), "layers.0.attn_norm"),
    "norm's gain squared": Mistake(
        each_norm(lambda n: setattr(n.weight, "data", n.weight.data**2)), "layers.0.attn_norm"
    ),
    "epsilon a thousand times too large": Mistake(
        each_norm(lambda n: setattr(n, "variance_epsilon", 1000 * n.variance_epsilon)), "layers.0.attn_norm"
    ),
    "a head of q scaled": Mistake(
        after(LAYER + "self_attn.q_proj", at((ALL, ALL, slice(32, 64)), lambda x: 1.3 * x)), "layers.0.q"
    ),
    "the last row of k lost": Mistake(after(LAYER + "self_attn.k_proj", at((ALL, -1), lambda x: 0 * x)), "layers.0.k"),
    "heads of k exchanged": Mistake(
        after(LAYER + "self_attn.k_proj", lambda x: x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)), "layers.0.k"
    ),
    "a channel of v zeroed": Mistake(
        after(LAYER + "self_attn.v_proj", at((ALL, ALL, 7), lambda x: 0 * x)), "layers.0.v"
    ),
    "rows of v one late": Mistake(after(LAYER + "self_attn.v_proj", lambda x: x.roll(1, 1)), "layers.0.v"),
    "RoPE base 50000": Mistake(lambda model, patch: rope_with(model, rope_theta=50000.0) and None, "layers.0.q_rope"),
    "positions doubled": Mistake(
        lambda model, patch: set_positions(model, lambda past, T: range(2 * past, 2 * (past + T), 2)), "layers.0.q_rope"
    ),
    "half of the pairs not turned": Mistake(partial_rotary, "layers.0.q_rope"),
    "scores a tenth too large": Mistake(
        each_attention(lambda a: setattr(a, "scaling", 1.1 * a.scaling)), "layers.0.attn_heads"
    ),
    "window of half the size": Mistake(window_of_half, "layers.0.attn_heads"),
    "every fifth key masked": Mistake(every_fifth_key_masked, "layers.0.attn_heads"),
    "sinks of the other sign": Mistake(
        each_attention(lambda a: setattr(a.sinks, "data", -a.sinks.data)), "layers.0.attn_heads"
    ),
    "two heads exchanged": Mistake(heads(lambda x: x[:, :, [1, 0, 2, 3]]), "layers.0.attn_heads"),
    "a head negated": Mistake(heads(at((ALL, ALL, 2), lambda x: -x)), "layers.0.attn_heads"),
    "noise on the heads": Mistake(heads(noise(0.2)), "layers.0.attn_heads"),
    "rows of attn_out permuted": Mistake(after(LAYER + "self_attn.o_proj", lambda x: x.flip(1)), "layers.0.attn_out"),
    "the second best experts": Mistake(
        routed(lambda x, k: ((t := x.topk(k + 1)).values[:, 1:].softmax(-1), t.indices[:, 1:])), "layers.0.expert_ids"
    ),
    "expert weights of a temperature": Mistake(
        routed(lambda x, k: ((x.topk(k).values / 1.5).softmax(-1), x.topk(k).indices)), "layers.0.expert_weights"
    ),
    "a slope of 1.5": Mistake(each_experts(lambda m: setattr(m, "alpha", 1.5)), "layers.0.expert_act"),
    "a limit of 5": Mistake(each_experts(lambda m: setattr(m, "limit", 5.0)), "layers.0.expert_act"),
    "2 on the linear branch": Mistake(
        lambda model, patch: activate_by(model, patch, lambda m, g, u: glu(m, g, u, offset=2.0)), "layers.0.expert_act"
    ),
    "the down bias three times": Mistake(
        each_experts(lambda m: setattr(m.down_proj_bias, "data", 3 * m.down_proj_bias.data)), "layers.0.mlp_out"
    ),
    "mlp_out three times as large": Mistake(
        each_experts(lambda m: m.register_forward_hook(lambda module, inputs, output: 3 * output)), "layers.0.mlp_out"
    ),
    "the stream 3 % too large": Mistake(after("model.layers.0", lambda x: 1.03 * x), "layers.0.block_out"),
    "half of the final norm lost": Mistake(
        after("model.norm", at((ALL, ALL, slice(32, None)), lambda x: 0 * x)), "final_norm"
    ),
    "logits capped": Mistake(after("lm_head", lambda x: 3 * (x / 3).tanh()), "logits"),
    "noise on the logits": Mistake(after("lm_head", noise(0.1)), "logits"),
}
