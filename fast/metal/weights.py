"""A model's tensors as MLX arrays, checked against its configuration, once at load."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from assay.fast import layers
from assay.fast.inputs import WeightSource
from assay.fast.metal.layout import Packed, packed
from assay.fast.metal.linear import Linear, Matrix, Panels, Plain, Quantised
from assay.fast.metal.ops import on_cpu
from assay.reference.config import Config
from assay.reference.formats import BF16, F32, AffineGroups
from assay.reference.weights import Tensor

Layer: TypeAlias = "layers.Layer[mx.array, Linear, mx.array | None]"


@dataclass(frozen=True)
class Weights:
    """All weights of a model, and what a user should know about how they are held."""

    embed: Matrix
    layers: tuple[Layer, ...]
    final_norm: mx.array
    head: Linear
    notices: tuple[str, ...]


def cast_weights(config: Config, tensors: Mapping[str, Tensor], dtype: mx.Dtype) -> Weights:
    """The weights under canonical names, on MLX's default device, for activations of `dtype`.

    Raises CheckpointError for a tensor that is missing or misshapen.
    """
    cast = _Cast(config, tensors, dtype)
    embed = cast.matrix("model.embed_tokens.weight", multiplied=config.tie_word_embeddings)
    return Weights(
        embed=embed,
        layers=tuple(layers.cast_layer(config, cast, i) for i in range(config.num_hidden_layers)),
        final_norm=cast.vector("model.norm.weight"),
        head=Linear(embed, None, dtype) if config.tie_word_embeddings else cast.linear("lm_head"),
        notices=tuple(f"{what}: {count} tensors" for what, count in cast.held.items()),
    )


class _Cast(WeightSource):
    """Takes tensors by name and makes MLX arrays of them."""

    def __init__(self, config: Config, tensors: Mapping[str, Tensor], dtype: mx.Dtype) -> None:
        super().__init__(config, tensors)
        self.dtype = dtype
        self.held: dict[str, int] = {}

    def matrix(self, name: str, multiplied: bool = True) -> Matrix:
        """A matrix or a stack, as stored if MLX has the encoding, else decoded; `multiplied`, or only looked up."""
        tensor = self.take(name)
        if (found := packed(tensor)) is not None:
            return self._quantised(tensor, found)
        weight = self._floats(tensor)
        if not multiplied or not on_cpu():
            return Plain(weight)
        if weight.ndim == 2:
            return Panels(_now(Panels.of(weight).weight))
        # float32 is all that MLX's gather_mm knows on the CPU; it lies turned there, as the panels do
        return Plain(_now(mx.contiguous(weight.swapaxes(1, 2)).astype(mx.float32)).swapaxes(1, 2))

    def vector(self, name: str) -> mx.array:
        """A small tensor of floats."""
        return self._floats(self.take(name))

    def sinks(self, name: str | None) -> mx.array | None:
        """In the activations' dtype; None where the model has none."""
        return None if name is None else self.vector(name).astype(self.dtype)

    def linear(self, name: str) -> Linear:
        """A projection, or a stack of them, and its bias if it has one."""
        bias = self.vector(f"{name}.bias") if f"{name}.bias" in self.shapes else None
        return Linear(self.matrix(f"{name}.weight"), bias, self.dtype)

    def _quantised(self, tensor: Tensor, found: Packed) -> Quantised:
        scales, biases = mx.array(found.scales), None
        compute = mx.float32 if on_cpu() else self.dtype
        if found.biases is not None:
            biases = mx.array(found.biases)
            if isinstance(tensor.encoding, AffineGroups) and tensor.encoding.scale_format is BF16:
                scales, biases = scales.view(mx.bfloat16), biases.view(mx.bfloat16)
            if scales.dtype != compute:  # float32 holds every scale that there is, bfloat16 only its own
                compute = mx.float32
                scales, biases = _now(scales.astype(compute)), _now(biases.astype(compute))
        return Quantised(mx.array(found.weight), scales, biases, found.group_size, found.bits, found.mode, compute)

    def _floats(self, tensor: Tensor) -> mx.array:
        """Floats in the narrower of bfloat16 and float32 that holds them all exactly; float32 in float32 mode."""
        if tensor.encoding is BF16:
            codes = np.ascontiguousarray(tensor.parts["values"]).reshape(tensor.shape)
            return _now(mx.array(codes).view(mx.bfloat16).astype(self.dtype))
        values = tensor.decode()
        narrow = self.dtype == mx.bfloat16 and not (values.view(np.uint32) & 0xFFFF).any()
        if tensor.encoding is not F32:
            what = f"{tensor.encoding.name} decoded to {'bfloat16' if narrow else 'float32'}"
            self.held[what] = self.held.get(what, 0) + 1
        return _now(mx.array(values).astype(mx.bfloat16 if narrow else mx.float32))


def _now(array: mx.array) -> mx.array:
    """The array, computed: what it is made from need not be kept."""
    mx.eval(array)
    return array
