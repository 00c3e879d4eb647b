"""The means to make a mistake in a real backend, the Numba path: its config, its weights, its functions, its taps.

Nothing of the catalogue's variants is used: what is found in a backend broken here is found in other code.
"""

import contextlib
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
    """Config fields, weights by the ends of their names (under `renamed` ones), functions of the engine, taps.

    `configured` are functions that need to know the config.
    """

    config: Callable[[Any], dict[str, Any]] = lambda config: {}
    weights: Mapping[str, Weight] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    functions: Mapping[str, Wrap] = field(default_factory=dict)
    configured: Callable[[Any], Mapping[str, Wrap]] = lambda config: {}
    taps: Mapping[str, Callable[[Array], Array]] = field(default_factory=dict)

    @contextlib.contextmanager
    def backend(self, checkpoint: Checkpoint, profile: str = "float32") -> Iterator[CpuBackend]:
        """The Numba path with the mistake in it, in mode q8 for that profile; in bfloat16 every tap is rounded."""
        broken = replace(
            checkpoint,
            config=replace(checkpoint.config, **self.config(checkpoint.config)),
            tensors={name: self._tensor(name, checkpoint) for name in checkpoint.tensors},
        )
        rounded = profile == "bfloat16"
        wraps = {**self.functions, **self.configured(checkpoint.config), "_showing": self._showing(rounded)}
        # a step within the kernel that runs single tokens cannot be exchanged: they go step by step too
        wraps["in_one_kernel"] = lambda original: lambda T: False
        with contextlib.ExitStack() as stack:
            for name, wrap in wraps.items():
                stack.enter_context(patch.object(engine, name, wrap(getattr(engine, name))))
            yield CpuBackend(broken, "q8" if profile == "q8" else "exact")

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


def in_turn(gate: Array, up: Array) -> Array:
    fused = np.concatenate((gate, up), -1)
    g, u = fused[..., ::2], fused[..., 1::2]
    return g / (1 + np.exp(-g.astype(np.float64))) * u


def normed(change: Callable[[Array, Array, float], Array]) -> Injection:
    return calls("rms_norm", lambda f, x, weight, eps: change(x, weight, eps).astype(np.float32))


def root(x: Array, eps: float) -> Array:
    return np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + eps)


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


def recalling(name: str, change: Callable[[dict[str, Array]], Array], *names: str) -> Injection:
    """A tap computed anew from others of the same layer, seen before it."""
    seen: dict[str, Array] = {}

    def keep(kind: str) -> Callable[[Array], Array]:
        return lambda array: seen.__setitem__(kind, np.array(array)) or array  # type: ignore[func-returns-value]

    def changed(array: Array) -> Array:
        return np.asarray(change({**seen, name: array}), dtype=np.float32)

    return Injection(taps={**{kind: keep(kind) for kind in names}, name: changed})


def both(first: Injection, second: Injection) -> Injection:
    return replace(first, taps={**first.taps, **second.taps}, functions={**first.functions, **second.functions})


def routed(change: Callable[[Any, Array], Array]) -> Injection:
    """The router's logits by `change`, asked with the router and its input."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, layer, *rest: original(x, replace(layer, router=Router(layer.router, change)), *rest)

    return Injection(functions={"mixture_of_experts": wrap})


@dataclass(frozen=True)
class Router:
    """A router with another computation in front of its own parameters."""

    own: Any
    change: Callable[[Any, Array], Array]

    def __call__(self, x: Array) -> Array:
        return np.asarray(self.change(self.own, x), dtype=np.float32)


def in_bfloat16(router: Any, x: Array) -> Array:
    """Input, parameters and logits rounded; the parameters are read back from products with unit vectors."""
    D = x.shape[1]
    bias = router(np.zeros((1, D), np.float32))
    weight = router(np.eye(D, dtype=np.float32)) - bias
    return to_bfloat16((to_bfloat16(x) @ to_bfloat16(weight) + to_bfloat16(bias)).astype(np.float32))


def chosen_without_bias() -> Injection:
    """Top-k of the logits less the router's bias."""
    noted: list[Array] = []

    def note(router: Any, x: Array) -> Array:
        noted.append(router(np.zeros((1, x.shape[1]), np.float32)))
        return router(x)

    return both(routed(note), calls("top_k", lambda f, logits, A: f(logits - noted.pop(), A)))


def zeros(w: Array) -> Array:
    return w * 0


def all_kinds(kind: str) -> Callable[[Any], dict[str, Any]]:
    return lambda c: {"layer_types": (kind,) * c.num_hidden_layers}


def without_window(c: Any) -> dict[str, Any]:
    return all_kinds("full_attention")(c) if hasattr(c, "layer_types") else {"sliding_window": None}
