"""Faults that the catalogue does not know, made in the Numba path; and pairs of faults that it does know."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.injecting import Array, Injection, activating, calls, glu, routed, weights
from assay.golden.mistakes.injecting_attention import attending, masked, queries, valued
from assay.golden.mistakes.injecting_rope import placed, turned
from assay.golden.mistakes.injections import INJECTIONS
from assay.golden.rounding import to_float16
from assay.reference.config import Config

Change = Callable[[Array], Array]


class Fault(NamedTuple):
    """What is done in the Numba path, and the tap where it first acts."""

    injection: Injection
    tap: str


def tap(kind: str, change: Change) -> Injection:
    """A tap of every layer, changed."""
    return Injection(taps={kind: lambda array: np.asarray(change(array.copy()), np.float32)})


def at(index: object, change: Change) -> Change:
    """Some elements changed."""

    def changed(x: Array) -> Array:
        x[index] = change(x[index])
        return x

    return changed


def noisy(size: float) -> Change:
    return lambda x: x + size * x.std() * np.random.default_rng(7).standard_normal(x.shape)


def swapped(a: int, b: int) -> Change:
    """Two rows exchanged."""

    def change(w: Array) -> Array:
        w = w.copy()
        w[[a, b]] = w[[b, a]]
        return w

    return change


def stale(x: Array) -> Array:
    """A row that is still the one before it."""
    if len(x) > 6:
        x[5] = x[4]
    return x


def logarithmic(q: Array) -> Array:
    """Queries that grow with their position, as attention with a temperature has them."""
    return q * (1 + 0.1 * np.log1p(np.arange(len(q))))[:, None, None]


def last_turned(cos: Array, sin: Array) -> tuple[Array, Array]:
    cos, sin = cos.copy(), sin.copy()
    cos[:, -1], sin[:, -1] = 1, 0
    return cos, sin


def faster(cos: Array, sin: Array) -> tuple[Array, Array]:
    """Angles a hundredth too large."""
    size = np.hypot(cos, sin)
    angle = np.unwrap(np.arctan2(sin, cos), axis=0) * 1.01
    return (size * np.cos(angle)).astype(np.float32), (size * np.sin(angle)).astype(np.float32)


def rows_late(cos: Array, sin: Array) -> tuple[Array, Array]:
    """The last position of a chunk is turned as the one before it."""
    last = np.r_[np.arange(len(cos) - 1), max(len(cos) - 2, 0)]
    return cos[last], sin[last]


def seventh_hidden(mask_TS: Array, past: int) -> Array:
    """Every seventh key is hidden, but a query's own."""
    S = mask_TS.shape[1]
    own = np.arange(S) == (past + np.arange(len(mask_TS)))[:, None]
    return mask_TS & ((np.arange(S) % 7 != 3) | own)


def one_block(w: Array) -> Array:
    """One block of 32 has twice its scale."""
    w = w.copy()
    w.reshape(-1, 32)[5] *= 2
    return w


