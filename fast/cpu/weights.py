"""A model's tensors, checked against its configuration and cast for the kernels, once at load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from assay.fast import layers
from assay.fast.cpu.decode import decode_rows
from assay.fast.cpu.groups import Groups, one_group
from assay.fast.cpu.linear import grouped_linear
from assay.fast.cpu.products import product
from assay.fast.cpu.quantise import Panels, quantise
from assay.fast.cpu.rows import Rows, encoded_rows, has_kernel, no_rows
from assay.fast.cpu.tiles import by_rows, tiled_linear
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

    def exact(self, groups: Groups, x: np.ndarray) -> np.ndarray:
        """Each product's input through its group's matrix, in float32: [P,O]."""
        return grouped_linear(self.rows, groups, x, self.bias)

    def decoded(self, row_T: np.ndarray) -> np.ndarray:
        """Some rows in float32, [T,I]; their numbers are not checked."""
        return decode_rows(self.rows, row_T)


@dataclass(frozen=True)
class TiledLinear(Linear):
    """The same in an encoding without a kernel: there are no `rows`, a tensor [N*O,I] is decoded as it is used."""

    tensor: Tensor

    def exact(self, groups: Groups, x: np.ndarray) -> np.ndarray:
        return tiled_linear(self.tensor, groups, x, self.bias)

    def decoded(self, row_T: np.ndarray) -> np.ndarray:
        return self.tensor[row_T].decode()


def project(linears: Sequence[Linear], groups: Groups, x: np.ndarray) -> list[np.ndarray]:
    """Each product's input through its group's matrix, for several stacks with the same inputs: [P,O] each.

    Inputs are quantised once for all stacks of the same kind.
    """
    prepared: dict[int, Panels] = {}
    results = []
    for linear in linears:
        kind = linear.rows.kind
        if not linear.quantised:
            results.append(linear.exact(groups, x))
            continue
        if kind not in prepared:
            prepared[kind] = quantise(x, groups, kind)
        results.append(product(linear.rows, groups, prepared[kind], linear.bias))
    return results


Layer: TypeAlias = layers.Layer[np.ndarray, Linear, np.ndarray]  # sinks: -inf where the model has none


@dataclass(frozen=True)
class Weights:
    """All weights of a model, and what a user should know about how they are held.

    `in_place`: kernels read every matrix where it lies.
    """

    embed: Linear
    layers: tuple[Layer, ...]
    final_norm: np.ndarray
    head: Linear
    notices: tuple[str, ...]
    in_place: bool


def cast_weights(config: Config, tensors: Mapping[str, Tensor], mode: str = "exact") -> Weights:
    """The weights under canonical names, ready for the kernels of a mode.

    Norms, biases and sinks are decoded. Raises CheckpointError for a tensor that is missing or misshapen: kernels
    check no bounds.
    """
    cast = _Cast(config, tensors, mode)
    return Weights(
        embed=cast.linear("model.embed_tokens"),
        layers=tuple(layers.cast_layer(config, cast, i) for i in range(config.num_hidden_layers)),
        final_norm=cast.vector("model.norm.weight"),
        head=cast.linear("model.embed_tokens" if config.tie_word_embeddings else "lm_head"),
        notices=tuple(
            f"no kernel for {name}: {len(names)} tensors are decoded piece by piece, each time anew: slow"
            for name, names in cast.tiled.items()
        ),
        in_place=not cast.tiled,
    )


class _Cast(WeightSource):
    """Takes tensors by name and casts them."""

    def __init__(self, config: Config, tensors: Mapping[str, Tensor], mode: str) -> None:
        super().__init__(config, tensors)
        self.mode, self.heads = mode, config.num_attention_heads
        self.tiled: dict[str, set[str]] = {}  # the matrices whose encoding has no kernel, by encoding

    def vector(self, name: str) -> np.ndarray:
        """A small tensor, decoded whole to one axis."""
        return self.take(name).decode().ravel()

    def sinks(self, name: str | None) -> np.ndarray:
        """float32 [H]."""
        return np.full(self.heads, -np.inf, np.float32) if name is None else self.vector(name)

    def linear(self, name: str) -> Linear:
        """A projection [O,I], or a stack of them [N,O,I]."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        O = self.shapes[weight][-2]  # noqa: E741
        bias_P = self.vector(bias) if bias in self.shapes else np.zeros(O, np.float32)
        tensor, bias_NO = self.take(weight), bias_P.reshape(-1, O)
        if has_kernel(tensor):
            return Linear(encoded_rows(tensor), bias_NO, self.mode == "q8" and input_block(tensor) > 0)
        self.tiled.setdefault(tensor.encoding.name, set()).add(weight)
        return TiledLinear(no_rows(), bias_NO, False, by_rows(tensor))
