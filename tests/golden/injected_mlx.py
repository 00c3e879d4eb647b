"""Mistakes made in a loaded model of mlx-lm, by the catalogue's ids: in its attributes and parameters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class MlxMistake(NamedTuple):
    """What is done to the model, and the tap where it first acts."""

    apply: Callable[[Any], None]
    tap: str


def each_attention(change: Callable[[Any], object]) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        for layer in model.model.layers:
            change(layer.self_attn)

    return apply


def each_mlp(change: Callable[[Any], object]) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        for layer in model.model.layers:
            change(layer.mlp)

    return apply


def each_norm(change: Callable[[Any], object]) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        for layer in model.model.layers:
            change(layer.input_layernorm)
            change(layer.post_attention_layernorm)
        change(model.model.norm)

    return apply


def swapped(a: str, b: str) -> Callable[[Any], None]:
    """Two attributes of a module exchanged."""

    def change(module: Any) -> None:
        first, second = getattr(module, a), getattr(module, b)
        setattr(module, a, second)
        setattr(module, b, first)

    return change


def windows(change: Callable[[int], int]) -> Callable[[Any], None]:
    return lambda model: setattr(model.model, "window_size", change(model.model.window_size))


def without_final_norm(model: Any) -> None:
    model.model.norm = lambda x: x


def scaled(module: Any, name: str, factor: float) -> None:
    setattr(module, name, getattr(module, name) * factor)


GPT_OSS: dict[str, MlxMistake] = {
    "rope-neighbours": MlxMistake(each_attention(lambda a: setattr(a.rope, "traditional", True)), "layers.0.q_rope"),
    "yarn-factor-missing": MlxMistake(each_attention(lambda a: setattr(a.rope, "mscale", 1.0)), "layers.0.q_rope"),
    "yarn-factor-twice": MlxMistake(
        each_attention(lambda a: setattr(a.rope, "mscale", a.rope.mscale**2)), "layers.0.q_rope"
    ),
    "sinks-missing": MlxMistake(
        each_attention(lambda a: setattr(a, "sinks", a.sinks * 0 - 1e30)), "layers.0.attn_heads"
    ),
    "sinks-twice": MlxMistake(
        each_attention(lambda a: setattr(a, "sinks", a.sinks + math.log(2))), "layers.0.attn_heads"
    ),
    "scale-missing": MlxMistake(each_attention(lambda a: setattr(a, "sm_scale", 1.0)), "layers.0.attn_heads"),
    "scale-twice": MlxMistake(each_attention(lambda a: setattr(a, "sm_scale", a.sm_scale**2)), "layers.0.attn_heads"),
    "window-one-more": MlxMistake(windows(lambda window: window + 1), "layers.0.attn_heads"),
    "window-missing": MlxMistake(windows(lambda window: 10**6), "layers.0.attn_heads"),
    "q-bias-missing": MlxMistake(each_attention(lambda a: scaled(a.q_proj, "bias", 0)), "layers.0.q"),
    "v-bias-missing": MlxMistake(each_attention(lambda a: scaled(a.v_proj, "bias", 0)), "layers.0.v"),
    "o-bias-twice": MlxMistake(each_attention(lambda a: scaled(a.o_proj, "bias", 2)), "layers.0.attn_out"),
    "k-v-swapped": MlxMistake(each_attention(swapped("k_proj", "v_proj")), "layers.0.k"),
    "router-bias-missing": MlxMistake(each_mlp(lambda m: scaled(m.router, "bias", 0)), "layers.0.router_logits"),
    "up-bias-missing": MlxMistake(each_mlp(lambda m: scaled(m.experts.up_proj, "bias", 0)), "layers.0.expert_up"),
    "down-bias-missing": MlxMistake(each_mlp(lambda m: scaled(m.experts.down_proj, "bias", 0)), "layers.0.expert_out"),
    "down-bias-per-rank": MlxMistake(each_mlp(lambda m: scaled(m.experts.down_proj, "bias", 2)), "layers.0.expert_out"),
    "gate-up-weights-swapped": MlxMistake(
        each_mlp(lambda m: swapped("gate_proj", "up_proj")(m.experts)), "layers.0.expert_gate"
    ),
    "norm-epsilon-larger": MlxMistake(each_norm(lambda n: scaled(n, "eps", 10)), "layers.0.attn_norm"),
    "norm-plus-one": MlxMistake(each_norm(lambda n: setattr(n, "weight", n.weight + 1)), "layers.0.attn_norm"),
    "final-norm-missing": MlxMistake(without_final_norm, "final_norm"),
    "head-tied": MlxMistake(lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight), "logits"),
}