FIRST, SECOND, ALL = "layers.0.", "layers.1.", slice(None)
OUTSIDE: dict[str, Fault] = {
    "noise on one head of q": Fault(tap("q", at((ALL, 2), noisy(0.01))), FIRST + "q"),
    "noise on one head's keys": Fault(tap("k_rope", at((ALL, 1), noisy(0.001))), FIRST + "k_rope"),
    "a stale row of keys": Fault(tap("k_rope", stale), FIRST + "k_rope"),
    "a stale row of values": Fault(tap("v", stale), FIRST + "v"),
    "two experts' gates exchanged": Fault(
        weights(swapped(0, 1), "0.mlp.experts.gate_proj.weight"), FIRST + "expert_gate"
    ),
    "two experts' down rows exchanged": Fault(
        weights(lambda w: np.stack([swapped(4, 5)(w[0]), *w[1:]]), "experts.down_proj.weight"), FIRST + "expert_out"
    ),
    "the output bias half again": Fault(weights(lambda b: 1.5 * b, "o_proj.bias"), FIRST + "attn_out"),
    "the key bias negated": Fault(weights(lambda b: -b, "k_proj.bias"), FIRST + "k"),
    "q in half precision": Fault(tap("q", to_float16), FIRST + "q"),
    "mlp_out in half precision": Fault(tap("mlp_out", to_float16), FIRST + "mlp_out"),
    "the last position turned as the one before": Fault(turned(rows_late), FIRST + "q_rope"),
    "positions from three": Fault(placed(lambda start: start + 3), FIRST + "q_rope"),
    "q by the layer before": Fault(
        Injection(renamed={"layers.1.self_attn.q_proj": "layers.0.self_attn.q_proj"}), SECOND + "q"
    ),
    "a norm by the layer before": Fault(
        Injection(renamed={"layers.1.input_layernorm": "layers.0.input_layernorm"}), SECOND + "attn_norm"
    ),
    "experts by the layer before": Fault(
        Injection(renamed={"layers.1.mlp.experts.up_proj": "layers.0.mlp.experts.up_proj"}), SECOND + "expert_up"
    ),
    "one head's sink lost": Fault(weights(at(0, lambda s: s - 30), "self_attn.sinks"), FIRST + "attn_heads"),
    "a router row lost": Fault(weights(at(1, lambda w: 0 * w), "router.weight"), FIRST + "router_logits"),
    "one block's scale doubled": Fault(weights(one_block, "0.mlp.experts.up_proj.weight"), FIRST + "expert_up"),
    "a column of o lost": Fault(weights(at((ALL, 9), lambda w: 0 * w), "o_proj.weight"), FIRST + "attn_out"),
    "a slope of 1.6": Fault(activating(lambda g, u, alpha, limit: glu(g, u, 1.6, limit)), FIRST + "expert_act"),
    "half of the linear branch's one": Fault(
        activating(lambda g, u, alpha, limit: glu(g, u, alpha, limit, one=0.5)), FIRST + "expert_act"
    ),
    "the last pair not turned": Fault(turned(last_turned), FIRST + "q_rope"),
    "angles a hundredth too large": Fault(turned(faster), FIRST + "q_rope"),
    "scores a tenth too small": Fault(queries(lambda C: 0.9), FIRST + "attn_heads"),
    "queries growing with their position": Fault(tap("q_rope", logarithmic), FIRST + "q_rope"),
    "every seventh key hidden": Fault(masked(seventh_hidden), FIRST + "attn_heads"),
    "two channels of values exchanged": Fault(
        valued(lambda a: a.v_SHC[..., [1, 0, *range(2, a.v_SHC.shape[-1])]]), FIRST + "attn_heads"
    ),
    "values of the past halved": Fault(
        attending(lambda a: (a.mask_TS, np.concatenate((a.v_SHC[: a.past] / 2, a.v_SHC[a.past :])))),
        FIRST + "attn_heads",
    ),
    "a head's values negated": Fault(tap("attn_heads", at((ALL, 1), lambda x: -x)), FIRST + "attn_heads"),
    "the router's logits doubled": Fault(routed(lambda own, x: 2 * own(x)), FIRST + "router_logits"),
    "expert weights of nine tenths": Fault(
        calls("expert_weights", lambda f, *rest: (0.9 * f(*rest)).astype(np.float32)), FIRST + "expert_weights"
    ),
    "attention a hundredth too weak": Fault(tap("attn_residual", lambda x: 0.99 * x), FIRST + "attn_residual"),
    "the fourth row without its feed-forward": Fault(
        tap("mlp_out", at(slice(3, 4), lambda x: 0 * x)), FIRST + "mlp_out"
    ),
    "two embeddings exchanged": Fault(tap("embed", lambda x: swapped(0, len(x) - 1)(x)), "embed"),
    "the last logits lost": Fault(tap("logits", at((ALL, slice(-4, None)), lambda x: 0 * x)), "logits"),
    "logits one id late": Fault(tap("logits", lambda x: np.roll(x, 1, -1)), "logits"),
    "one channel of the final norm lost": Fault(tap("final_norm", at((ALL, 5), lambda x: 0 * x)), "final_norm"),
}


def together(a: Injection, b: Injection, config: Config) -> Injection | None:
    """Both; None where they change the same thing."""
    if changed(a, config) & changed(b, config):
        return None
    return Injection(
        config=lambda c: {**a.config(c), **b.config(c)},
        weights={**a.weights, **b.weights},
        renamed={**a.renamed, **b.renamed},
        functions={**a.functions, **b.functions},
        configured=lambda c: {**a.configured(c), **b.configured(c)},
        taps={**a.taps, **b.taps},
    )


def changed(injection: Injection, config: Config) -> set[str]:
    """Names of what an injection changes."""
    fields, functions = set(injection.config(config)), {*injection.functions, *injection.configured(config)}
    tables = {"rope_scaling"} if "rotary_tables" in functions else set()  # formed from what the config says
    return {*injection.weights, *injection.renamed, *injection.taps, *fields, *functions, *tables}


def pairs(ids: Sequence[str], config: Config, same_tap: bool, count: int) -> Iterator[tuple[str, str, Injection]]:
    """So many pairs of mistakes, drawn evenly, that act first at the same tap, or at different ones."""
    order = list(itertools.combinations(ids, 2))
    np.random.default_rng(11).shuffle(order)
    for a, b in order:
        both = together(INJECTIONS[a], INJECTIONS[b], config)
        if count and both is not None and bool(set(CATALOGUE[a].taps) & set(CATALOGUE[b].taps)) == same_tap:
            count -= 1
            yield a, b, both
