"""Mistakes made in a real backend, the Numba path, by its own means: its config, its weights, its functions.

Nothing of the catalogue's variants is used: what is found in a backend broken here is found in other code.
An injection has the id of the mistake that it makes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np

from assay.fast.cpu import engine
from assay.golden.backends.cpu import CpuBackend
from assay.golden.rounding import to_bfloat16
from assay.loaders.checkpoint import Checkpoint
from assay.reference.formats import F32
from assay.reference.weights import Tensor

Array = np.ndarray
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Weight = Callable[[Array, Checkpoint], Array]


@dataclass(frozen=True)
class Injection:
    """Config fields, weights by the ends of their names (under `renamed` ones), functions of the engine, taps."""

    config: Callable[[Any], dict[str, Any]] = lambda config: {}
    weights: Mapping[str, Weight] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    functions: Mapping[str, Wrap] = field(default_factory=dict)
    taps: Mapping[str, Callable[[Array], Array]] = field(default_factory=dict)

    @contextlib.contextmanager
    def backend(self, checkpoint: Checkpoint, rounded: bool = False) -> Iterator[CpuBackend]:
        """The Numba path with the mistake in it; `rounded`: every tap is kept in bfloat16."""
        broken = replace(
            checkpoint,
            config=replace(checkpoint.config, **self.config(checkpoint.config)),
            tensors={name: self._tensor(name, checkpoint) for name in checkpoint.tensors},
        )
        wraps = {**self.functions, "_showing": self._showing(rounded)}
        with contextlib.ExitStack() as stack:
            for name, wrap in wraps.items():
                stack.enter_context(patch.object(engine, name, wrap(getattr(engine, name))))
            yield CpuBackend(broken, "exact")

    def _tensor(self, name: str, checkpoint: Checkpoint) -> Tensor:
        source = next((name.replace(old, new) for old, new in self.renamed.items() if old in name), name)
        tensor = checkpoint.tensors[source]
        change = next((change for end, change in self.weights.items() if name.endswith(end)), None)
        if change is None:
            return replace(tensor, name=name)
        whole = tensor.decode()
        values = np.ascontiguousarray(change(whole, checkpoint), dtype="<f4")
        return Tensor(name, values.shape, F32, {"values": values})

    def _showing(self, rounded: bool) -> Wrap:
        """The engine's tap with changed values: what it is shown is also what it goes on with."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def showing(*arguments: Any) -> Any:
                show = original(*arguments)

                def changed(name: str, array: Array) -> Array:
                    array = self.taps.get(name, lambda same: same)(array)
                    if rounded and np.issubdtype(array.dtype, np.floating):
                        array = to_bfloat16(array)
                    return show(name, np.ascontiguousarray(array))

                return changed

            return showing

        return wrap


# --- means


def scaled(**fields: Any) -> Injection:
    """Fields of the RoPE scaling; a function is asked with the config."""
    value = lambda v, config: v(config) if callable(v) else v  # noqa: E731
    return Injection(lambda c: {"rope_scaling": replace(c.rope_scaling, **{k: value(v, c) for k, v in fields.items()})})


def weights(change: Callable[[Array], Array], *ends: str) -> Injection:
    return Injection(weights={end: lambda w, checkpoint: change(w) for end in ends})


def calls(name: str, change: Callable[..., Any]) -> Injection:
    """A function of the engine; `change` is called with the original and its arguments."""
    return Injection(functions={name: lambda original: lambda *arguments: change(original, *arguments)})


def turned(change: Callable[[Array, Array], tuple[Array, Array]]) -> Injection:
    """The rotary tables, once formed."""
    return calls("rotary_tables", lambda f, config, start, T: change(*f(config, start, T)))


def placed(start_of: Callable[[int], int]) -> Injection:
    """The rotary tables for another first position."""
    return calls("rotary_tables", lambda f, config, start, T: f(config, start_of(start), T))


