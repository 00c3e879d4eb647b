"""llama.cpp's CPU path: activations rounded as the weights' type asks, a float16 cache, sums of values in float16.

Facts from ggml of llama.cpp as llama-cpp-python 0.3.36 has it; each function names the source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from assay.golden.emulation import Emulation, split_name, with_product
from assay.golden.rounding import to_bfloat16, to_float16
from assay.reference.config import Config, FrequencyFactors, GptOssConfig, YarnScaling
from assay.reference.model import Model
from assay.reference.precision import round_q8, round_q8_K
from assay.reference.rope import apply_rope, inverse_frequencies

Rounding = Callable[[np.ndarray], np.ndarray]

# what activations are rounded to, by the type of the weights (ggml-cpu.c, `type_traits_cpu[].vec_dot_type`);
# Q8_1 is Q8_0 with the sum of the codes beside them, whose float16 rounding is below the codes' own
OPERAND: Mapping[str, Rounding] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "MXFP4", "NVFP4", "IQ4_NL", "Q1_0", "Q2_0"), round_q8),
    **dict.fromkeys(("Q4_1", "Q5_1"), round_q8),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), round_q8_K),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), round_q8_K),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), round_q8_K),
    "BF16": to_bfloat16,
    "F16": to_float16,
}


@dataclass(frozen=True)
class _RoundedOperands(Model[Config]):
    def weight(self, name: str, part: int | range | None = None) -> np.ndarray:
        array = super().weight(name, part)
        if (rounding := OPERAND.get(self.tensors[name].encoding.name.removesuffix(" (by gguf-py)"))) is None:
            return array
        return with_product(array, lambda x, weight_IO: rounding(x) @ weight_IO)


class LlamaCpp(Emulation):
    """ggml's CPU kernels with a float16 cache and flash attention (ggml-cpu/ops.cpp)."""

    TILE = 64  # queries from which on the tiled kernel runs, with queries and sums in float32 (GGML_FA_TILE_Q)

    def __init__(self, model: Model[Config]):
        super().__init__(_RoundedOperands(model.config, model.tensors, model.dtype))
        self._values: dict[int, list[np.ndarray]] = {}

    def q_rope(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._rotated("q", array)

    def k_rope(self, layer: int, array: np.ndarray) -> np.ndarray:
        return self._rotated("k", array)

    def _rotated(self, source: str, array: np.ndarray) -> np.ndarray:
        """Angles by repeated float32 multiplication, pair after pair (`ggml_rope_cache_init`)."""
        tables = _ggml_rope_tables(self.config, self.position_T)
        return array if tables is None else apply_rope(self.now[source], *tables)

    def act(self, layer: int, array: np.ndarray) -> np.ndarray:
        """x / (1 + exp(-x)) times the other (vec.h `ggml_v_silu`); one element may hold most of it, and its error."""
        with np.errstate(over="ignore"):
            return self.now["gate"] / (1 + np.exp(-self.now["gate"])) * self.now["up"]

    def handed_on(self, name: str, array: np.ndarray) -> np.ndarray:
        array = super().handed_on(name, array)
        layer, kind = split_name(name)
        if kind in ("k_rope", "v") or (kind == "q_rope" and len(array) < self.TILE):
            array = to_float16(array)
        if kind == "v":
            self._values.setdefault(layer, []).append(array)
        return array

    def attn_heads(self, layer: int, array: np.ndarray) -> np.ndarray:
        """Below a tile of queries the weighted sum over keys is kept in float16 (`..._f16_one_chunk`)."""
        if len(array) >= self.TILE:
            return array
        v_SKC = self._values[layer] = [np.concatenate(self._values[layer])]
        sinks = self.model.weight(f"model.layers.{layer}.self_attn.sinks") if self._has_sinks else None
        return _summed_in_float16(self.now["attn_scores"], v_SKC[0], self.mask_TS(layer), sinks)

    @property
    def _has_sinks(self) -> bool:
        return isinstance(self.config, GptOssConfig)


class LlamaCppFloat32(LlamaCpp):
    """The same without flash attention and with a float32 cache."""

    def handed_on(self, name: str, array: np.ndarray) -> np.ndarray:
        return Emulation.handed_on(self, name, array)

    def attn_heads(self, layer: int, array: np.ndarray) -> np.ndarray:
        return array


def _ggml_rope_tables(config: Config, position_T: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """cos and sin float32 [T,C/2] as ggml forms them; None for a scaling that it does not know."""
    scaling, pairs, one = config.rope_scaling, config.head_dim // 2, np.float32(1)
    ratio = np.float32(config.rope_theta) ** np.float32(-2 / config.head_dim)
    powers = np.full((len(position_T), pairs), ratio, np.float32)
    powers[:, 0] = position_T
    angle = np.multiply.accumulate(powers, axis=1)
    if scaling is None:
        return np.cos(angle), np.sin(angle)
    if isinstance(scaling, FrequencyFactors):
        angle = angle / np.asarray(scaling.factors, np.float32)
        return np.cos(angle), np.sin(angle)
    if not isinstance(scaling, YarnScaling):
        return None
    plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    scaled = inverse_frequencies(config.head_dim, config.rope_theta, scaling) / plain
    keep = ((scaled - 1 / scaling.factor) / (1 - 1 / scaling.factor)).astype(np.float32)
    slow = angle * np.float32(1 / scaling.factor)
    angle = slow * (one - keep) + angle * keep
    m = np.float32(scaling.attention_factor)
    return np.cos(angle) * m, np.sin(angle) * m


def _summed_in_float16(
    scores_HTS: np.ndarray, v_SKC: np.ndarray, mask_TS: np.ndarray, sink_H: np.ndarray | None
) -> np.ndarray:
    """Softmax of the visible keys and its weighted sum of values, key by key; the sum is float16 all along.

    When a larger score turns up, what was summed so far is scaled down, and rounded once more.
    """
    H, T = scores_HTS.shape[:2]
    G = H // v_SKC.shape[1]
    scores_HTS = np.where(mask_TS, scores_HTS, -np.inf).astype(np.float32)
    total_HTC = np.zeros((H, T, v_SKC.shape[2]), np.float32)
    largest_HT, weight_HT = np.full((H, T), -np.inf, np.float32), np.zeros((H, T), np.float32)
    for s in np.flatnonzero(mask_TS.any(axis=0)):
        score_HT = scores_HTS[:, :, s]
        grown_HT = np.maximum(largest_HT, score_HT)
        with np.errstate(invalid="ignore"):  # -inf - -inf where a query has not seen a key yet
            shrink_HT = np.where(grown_HT > largest_HT, np.exp(largest_HT - grown_HT), np.float32(1))
            e_HT = np.where(score_HT > -np.inf, np.exp(score_HT - grown_HT), np.float32(0))
        if (shrink_HT < 1).any():
            total_HTC = to_float16(total_HTC * shrink_HT[..., None])
        v_H1C = np.repeat(v_SKC[s], G, axis=0)[:, None]
        total_HTC = to_float16(total_HTC + v_H1C * e_HT[..., None])
        weight_HT, largest_HT = weight_HT * shrink_HT + e_HT, grown_HT
    if sink_H is not None:
        weight_HT = weight_HT + np.exp(sink_H[:, None] - largest_HT)
    return np.moveaxis(total_HTC / weight_HT[..., None], 0, 1)
