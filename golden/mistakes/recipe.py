"""The models' operations as a record: a mistake exchanges one of them, and two mistakes can be made together."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from assay.reference import ops
from assay.reference.config import Config, GptOssConfig
from assay.reference.model import Model
from assay.reference.rope import apply_rope, rope_tables

Array = np.ndarray
Weights = Callable[..., Array]  # (name, part=None) -> array, as `Model.weight`
Change = Callable[[Array], Array]
Variant = Callable[["Recipe"], "Recipe"]


def true_positions(position_T: Array, start_T: Array) -> Array:
    """The position that each token is turned by; `start_T` is where its chunk begins."""
    return position_T


def true_mask(config: Config, layer: int, query_T: Array, key_S: Array, start_T: Array) -> Array:
    """Who sees whom, bool [T,S]."""
    return ops.attention_mask(query_T, key_S, config.window(layer))


def grouped(x_SKC: Array, H: int) -> Array:
    """Keys or values for every query head, [S,H,C]: heads of a group are neighbours."""
    return np.repeat(x_SKC, H // x_SKC.shape[1], axis=1)


def combined(config: Config, layer: int, weights_HTS: Array, v_SHC: Array, start_T: Array) -> Array:
    """Weights times values, [T,H,C]."""
    return (weights_HTS @ v_SHC.transpose(1, 0, 2)).transpose(1, 0, 2)


def normed(kind: str, x_TD: Array, weight_D: Array, eps: float) -> Array:
    """RMSNorm; `kind` is the tap that it makes."""
    return ops.rms_norm(x_TD, weight_D, eps)


def activated(config: Config, gate: Array, up: Array) -> Array:
    """The feed-forward's activation: clamped SwiGLU or SwiGLU."""
    if isinstance(config, GptOssConfig):
        return ops.clamped_swiglu(gate, up, config.swiglu_alpha, config.swiglu_limit)
    return ops.swiglu(gate, up)


def routed(recipe: "Recipe", x_TD: Array, router: str) -> Array:
    """Router logits [T,N]."""
    return ops.linear(x_TD, recipe.weight(f"{router}.weight"), recipe.weight(f"{router}.bias"))


def chosen(recipe: "Recipe", logits_TN: Array, router: str) -> Array:
    """Ids of the experts, [T,A]."""
    assert isinstance(recipe.config, GptOssConfig)
    return ops.top_k(logits_TN, recipe.config.num_experts_per_tok)


def weighed(logits_TN: Array, ids_TA: Array) -> Array:
    """Softmax over the chosen experts only, [T,A]."""
    return ops.softmax(np.take_along_axis(logits_TN, ids_TA, axis=-1))


def mixed(weights_TA: Array, out_TAD: Array) -> Array:
    """Weighted sum over experts, [T,D]."""
    return np.einsum("TA,TAD->TD", weights_TA, out_TAD)


def added(x_TD: Array, normed_TD: Array, y_TD: Array) -> Array:
    """The residual addition; `normed_TD` is what the step started from, and is not used."""
    return x_TD + y_TD


def flattened(heads_THC: Array) -> Array:
    """Heads side by side, [T,HC]."""
    return heads_THC.reshape(len(heads_THC), -1)


@dataclass(frozen=True)
class Recipe:
    """How each step is computed. `after` changes a tap once it is computed, by its name within the layer."""

    config: Config
    weight: Weights
    positions: Callable[[Array, Array], Array] = true_positions
    tables: Callable[[Config, Array, Any], tuple[Array, Array]] = rope_tables
    rotate: Callable[[str, Array, Array, Array], Array] = lambda kind, x, cos, sin: apply_rope(x, cos, sin)
    mask: Callable[[Config, int, Array, Array, Array], Array] = true_mask
    group: Callable[[Array, int], Array] = grouped
    scale: Callable[[Config], float] = lambda config: 1 / math.sqrt(config.head_dim)
    normalise: Callable[[Array, Array, Array | None], Array] = ops.attention_weights
    combine: Callable[[Config, int, Array, Array, Array], Array] = combined
    flatten: Callable[[Array], Array] = flattened
    norm: Callable[[str, Array, Array, float], Array] = normed
    route: Callable[["Recipe", Array, str], Array] = routed
    choose: Callable[["Recipe", Array, str], Array] = chosen
    weigh: Callable[[Array, Array], Array] = weighed
    activate: Callable[[Config, Array, Array], Array] = activated
    mix: Callable[[Array, Array], Array] = mixed
    add: Callable[[Array, Array, Array], Array] = added
    after: Mapping[str, Change] = field(default_factory=dict)


def honest(model: Model[Config]) -> Recipe:
    """The recipe without a mistake: the oracle's operations on a model's weights."""
    return Recipe(model.config, model.weight)


# --- what most mistakes are made of


def exchange(**operations: Any) -> Variant:
    """Some operations exchanged."""
    return lambda recipe: replace(recipe, **operations)


def configure(**fields: Any) -> Variant:
    """Some fields of the config changed; a field given as a function is asked for its value."""

    def variant(recipe: Recipe) -> Recipe:
        values = {name: value(recipe.config) if callable(value) else value for name, value in fields.items()}
        return replace(recipe, config=replace(recipe.config, **values))

    return variant


def scaling(**fields: Any) -> Variant:
    """Some fields of the config's RoPE scaling changed; a function is asked with the config."""

    def changed(config: Config) -> Any:
        values = {name: value(config) if callable(value) else value for name, value in fields.items()}
        assert config.rope_scaling is not None
        return replace(config.rope_scaling, **values)

    return configure(rope_scaling=changed)


def _then(first: Change | None, second: Change) -> Change:
    return second if first is None else lambda array: second(first(array))


def tap_changed(change: Change, *kinds: str) -> Variant:
    """Some taps changed once they are computed."""

    def variant(recipe: Recipe) -> Recipe:
        changed = dict(recipe.after)
        for kind in kinds:
            changed[kind] = _then(changed.get(kind), change)
        return replace(recipe, after=changed)

    return variant


def weight_changed(change: Change, *ends: str) -> Variant:
    """Every weight whose name ends so, changed; experts one at a time, biases of all experts at once."""

    def variant(recipe: Recipe) -> Recipe:
        get = recipe.weight

        def weight(name: str, part: Any = None) -> Array:
            array = get(name, part)
            return change(array) if name.endswith(ends) else array

        return replace(recipe, weight=weight)

    return variant


def weights_renamed(names: Mapping[str, str]) -> Variant:
    """Weights looked up under other names: every occurrence of a key becomes its value."""

    def variant(recipe: Recipe) -> Recipe:
        get = recipe.weight

        def weight(name: str, part: Any = None) -> Array:
            found = next((old for old in names if old in name), None)
            return get(name if found is None else name.replace(found, names[found]), part)

        return replace(recipe, weight=weight)

    return variant
