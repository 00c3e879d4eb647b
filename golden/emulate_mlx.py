"""mlx-lm: where it rounds besides what it stores, and how MLX's CPU adds up.

Facts from mlx-lm 0.32 models/rope_utils.py, and mlx 0.32 fast.cpp and backend/cpu/quantized.cpp, of which the
branches without SIMD are those of its x86 builds; on a GPU sums are float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from assay.golden.emulation import Emulation, with_product
from assay.golden.rounding import to_bfloat16
from assay.reference.config import Config, LongRopeScaling, YarnScaling
from assay.reference.formats.mlx import AffineGroups
from assay.reference.model import Model
from assay.reference.rope import apply_rope, rope_tables


class MlxLmFloat32(Emulation):
    """Squares are added up one after the other: where all are equal, as in a row of 4-bit weights, it shows."""

    def attn_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed(f"model.layers.{layer}.input_layernorm.weight", self._stream)

    def mlp_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed(f"model.layers.{layer}.post_attention_layernorm.weight", self._stream)

    def final_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed("model.norm.weight", self._stream)

    def handed_on(self, name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith(("embed", "attn_residual", "block_out")):
            self._stream = array
        return super().handed_on(name, array)

    def _normed(self, name: str, x_TD: np.ndarray) -> np.ndarray:
        mean_T1 = np.add.accumulate(x_TD * x_TD, axis=-1)[:, -1:] / np.float32(x_TD.shape[-1])
        return self._cast(x_TD / np.sqrt(mean_T1 + np.float32(self.config.rms_norm_eps))) * self.model.weight(name)

    def _cast(self, x_TD: np.ndarray) -> np.ndarray:
        """The normalised values before the gain: `fast::rms_norm`'s fallback casts them to the model's dtype."""
        return x_TD


class MlxLmBfloat16(MlxLmFloat32):
    """mlx-lm multiplies q and k by YaRN's factor in bfloat16 before it turns them in float32."""

    def __init__(self, model: Model[Config]):
        super().__init__(_RoundedSums(model.config, model.tensors, model.dtype))

    def _cast(self, x_TD: np.ndarray) -> np.ndarray:
        return to_bfloat16(x_TD)

    def q_rope(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._rotated("q", array)

    def k_rope(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._rotated("k", array)

    def _rotated(self, source: str, array: np.ndarray) -> np.ndarray:
        scaling = self.config.rope_scaling
        if not isinstance(scaling, YarnScaling | LongRopeScaling):
            return array
        m = np.float32(scaling.attention_factor)
        cos, sin = rope_tables(self.config, self.position_T, self.model.dtype)
        return apply_rope(to_bfloat16(self.now[source] * m), cos / m, sin / m)


@dataclass(frozen=True)
class _RoundedSums(Model[Config]):
    """Products with quantised weights are added up in bfloat16; affine weights are formed in it."""

    def weight(self, name: str, part: int | range | None = None) -> np.ndarray:
        array = super().weight(name, part)
        encoding = self.tensors[name].encoding
        if encoding.name == "MXFP4":
            return with_product(array, _summed_by(32))
        if isinstance(encoding, AffineGroups):
            tensor = self.tensors[name]
            chosen = (
                tensor if part is None else tensor[part.start : part.stop] if isinstance(part, range) else tensor[part]
            )
            return with_product(_formed_in_bfloat16(chosen.parts, encoding).reshape(array.shape), _summed_by(None))
        return array

    def embed(self, token_T: np.ndarray) -> np.ndarray:
        tensor = self.tensors["model.embed_tokens.weight"]
        if not isinstance(tensor.encoding, AffineGroups):
            return super().embed(token_T)
        rows = tensor[token_T]
        return _formed_in_bfloat16(rows.parts, tensor.encoding).reshape(rows.shape).astype(self.dtype)


def _formed_in_bfloat16(parts: dict[str, np.ndarray], encoding: AffineGroups) -> np.ndarray:
    """s q + b, the product and the sum each rounded."""
    without_bias = {**parts, "biases": np.zeros_like(parts["biases"])}
    bias = encoding.scale_format.to_float32(parts["biases"])[..., None]
    products = to_bfloat16(encoding.decode(without_bias))
    grouped = products.reshape(*bias.shape[:-1], encoding.group_size)
    return to_bfloat16(grouped + bias).reshape(products.shape)


def _summed_by(group: int | None) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The product x @ w with every partial sum in bfloat16: over the groups of inputs, if any, as within them."""

    def product(x: np.ndarray, weight_IO: np.ndarray) -> np.ndarray:
        size = group or len(weight_IO)
        r, total = to_bfloat16, np.zeros((*x.shape[:-1], weight_IO.shape[1]), x.dtype)
        for first in range(0, len(weight_IO), size):
            part = np.zeros_like(total)
            for i in range(first, first + size):
                part = r(part + r(x[..., i, None] * weight_IO[i]))
            total = r(total + part)
        return total

    return product
