"""OpenAI's own implementations of gpt-oss: the torch model in bfloat16, and the Metal kernels in float32.

Facts from openai/gpt-oss 7b58334, gpt_oss/torch/model.py and gpt_oss/metal; each method names its source.
"""

import numpy as np

from assay.golden.emulate_bfloat16 import TransformersBfloat16
from assay.golden.emulation import Emulation
from assay.golden.rounding import to_bfloat16
from assay.reference.config import YarnScaling
from assay.reference.rope import apply_rope, inverse_frequencies


class OpenAiTorchBfloat16(TransformersBfloat16):
    """transformers' rounding points but two: softmax is torch's own, experts are one product (`sdpa`, `MLPBlock`)."""

    def attn_weights(self, layer: int, array: np.ndarray) -> np.ndarray:
        return array

    def mlp_out(self, layer: int, array: np.ndarray) -> np.ndarray:
        return array


class OpenAiMetal(Emulation):
    """float32 kernels, whose frequencies and exponentials are coarser than float32's own."""

    def q_rope(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._rotated("q")

    def k_rope(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._rotated("k")

    def attn_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed(f"model.layers.{layer}.input_layernorm.weight", array)

    def mlp_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed(f"model.layers.{layer}.post_attention_layernorm.weight", array)

    def final_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed("model.norm.weight", array)

    def _normed(self, name: str, array: np.ndarray) -> np.ndarray:
        """Gains are stored in bfloat16 (create-local-model.py, `write_rmsnorm_gain`)."""
        gain_D = self.model.weight(name)
        return array / np.where(gain_D == 0, np.float32(1), gain_D) * to_bfloat16(gain_D)

    def _rotated(self, source: str) -> np.ndarray:
        """Frequencies are exp(pair x freq_scale), blended and multiplied by positions in float32 (rope.metal)."""
        scaling, one = self.config.rope_scaling, np.float32(1)
        pairs = np.arange(self.config.head_dim // 2, dtype=np.float32)
        freq_scale = -np.log(np.float32(self.config.rope_theta)) / np.float32(self.config.head_dim // 2)
        inv_freq, m = np.exp(pairs * freq_scale), one
        if isinstance(scaling, YarnScaling):
            slow, m = inv_freq * np.float32(1 / scaling.factor), np.float32(scaling.attention_factor)
            plain = self.config.rope_theta ** (-pairs.astype(float) * 2 / self.config.head_dim)
            scaled = inverse_frequencies(self.config.head_dim, self.config.rope_theta, scaling) / plain
            keep = ((scaled - 1 / scaling.factor) / (1 - 1 / scaling.factor)).astype(np.float32)
            inv_freq = inv_freq * keep + slow * (one - keep)
        angle = self.position_T[:, None].astype(np.float32) * inv_freq
        return apply_rope(self.now[source], np.cos(angle) * m, np.sin(angle) * m)

    def attn_weights(self, layer: int, array: np.ndarray) -> np.ndarray:
        """exp(x) by fast::exp, which is exp2(x log2 e) with the product rounded (sdpa.metal)."""
        scores_HTS = np.where(self.mask_TS(layer), self.now["attn_scores"], -np.inf)
        sink_H11 = self.model.weight(f"model.layers.{layer}.self_attn.sinks")[:, None, None]
        largest_HT1 = np.maximum(scores_HTS.max(axis=-1, keepdims=True), sink_H11)
        e_HTS, sink_HT1 = _fast_exp(scores_HTS - largest_HT1), _fast_exp(sink_H11 - largest_HT1)
        return e_HTS / (e_HTS.sum(axis=-1, keepdims=True) + sink_HT1)


def _fast_exp(x: np.ndarray) -> np.ndarray:
    return np.exp2(x * np.float32(np.log2(np.e)))
