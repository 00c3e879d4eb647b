"""A model's tensors, checked against its configuration and cast for the kernels, once at load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np

from assay.fast import layers
from assay.fast.cpu.decode import decode_rows
from assay.fast.cpu.groups import Groups, one_group
from assay.fast.cpu.linear import grouped_linear
from assay.fast.cpu.products import product
from assay.fast.cpu.quantise import Panels, quantise
from assay.fast.cpu.rows import Rows, encoded_rows, has_kernel, in_float32
from assay.fast.inputs import WeightSource
from assay.fast.quantised import input_block
from assay.reference.config import Config
from assay.reference.weights import Tensor


@dataclass(frozen=True)
class Linear:
    """An encoded matrix, or a stack of them, and its bias, float32 [N,O] (zeros where it has none).

    `quantised`: inputs are rounded to int8 before the product.
    """

    rows: Rows
    bias: np.ndarray
    quantised: bool

    def __call__(self, x_TI: np.ndarray) -> np.ndarray:
        """[T,I] -> [T,O]."""
        return project([self], one_group(len(x_TI)), x_TI)[0]


def project(linears: Sequence[Linear], groups: Groups, x: np.ndarray) -> list[np.ndarray]:
    """Each product's input through its group's matrix, for several stacks with the same inputs: [P,O] each.

    Inputs are quantised once for all stacks of the same kind.
    """
    prepared: dict[int, Panels] = {}
    results = []
    for linear in linears:
        kind = linear.rows.kind
        if not linear.quantised:
            results.append(grouped_linear(linear.rows, groups, x, linear.bias))
            continue
        if kind not in prepared:
            prepared[kind] = quantise(x, groups, kind)
        results.append(product(linear.rows, groups, prepared[kind], linear.bias))
    return results


Layer: TypeAlias = layers.Layer[np.ndarray, Linear, np.ndarray]  # sinks: -inf where the model has none


@dataclass(frozen=True)
class Weights:
    """All weights of a model, and what a user should know about how they are held."""

    embed: Rows
    layers: tuple[Layer, ...]
    final_norm: np.ndarray
    head: Linear
    notices: tuple[str, ...]


def cast_weights(config: Config, tensors: Mapping[str, Tensor], mode: str = "exact") -> Weights:
    """The weights under canonical names, ready for the kernels of a mode.

    Norms, biases, sinks, and matrices in an encoding without a kernel are decoded. Raises CheckpointError for a
    tensor that is missing or misshapen: kernels check no bounds.
    """
    cast = _Cast(config, tensors, mode)
    return Weights(
        embed=cast.rows("model.embed_tokens.weight"),
        layers=tuple(layers.cast_layer(config, cast, i) for i in range(config.num_hidden_layers)),
        final_norm=cast.vector("model.norm.weight"),
        head=cast.linear("model.embed_tokens" if config.tie_word_embeddings else "lm_head"),
        notices=tuple(
            f"no kernel for {name}: {len(names)} tensors held in float32" for name, names in cast.held.items()
        ),
    )


class _Cast(WeightSource):
    """Takes tensors by name and casts them."""

    def __init__(self, config: Config, tensors: Mapping[str, Tensor], mode: str) -> None:
        super().__init__(config, tensors)
        self.mode, self.heads = mode, config.num_attention_heads
        self.held: dict[str, set[str]] = {}  # the tensors that have to be decoded, by encoding

    def rows(self, name: str) -> Rows:
        """A tensor as it is stored, or in float32 if its encoding has no kernel."""
        tensor = self.take(name)
        if has_kernel(tensor):
            return encoded_rows(tensor)
        self.held.setdefault(tensor.encoding.name, set()).add(name)
        return encoded_rows(in_float32(tensor))

    def vector(self, name: str) -> np.ndarray:
        """A small tensor, decoded whole to one axis."""
        return decode_rows(self.rows(name), np.arange(prod(self.shapes[name][:-1]))).ravel()

    def sinks(self, name: str | None) -> np.ndarray:
        """float32 [H]."""
        return np.full(self.heads, -np.inf, np.float32) if name is None else self.vector(name)

    def linear(self, name: str) -> Linear:
        """A projection [O,I], or a stack of them [N,O,I]."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        O = self.shapes[weight][-2]  # noqa: E741
        bias_P = self.vector(bias) if bias in self.shapes else np.zeros(O, np.float32)
        rows = self.rows(weight)
        return Linear(rows, bias_P.reshape(-1, O), self.mode == "q8" and input_block(self.take(weight)) > 0)
