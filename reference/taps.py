"""The tap table: every named intermediate tensor of the models, its axes, and what it is.

A tap is an argument of the forward pass, a function `tap(name, array) -> array` that is handed each
intermediate tensor and answers the one to go on with. Identity by default; recording, rounding to a
dtype, forcing a backend's value and injecting a fault are all just other functions.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from assay.reference.config import Config, GptOssConfig

Tap = Callable[[str, np.ndarray], np.ndarray]


def no_tap(name: str, array: np.ndarray) -> np.ndarray:
    """The identity tap."""
    return array


@dataclass(frozen=True)
class TapSpec:
    """One row of the table: the name within its layer, axes by dimension letter, meaning."""

    name: str
    axes: str
    meaning: str
    heavy: bool = False  # grows with T x S: recorded only when asked for by name
    integer: bool = False


BEFORE_LAYERS = (TapSpec("embed", "TD", "rows of the embedding matrix"),)
AFTER_LAYERS = (
    TapSpec("final_norm", "TD", "RMSNorm after the last block"),
    TapSpec("logits", "TV", "unembedded final_norm"),
)
ATTENTION = (
    TapSpec("attn_norm", "TD", "RMSNorm before attention"),
    TapSpec("q", "THC", "query projection with bias, before RoPE"),
    TapSpec("k", "TKC", "key projection with bias, before RoPE"),
    TapSpec("v", "TKC", "value projection with bias"),
    TapSpec("q_rope", "THC", "queries after RoPE, half-split layout"),
    TapSpec("k_rope", "TKC", "keys after RoPE, half-split layout"),
    TapSpec("attn_scores", "HTS", "scaled QK; 0 where the mask hides the key", heavy=True),
    TapSpec("attn_weights", "HTS", "softmax of attn_scores, the sink in its denominator", heavy=True),
    TapSpec("attn_heads", "THC", "weights times V, before the output projection"),
    TapSpec("attn_out", "TD", "output projection with bias"),
    TapSpec("attn_residual", "TD", "block input + attn_out"),
    TapSpec("mlp_norm", "TD", "RMSNorm before the feed-forward"),
)
DENSE = (
    TapSpec("gate", "TF", "gate projection, before the activation"),
    TapSpec("up", "TF", "up projection"),
    TapSpec("act", "TF", "silu(gate) * up"),
)
EXPERTS = (
    TapSpec("router_logits", "TN", "router projection with bias"),
    TapSpec("expert_ids", "TA", "chosen experts, largest logit first, ties to the lower id", integer=True),
    TapSpec("expert_weights", "TA", "softmax of the router logits over the chosen experts"),
    TapSpec("expert_gate", "TAF", "gate projection with bias, before the clamp"),
    TapSpec("expert_up", "TAF", "up projection with bias, before the clamp"),
    TapSpec("expert_act", "TAF", "clamped SwiGLU of gate and up"),
    TapSpec("expert_out", "TAD", "down projection with bias, before the expert weight"),
)
OUTPUT = (
    TapSpec("mlp_out", "TD", "feed-forward output: weighted sum over experts, or the down projection"),
    TapSpec("block_out", "TD", "attn_residual + mlp_out"),
)


def kind_of(name: str) -> str:
    """A tap's name within its layer: `q_rope` of `layers.3.q_rope`."""
    return name.rsplit(".", 1)[-1]


def layer_taps(config: Config) -> tuple[TapSpec, ...]:
    """The taps of one layer, in the order in which the model computes them."""
    return ATTENTION + (EXPERTS if isinstance(config, GptOssConfig) else DENSE) + OUTPUT


def tap_table(config: Config) -> dict[str, TapSpec]:
    """Every tap of a model by full name (`layers.3.q_rope`), in the order of computation."""
    table = {spec.name: spec for spec in BEFORE_LAYERS}
    for i in range(config.num_hidden_layers):
        table |= {f"layers.{i}.{spec.name}": spec for spec in layer_taps(config)}
    return table | {spec.name: spec for spec in AFTER_LAYERS}


def tap_shape(spec: TapSpec, config: Config, T: int, S: int) -> tuple[int, ...]:
    """The shape of a tap for T query and S key positions."""
    dims = config.dims | {"T": T, "S": S}
    return tuple(dims[letter] for letter in spec.axes)


def default_taps(config: Config) -> list[str]:
    """Names of the taps that are recorded unless others are asked for: all but the heavy ones."""
    return [name for name, spec in tap_table(config).items() if not spec.heavy]


class Recorder:
    """A tap that keeps a copy of the named tensors: `values[name]`, chunks joined along T.

    Attention matrices of successive chunks have more and more keys S: earlier ones are padded with
    zeros, which is what those entries hold in a single pass, where the mask hides them. `progress` is
    called with the name of every tensor that passes, recorded or not.
    """

    def __init__(self, config: Config, names: Iterable[str], progress: Callable[[str], None] | None = None):
        self.names = set(names)
        self.progress = progress
        self._T_axis = {name: spec.axes.index("T") for name, spec in tap_table(config).items()}
        self._chunks: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, array: np.ndarray) -> np.ndarray:
        if name in self.names:
            self._chunks.setdefault(name, []).append(np.array(array))
        if self.progress is not None:
            self.progress(name)
        return array

    @property
    def values(self) -> dict[str, np.ndarray]:
        """What was recorded, by name, in the order of computation."""
        return {name: self._joined(name, chunks) for name, chunks in self._chunks.items()}

    def _joined(self, name: str, chunks: list[np.ndarray]) -> np.ndarray:
        if chunks[0].ndim == 3 and self._T_axis[name] == 1:  # [H,T,S]
            S = max(chunk.shape[2] for chunk in chunks)
            chunks = [np.pad(chunk, ((0, 0), (0, 0), (0, S - chunk.shape[2]))) for chunk in chunks]
        return np.concatenate(chunks, axis=self._T_axis[name])
