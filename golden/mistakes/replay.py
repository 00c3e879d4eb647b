"""Single taps computed again by a recipe, each from the values that a backend had before it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from assay.golden.mistakes.recipe import Array, Recipe
from assay.golden.noise import Profile
from assay.golden.routing import next_best
from assay.golden.work import work_by_kind
from assay.loaders.checkpoint import Checkpoint
from assay.reference import ops
from assay.reference.gpt_oss import per_expert
from assay.reference.model import ROWS_AT_A_TIME


@dataclass(frozen=True)
class Run:
    """What a backend ran, and the taps that it supplied; of those in `rows` it computed these positions only."""

    checkpoint: Checkpoint
    tokens: list[int]
    chunks: list[int]
    taps: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def work_by_kind(self) -> dict[str, int]:
        """The work of each kind of step on these tokens."""
        return work_by_kind(self.checkpoint.config, len(self.tokens))


class Replay:
    """Taps by name, as they are when every earlier tap has the backend's value and every step follows the recipe.

    Only what a tap needs is computed: nothing but its own step where the backend supplied all inputs of it, a
    whole forward pass where it supplied nothing before. All chunks are computed at once; what depends on
    them is handed the start of each token's chunk. `computed` lists the taps whose steps were taken, `work` is
    theirs in all, `routed` has the router's logits among them. `flipped`, bool [T] by the names of choices of
    experts, says where the next best is taken for the last one.
    """

    def __init__(
        self,
        run: Run,
        variant: Callable[[Recipe], Recipe],
        profile: Profile,
        flipped: Mapping[str, np.ndarray] | None = None,
    ):
        self.run = run
        self.model = run.checkpoint.model(profile.compute)
        self.recipe = variant(Recipe(self.model.config, self.model.weight))
        self.profile = profile
        self.config = self.recipe.config
        self.computed: set[str] = set()
        self.work = 0
        self.routed: dict[str, Array] = {}
        self.flipped = flipped or {}
        self._known: dict[str, Array] = {}
        self.position_T = np.arange(len(run.tokens))
        ends = np.cumsum(run.chunks)
        self.start_T = np.repeat(ends - run.chunks, run.chunks)

    def value(self, name: str) -> Array:
        """The tap by its step, whatever the backend had for it."""
        prefix, _, kind = name.rpartition(".")
        layer = int(prefix.split(".")[1]) if prefix else self.config.num_hidden_layers
        self.computed.add(name)
        self.work += self.run.work_by_kind[kind]
        array = STEPS[kind](self, layer)
        if kind in self.recipe.after:
            array = self.recipe.after[kind](array)
        array = self.profile.round(name, array)
        if kind == "router_logits":
            self.routed[name] = array
        if name in self.flipped:
            array = next_best(array, self.given(f"{prefix}.router_logits"), self.flipped[name])
        return array

    def given(self, name: str) -> Array:
        """The tap as the next step gets it: the backend's value where it is a number."""
        if name not in self._known:
            theirs = self.run.taps.get(name)
            if theirs is None:
                self._known[name] = self.value(name)
            elif np.issubdtype(theirs.dtype, np.integer):
                self._known[name] = theirs
            else:
                finite = np.isfinite(theirs)
                array = theirs if finite.all() else np.where(finite, theirs, self.value(name))
                self._known[name] = array.astype(self.model.dtype, copy=False)
        return self._known[name]

    def stream(self, layer: int) -> Array:
        """What flows into a layer; layers before it, if they must be computed, one after the other."""
        first = layer
        while first > 0 and f"layers.{first - 1}.block_out" not in {*self.run.taps, *self._known}:
            first -= 1
        for i in range(first, layer):
            self.given(f"layers.{i}.block_out")
            for name in [n for n in self._known if n.startswith(f"layers.{i}.") and not n.endswith("block_out")]:
                del self._known[name]
        return self.given(f"layers.{layer - 1}.block_out" if layer else "embed")

    def linear(self, name: str, x: Array) -> Array:
        """Through a projection, with its bias if the model has one."""
        bias = f"{name}.bias"
        has_bias = bias in self.run.checkpoint.tensors
        return ops.linear(x, self.recipe.weight(f"{name}.weight"), self.recipe.weight(bias) if has_bias else None)

    def weight(self, name: str, part: int | None = None) -> Array:
        """A weight by the recipe; the name that `per_expert` asks a model by."""
        return self.recipe.weight(name, part)

    def tables(self) -> tuple[Array, Array]:
        """cos and sin [T,C/2], formed chunk by chunk: LongRoPE chooses by where a chunk ends."""
        turned_T = self.recipe.positions(self.position_T, self.start_T)
        pieces = np.split(turned_T, np.cumsum(self.run.chunks)[:-1])
        formed = [self.recipe.tables(self.config, piece_T, self.model.dtype) for piece_T in pieces]
        return np.concatenate([cos for cos, _ in formed]), np.concatenate([sin for _, sin in formed])

    def mask(self, layer: int) -> Array:
        """Who sees whom, [T,S]."""
        return self.recipe.mask(self.config, layer, self.position_T, self.position_T, self.start_T)