def attending(change: Callable[[Array, Array, int], tuple[Array, Array]], by_turns: bool = False) -> Injection:
    """Attention in NumPy with another mask and other values: `change(mask_TS, v_SHC, past)` answers both."""

    def attend(original: Any, q_THC: Array, k_TKC: Array, v_TKC: Array, layer: Any, sink_H: Array) -> Array:
        T, H, C = q_THC.shape
        first = max(0, layer.length - len(layer.k))
        slots = np.arange(first, layer.length) % len(layer.k)
        k, v = np.concatenate((layer.k[slots], k_TKC)), np.concatenate((layer.v[slots], v_TKC))
        repeat = np.tile(np.arange(k.shape[1]), H // k.shape[1]) if by_turns else np.arange(H) // (H // k.shape[1])
        distance_TS = (layer.length + np.arange(T))[:, None] - np.arange(first, layer.length + T)
        mask_TS, v = change((distance_TS >= 0) & (distance_TS < layer.window), v[:, repeat], layer.length - first)
        scores = np.einsum("thc,shc->hts", q_THC, k[:, repeat], dtype=np.float64) / math.sqrt(C)
        e = np.where(mask_TS, np.exp(scores), 0)
        total = e.sum(-1, keepdims=True) + np.exp(sink_H.astype(np.float64))[:, None, None]
        with np.errstate(invalid="ignore"):
            return np.einsum("hts,shc->thc", e / total, v).astype(np.float32)

    return calls("attend", attend)


def masked(change: Callable[[Array, int], Array]) -> Injection:
    """Attention with a changed mask, [T,S], for so many keys in the past."""
    return attending(lambda mask, v, past: (change(mask, past), v))


def queries(factor: Callable[[int], float]) -> Injection:
    """Queries multiplied within attention, so that all scores are; by the head size."""
    return calls("attend", lambda f, q, *rest: f(q * np.float32(factor(q.shape[2])), *rest))


def activating(change: Callable[[Array, Array, float, float], Array]) -> Injection:
    """The clamped SwiGLU by gate, up, alpha and limit."""
    return calls("clamped_swiglu", lambda f, gate, up, alpha, limit: change(gate, up, alpha, limit).astype(np.float32))


def dense_activating(change: Callable[[Array, Array], Array]) -> Injection:
    return calls("swiglu", lambda f, gate, up: change(gate, up).astype(np.float32))


def glu(gate: Array, up: Array, alpha: float, limit: float, one: float = 1.0) -> Array:
    g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return g / (1 + np.exp(-np.float64(alpha) * g)) * (u + one)


def halved(gate: Array, up: Array, alpha: float, limit: float) -> Array:
    first, second = np.split(np.stack((gate, up), -1).reshape(*gate.shape[:-1], -1), 2, -1)
    return glu(first, second, alpha, limit)


def normed(change: Callable[[Array, Array, float], Array]) -> Injection:
    return calls("rms_norm", lambda f, x, weight, eps: change(x, weight, eps).astype(np.float32))


def root(x: Array, eps: float) -> Array:
    return np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + eps)


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


def over_all(original: Any, logits: Array, ids: Array) -> Array:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return np.take_along_axis(e / e.sum(-1, keepdims=True), ids, 1)


def sigmoids(original: Any, logits: Array, ids: Array) -> Array:
    s = 1 / (1 + np.exp(-np.take_along_axis(logits, ids, 1)))
    return s / s.sum(-1, keepdims=True)


