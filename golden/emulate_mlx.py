"""Backends on MLX: where mlx-lm rounds besides what it stores, and how MLX's x86 CPU adds up (mlx_cpu.py).

Facts from mlx-lm 0.32 models/rope_utils.py; on a GPU sums are float32.
"""

import numpy as np

from assay.golden.emulation import Emulation
from assay.golden.mlx_cpu import MlxCpuModel, Round, round_to_bfloat16, sequential_rms_norm, unrounded
from assay.golden.rounding import to_bfloat16
from assay.reference.config import Config, LongRopeScaling, YarnScaling
from assay.reference.model import Model
from assay.reference.rope import apply_rope, rope_tables


class MetalOnCpu(Emulation):
    """`fast/metal`, whose products take float32 inputs: only their order is MLX's."""

    def __init__(self, model: Model[Config]):
        super().__init__(MlxCpuModel(model.config, model.tensors, model.dtype))


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


class MlxLmFloat32(Emulation):
    """Sums one after the other: where all squares are equal, as in a row of 4-bit weights, it shows."""

    ROUND: Round = staticmethod(unrounded)

    def __init__(self, model: Model[Config]):
        super().__init__(MlxCpuModel(model.config, model.tensors, model.dtype, round=self.ROUND))

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