def _norm(kind: str, weight: str) -> Callable[[Replay, int], Array]:
    def step(s: Replay, i: int) -> Array:
        x_TD = s.stream(i) if kind != "mlp_norm" else s.given(f"layers.{i}.attn_residual")
        name = f"model.layers.{i}.{weight}" if kind != "final_norm" else weight
        return s.recipe.norm(kind, x_TD, s.recipe.weight(name), s.config.rms_norm_eps)

    return step


def _projection(name: str) -> Callable[[Replay, int], Array]:
    def step(s: Replay, i: int) -> Array:
        y = s.linear(f"model.layers.{i}.self_attn.{name}_proj", s.given(f"layers.{i}.attn_norm"))
        return y.reshape(len(y), -1, s.config.head_dim)

    return step


def _rotation(kind: str, source: str) -> Callable[[Replay, int], Array]:
    return lambda s, i: s.recipe.rotate(kind, s.given(f"layers.{i}.{source}"), *s.tables())


def _scores(s: Replay, i: int) -> Array:
    q_THC, k_SKC = s.given(f"layers.{i}.q_rope"), s.given(f"layers.{i}.k_rope")
    k_SHC = s.recipe.group(k_SKC, q_THC.shape[1])
    scores_HTS = q_THC.transpose(1, 0, 2) @ k_SHC.transpose(1, 2, 0) * s.model.dtype.type(s.recipe.scale(s.config))
    return np.where(s.mask(i), scores_HTS, 0)


def _attn_weights(s: Replay, i: int) -> Array:
    name = f"model.layers.{i}.self_attn.sinks"
    sink_H = s.recipe.weight(name) if name in s.run.checkpoint.tensors else None
    with np.errstate(invalid="ignore"):  # a row that sees nothing: 0 / 0, as in the backend that has it so
        return s.recipe.normalise(s.given(f"layers.{i}.attn_scores"), s.mask(i), sink_H)


def _heads(s: Replay, i: int) -> Array:
    weights_HTS = s.given(f"layers.{i}.attn_weights")
    v_SHC = s.recipe.group(s.given(f"layers.{i}.v"), len(weights_HTS))
    return s.recipe.combine(s.config, i, weights_HTS, v_SHC, s.start_T)


def _attn_out(s: Replay, i: int) -> Array:
    return s.linear(f"model.layers.{i}.self_attn.o_proj", s.recipe.flatten(s.given(f"layers.{i}.attn_heads")))


def _attn_residual(s: Replay, i: int) -> Array:
    return s.recipe.add(s.stream(i), s.given(f"layers.{i}.attn_norm"), s.given(f"layers.{i}.attn_out"))