def in_groups(order: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A permutation of 32 places in every group of an expert's rows."""
    places = order(np.arange(32))
    return lambda w: w.reshape(*w.shape[:-1], -1, 32)[..., places].reshape(w.shape)


def zeros(w: Array) -> Array:
    return w * 0


def all_kinds(kind: str) -> Callable[[Any], dict[str, Any]]:
    return lambda c: {"layer_types": (kind,) * c.num_hidden_layers}


def without_window(c: Any) -> dict[str, Any]:
    return all_kinds("full_attention")(c) if hasattr(c, "layer_types") else {"sliding_window": None}


EXPERTS = tuple(f"experts.{name}_proj.weight" for name in ("gate", "up", "down"))
OTHER = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}
NORMS = ("layernorm.weight", "model.norm.weight")
INJECTIONS: dict[str, Injection] = {
    "yarn-ramp-rounded": scaled(truncate=True),
    "yarn-betas-ignored": scaled(beta_fast=32.0, beta_slow=1.0),
    "yarn-factor-missing": scaled(attention_factor=1.0),
    "yarn-factor-twice": scaled(attention_factor=lambda c: c.rope_scaling.attention_factor**2),
    "yarn-missing": Injection(lambda c: {"rope_scaling": None}),
    "yarn-new-context": scaled(original_max_position_embeddings=lambda c: c.max_position_embeddings),
    "yarn-scales-positions": calls(
        "rotary_tables", lambda f, c, start, T: angles(c, start, T, c.rope_scaling.factor, False)
    ),
    "yarn-frequencies-plain": calls("rotary_tables", lambda f, c, start, T: angles(c, start, T, 1, False)),
    "llama3-missing": Injection(lambda c: {"rope_scaling": None}),
    "longrope-always-long": scaled(short_factor=lambda c: c.rope_scaling.long_factor),
    "longrope-always-short": scaled(long_factor=lambda c: c.rope_scaling.short_factor),
    "longrope-factor-missing": scaled(attention_factor=1.0),
    "rope-base-10000": Injection(lambda c: {"rope_theta": 10000.0}),
    "rope-neighbours": calls("apply_rope", neighbours),
    "rope-backwards": turned(lambda cos, sin: (cos, -sin)),
    "rope-missing": calls("apply_rope", lambda f, x, cos, sin: x.copy()),
    "rope-angles-bfloat16": calls("rotary_tables", lambda f, c, start, T: angles(c, start, T, 1, True)),
    "rope-tables-bfloat16": turned(lambda cos, sin: (to_bfloat16(cos), to_bfloat16(sin))),
    "positions-from-one": placed(lambda start: start + 1),
    "positions-restart": placed(lambda start: 0),
    "positions-one-late": placed(lambda start: start + (start > 0)),
    "positions-one-early": placed(lambda start: start - (start > 0)),
    "window-one-more": Injection(lambda c: {"sliding_window": c.sliding_window + 1}),
    "window-one-less": Injection(lambda c: {"sliding_window": c.sliding_window - 1}),
    "window-missing": Injection(without_window),
    "window-on-all-layers": Injection(all_kinds("sliding_attention")),
    "window-on-other-layers": Injection(lambda c: {"layer_types": tuple(OTHER[kind] for kind in c.layer_types)}),
    "own-key-masked": masked(lambda mask, past: mask & (np.tri(mask.shape[0], mask.shape[1], past - 1) > 0)),
    "causal-mask-missing": masked(lambda mask, past: mask | np.triu(np.ones(mask.shape, bool), past + 1)),
    "cached-keys-skipped": masked(lambda mask, past: mask & (np.arange(mask.shape[1]) >= past)),
    "cache-rolled": attending(lambda mask, v, past: (mask, np.concatenate((np.roll(v[:past], 1, 0), v[past:])))),
    "heads-share-by-turns": attending(lambda mask, v, past: (mask, v), by_turns=True),
    "scale-missing": queries(lambda C: C**0.5),
    "scale-twice": queries(lambda C: C**-0.5),
    "values-of-the-next-head": calls("attend", lambda f, *a: np.roll(f(*a), 1, axis=1)),
    **{f"{x}-bias-missing": weights(zeros, f"self_attn.{x}_proj.bias") for x in "qkvo"},
    "o-bias-twice": weights(lambda b: 2 * b, "self_attn.o_proj.bias"),
    **{f"{x}-transposed": weights(np.transpose, f"self_attn.{x}_proj.weight") for x in "qo"},
    "qk-rows-to-neighbours": Injection(weights={"q_proj.weight": rows(True), "k_proj.weight": rows(True)}),
    "qk-rows-to-halves": Injection(weights={"q_proj.weight": rows(False), "k_proj.weight": rows(False)}),
    "q-rows-to-neighbours": Injection(weights={"q_proj.weight": rows(True)}),
    "k-rows-to-halves": Injection(weights={"k_proj.weight": rows(False)}),
    "k-v-swapped": Injection(renamed={"k_proj": "v_proj", "v_proj": "k_proj"}),
    "sinks-missing": weights(lambda s: np.full_like(s, -1e30), "sinks"),
    "sinks-twice": weights(lambda s: s + math.log(2), "sinks"),
    "sinks-of-the-next-head": weights(lambda s: np.roll(s, 1), "sinks"),
    "sinks-scaled": Injection(weights={"sinks": lambda s, checkpoint: s / math.sqrt(checkpoint.config.head_dim)}),
    "router-bias-missing": weights(zeros, "router.bias"),
    "smallest-experts-chosen": calls("top_k", lambda f, logits, A: f(-logits, A)),
    "softmax-over-all-experts": calls("expert_weights", over_all),
    "sigmoid-router": calls("expert_weights", sigmoids),
    "expert-weights-equal": calls("weighted_sum", lambda f, w, x: f(np.full_like(w, 1 / w.shape[1]), x)),
    "expert-weights-not-applied": calls("weighted_sum", lambda f, w, x: f(np.ones_like(w), x)),
    "expert-weights-wrong-slot": calls("weighted_sum", lambda f, w, x: f(np.ascontiguousarray(w[:, ::-1]), x)),
    "reduced-twice": Injection(taps={"mlp_out": lambda x: 2 * x}),
    "reduced-four-times": Injection(taps={"mlp_out": lambda x: 4 * x}),
    "clamp-missing": Injection(lambda c: {"swiglu_limit": 1e30}),
    "clamp-of-gate-missing": activating(
        lambda g, u, a, limit: g / (1 + np.exp(-a * g.astype(float))) * (np.clip(u, -limit, limit) + 1)
    ),
    "gate-clamped-both-ways": activating(lambda g, u, a, limit: glu(np.maximum(g, -limit), u, a, limit)),
    "silu-plain": Injection(lambda c: {"swiglu_alpha": 1.0}),
    "plus-one-missing": activating(lambda g, u, a, limit: glu(g, u, a, limit, 0.0)),
    "gate-up-swapped": Injection(
        functions={
            "clamped_swiglu": lambda f: lambda g, u, *rest: f(u, g, *rest),
            "swiglu": lambda f: lambda g, u: f(u, g),
        }
    ),
    "gate-up-not-interleaved": activating(halved),
    "gelu": dense_activating(
        lambda g, u: g * np.vectorize(lambda x: 0.5 + 0.5 * math.erf(x / 2**0.5), otypes=[float])(g) * u
    ),
    "relu": dense_activating(lambda g, u: np.where(g > 0, g, 0) * u),
    "plus-one-on-dense": dense_activating(lambda g, u: g / (1 + np.exp(-g.astype(float))) * (u + 1)),
    "gate-up-bias-missing": weights(zeros, "experts.gate_proj.bias", "experts.up_proj.bias"),
    "up-bias-missing": weights(zeros, "experts.up_proj.bias"),
    "down-bias-missing": weights(zeros, "experts.down_proj.bias"),
    "down-bias-per-rank": weights(lambda b: 2 * b, "experts.down_proj.bias"),
    "mlp-down-bias-missing": weights(zeros, "mlp.down_proj.bias"),
    "gate-up-weights-swapped": Injection(renamed={"gate_proj": "up_proj", "up_proj": "gate_proj"}),
    "expert-down-transposed": weights(lambda w: w.swapaxes(1, 2), "experts.down_proj.weight"),
    "mxfp4-nibbles-swapped": weights(in_groups(lambda i: i ^ 1), *EXPERTS),
    "mxfp4-read-as-halves": weights(in_groups(lambda i: i % 16 * 2 + i // 16), *EXPERTS),
    "mxfp4-read-as-neighbours": weights(in_groups(lambda i: i // 2 + i % 2 * 16), *EXPERTS),
    "mxfp4-halves-swapped": weights(in_groups(lambda i: i ^ 16), *EXPERTS),
    "mxfp4-exponent-high": weights(lambda w: 2 * w, *EXPERTS),
    "mxfp4-exponent-low": weights(lambda w: w / 2, *EXPERTS),
    "mxfp4-exponent-two-low": weights(lambda w: w / 4, *EXPERTS),
    "mxfp4-down-exponent-high": weights(lambda w: 2 * w, EXPERTS[2]),
    "mxfp4-sign-ignored": weights(np.abs, *EXPERTS),
    "norm-epsilon-smaller": Injection(lambda c: {"rms_norm_eps": c.rms_norm_eps / 10}),
    "norm-epsilon-larger": Injection(lambda c: {"rms_norm_eps": c.rms_norm_eps * 10}),
    "norm-plus-one": weights(lambda w: 1 + w, *NORMS),
    "norm-weight-missing": weights(lambda w: w * 0 + 1, *NORMS),
    "norm-subtracts-mean": normed(
        lambda x, w, eps: (x - x.mean(-1, keepdims=True)) / root(x - x.mean(-1, keepdims=True), eps) * w
    ),
    "norms-exchanged": Injection(
        renamed={"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"}
    ),
    "residual-bfloat16": Injection(taps={"attn_residual": to_bfloat16, "block_out": to_bfloat16}),
    "block-output-bfloat16": Injection(taps={"block_out": to_bfloat16}),
    "embedding-scaled": Injection(taps={"embed": lambda x: x * np.float32(x.shape[1] ** 0.5)}),
    "head-tied": Injection(lambda c: {"tie_word_embeddings": True}),
}
