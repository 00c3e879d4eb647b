"""Backends on MLX: where mlx-lm rounds besides what it stores, and how MLX's x86 CPU adds up (mlx_cpu.py).

Facts from mlx-lm 0.32 models/rope_utils.py; on a GPU sums are float32.
"""

import numpy as np

from assay.golden.emulation import Emulation, split_name
from assay.golden.mlx_cpu import MlxCpuModel, Round, round_to_bfloat16, sequential_rms_norm, unrounded
from assay.golden.rounding import to_bfloat16
from assay.reference.config import Config, LongRopeScaling, YarnScaling
from assay.reference.model import Model
from assay.reference.rope import apply_rope, rope_tables


class MetalOnCpu(Emulation):
    """`fast/metal`, whose products take float32 inputs: only their order is MLX's, in attention's scores too."""

    ROUND: Round = staticmethod(unrounded)

    def __init__(self, model: Model[Config]):
        super().__init__(MlxCpuModel(model.config, model.tensors, model.dtype, round=self.ROUND))
        self._keys: dict[int, list[np.ndarray]] = {}

    def handed_on(self, name: str, array: np.ndarray) -> np.ndarray:
        array = super().handed_on(name, array)
        layer, kind = split_name(name)
        if kind == "k_rope":
            self._keys.setdefault(layer, []).append(array)
        return array

    def attn_scores(self, layer: int, array: np.ndarray) -> np.ndarray:
        """The queries are scaled before the product (mlx fast.cpp `scaled_dot_product_attention`)."""
        k_SKC = np.concatenate(self._keys[layer])
        q_THC = self.now["q_rope"] * np.float32(self.config.head_dim**-0.5)
        q_KGTC = q_THC.swapaxes(0, 1).reshape(k_SKC.shape[1], -1, *q_THC.shape[::2])
        scores_KGTS = np.zeros((*q_KGTC.shape[:-1], len(k_SKC)), np.float32)
        for c in range(k_SKC.shape[-1]):
            scores_KGTS += q_KGTC[..., c, None] * k_SKC[:, :, c].T[:, None, None]
        return np.where(self.mask_TS(layer), scores_KGTS.reshape(array.shape), 0)


class MlxLmOnGpuBfloat16(Emulation):
    """q and k times YaRN's factor are rounded before the rotation."""

    def q_rope(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._rotated("q", array)

    def k_rope(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._rotated("k", array)

    def _rotated(self, source: str, array: np.ndarray) -> np.ndarray:
        """`YarnRoPE` multiplies by the factor before the rotation, which is in float32."""
        scaling = self.config.rope_scaling
        if not isinstance(scaling, YarnScaling | LongRopeScaling):
            return array
        m = np.float32(scaling.attention_factor)
        cos, sin = rope_tables(self.config, self.position_T, self.model.dtype)
        return apply_rope(to_bfloat16(self.now[source] * m), cos / m, sin / m)


class MlxLmFloat32(MetalOnCpu):
    """Squares too are added up one by one: where all are equal, as in a row of 4-bit weights, it shows."""

    def attn_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed(f"model.layers.{layer}.input_layernorm.weight")

    def mlp_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed(f"model.layers.{layer}.post_attention_layernorm.weight")

    def final_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed("model.norm.weight")

    def _normed(self, name: str) -> np.ndarray:
        return sequential_rms_norm(self.ROUND, self._stream, self.model.weight(name), self.config.rms_norm_eps)

    def handed_on(self, name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith(("embed", "attn_residual", "block_out")):
            self._stream = array
        return super().handed_on(name, array)


class MlxLmBfloat16(MlxLmOnGpuBfloat16, MlxLmFloat32):
    """On the CPU products with quantised weights are added up in bfloat16 as well."""

    ROUND = staticmethod(round_to_bfloat16)