def _block_out(s: Replay, i: int) -> Array:
    before, normed = s.given(f"layers.{i}.attn_residual"), s.given(f"layers.{i}.mlp_norm")
    return s.recipe.add(before, normed, s.given(f"layers.{i}.mlp_out"))


def _router_logits(s: Replay, i: int) -> Array:
    return s.recipe.route(s.recipe, s.given(f"layers.{i}.mlp_norm"), f"model.layers.{i}.mlp.router")


def _expert_ids(s: Replay, i: int) -> Array:
    # without the layer's norm nothing that depends on the unbiased logits can be asked
    return s.recipe.choose(s.recipe, s.given(f"layers.{i}.router_logits"), f"model.layers.{i}.mlp.router")


def _expert_weights(s: Replay, i: int) -> Array:
    return s.recipe.weigh(s.given(f"layers.{i}.router_logits"), s.given(f"layers.{i}.expert_ids"))


def _expert(source: str, name: str) -> Callable[[Replay, int], Array]:
    def step(s: Replay, i: int) -> Array:
        x, ids_TA = s.given(f"layers.{i}.{source}"), s.given(f"layers.{i}.expert_ids")
        return per_expert(x, ids_TA, s, f"model.layers.{i}.mlp.experts.{name}_proj")  # type: ignore[arg-type]

    return step


def _dense(source: str, name: str) -> Callable[[Replay, int], Array]:
    return lambda s, i: s.linear(f"model.layers.{i}.mlp.{name}_proj", s.given(f"layers.{i}.{source}"))


def _activation(gate: str, up: str) -> Callable[[Replay, int], Array]:
    return lambda s, i: s.recipe.activate(s.config, s.given(f"layers.{i}.{gate}"), s.given(f"layers.{i}.{up}"))


def _mlp_out(s: Replay, i: int) -> Array:
    if f"model.layers.{i}.mlp.router.weight" not in s.run.checkpoint.tensors:
        return _dense("act", "down")(s, i)
    return s.recipe.mix(s.given(f"layers.{i}.expert_weights"), s.given(f"layers.{i}.expert_out"))


def _logits(s: Replay, i: int) -> Array:
    name = "model.embed_tokens.weight" if s.config.tie_word_embeddings else "lm_head.weight"
    V, x_TD = s.config.vocab_size, s.given("final_norm")
    rows = [range(v, min(v + ROWS_AT_A_TIME, V)) for v in range(0, V, ROWS_AT_A_TIME)]
    return np.concatenate([x_TD @ s.recipe.weight(name, part).T for part in rows], axis=-1)


STEPS: dict[str, Callable[[Replay, int], Array]] = {
    "embed": lambda s, i: s.model.embed(np.array(s.run.tokens)),
    "attn_norm": _norm("attn_norm", "input_layernorm.weight"),
    "q": _projection("q"),
    "k": _projection("k"),
    "v": _projection("v"),
    "q_rope": _rotation("q_rope", "q"),
    "k_rope": _rotation("k_rope", "k"),
    "attn_scores": _scores,
    "attn_weights": _attn_weights,
    "attn_heads": _heads,
    "attn_out": _attn_out,
    "attn_residual": _attn_residual,
    "mlp_norm": _norm("mlp_norm", "post_attention_layernorm.weight"),
    "router_logits": _router_logits,
    "expert_ids": _expert_ids,
    "expert_weights": _expert_weights,
    "expert_gate": _expert("mlp_norm", "gate"),
    "expert_up": _expert("mlp_norm", "up"),
    "expert_act": _activation("expert_gate", "expert_up"),
    "expert_out": _expert("expert_act", "down"),
    "gate": _dense("mlp_norm", "gate"),
    "up": _dense("mlp_norm", "up"),
    "act": _activation("gate", "up"),
    "mlp_out": _mlp_out,
    "block_out": _block_out,
    "final_norm": _norm("final_norm", "model.norm.weight"),
    "logits": _logits,
}
