"""transformers' eager path in bfloat16: where it rounds besides what it stores.

Facts from transformers 5.23 models/gpt_oss and models/llama: one bfloat16 operation after another.
"""

import numpy as np

from assay.golden.emulation import Emulation
from assay.golden.rounding import to_bfloat16
from assay.reference.config import GptOssConfig
from assay.reference.ops import sigmoid
from assay.reference.rope import rope_tables


class TransformersBfloat16(Emulation):
    """Every torch operation rounds its result; what is one step of the oracle is several of those."""

    def q_rope(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._rotated(self.now["q"])

    def k_rope(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._rotated(self.now["k"])

    def _rotated(self, x_THC: np.ndarray) -> np.ndarray:
        """cos and sin are cast before the rotation, and each product is rounded before the sum."""
        tables = rope_tables(self.config, self.position_T, self.model.dtype)
        cos, sin = (to_bfloat16(table)[:, None, :] for table in tables)
        first, second = np.split(x_THC, 2, axis=-1)
        r = to_bfloat16
        return np.concatenate((r(first * cos) - r(second * sin), r(second * cos) + r(first * sin)), axis=-1)

    def attn_scores(self, layer: int, array: np.ndarray) -> np.ndarray:
        """The product is rounded before it is scaled."""
        scale = np.float32(self.config.head_dim**-0.5)
        return to_bfloat16(array / scale) * scale

    def attn_weights(self, layer: int, array: np.ndarray) -> np.ndarray:
        """gpt-oss subtracts the largest score, sinks among them, in bfloat16 before the softmax."""
        if not isinstance(self.config, GptOssConfig):
            return array
        scores_HTS = np.where(self.mask_TS(layer), self.now["attn_scores"], -np.inf)
        sink_H11 = self.model.weight(f"model.layers.{layer}.self_attn.sinks")[:, None, None]
        largest_HT1 = np.maximum(scores_HTS.max(axis=-1, keepdims=True), sink_H11)
        e_HTS, sink_HT1 = np.exp(to_bfloat16(scores_HTS - largest_HT1)), np.exp(to_bfloat16(sink_H11 - largest_HT1))
        return e_HTS / (e_HTS.sum(axis=-1, keepdims=True) + sink_HT1)

    def attn_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed(f"model.layers.{layer}.input_layernorm.weight", array)

    def mlp_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed(f"model.layers.{layer}.post_attention_layernorm.weight", array)

    def final_norm(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._normed("model.norm.weight", array)

    def _normed(self, name: str, array: np.ndarray) -> np.ndarray:
        """Llama's normalised x is rounded before the gain is multiplied in; gpt-oss's is not."""
        if isinstance(self.config, GptOssConfig):
            return array
        gain_D = self.model.weight(name)
        safe_D = np.where(gain_D == 0, np.float32(1), gain_D)
        return to_bfloat16(array / safe_D) * gain_D

    def act(self, layer: int, array: np.ndarray) -> np.ndarray:
        gate, up = self.now["gate"], self.now["up"]
        return to_bfloat16(gate * sigmoid(gate)) * up

    def expert_gate(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._biased_after(layer, "gate_proj", array)

    def expert_up(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._biased_after(layer, "up_proj", array)

    def expert_out(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._biased_after(layer, "down_proj", array)

    def _biased_after(self, layer: int, name: str, array: np.ndarray) -> np.ndarray:
        """The experts' product is rounded before its bias is added."""
        bias_TAO = self.model.weight(f"model.layers.{layer}.mlp.experts.{name}.bias")[self.now["expert_ids"]]
        return to_bfloat16(array - bias_TAO) + bias_TAO

    def expert_act(self, layer: int, array: np.ndarray) -> np.ndarray:
        assert isinstance(self.config, GptOssConfig)
        r, limit = to_bfloat16, np.float32(self.config.swiglu_limit)
        gate = np.minimum(self.now["expert_gate"], limit)
        up = np.clip(self.now["expert_up"], -limit, limit)
        glu = r(gate * r(sigmoid(r(gate * np.float32(self.config.swiglu_alpha)))))
        return r(up + np.float32(1)) * glu

    def mlp_out(self, layer: int, array: np.ndarray) -> np.ndarray:
        """Experts are added up in bfloat16, in the order of their ids."""
        if not isinstance(self.config, GptOssConfig):
            return array
        order_TA = np.argsort(self.now["expert_ids"], axis=1)
        weighted_TAD = to_bfloat16(self.now["expert_weights"][..., None] * self.now["expert_out"])
        sum_TD = np.zeros_like(array)
        for a_T in order_TA.T:
            sum_TD = to_bfloat16(sum_TD + weighted_TAD[np.arange(len(array)), a_T])
        return sum_TD
