"""How much error a backend's arithmetic makes by design, measured on the very inputs that are checked.

A profile is a computing dtype of the oracle, a dtype that every tap is rounded to, an emulation of the steps
that round more than that, and the conventions that the backend has otherwise by design. Its noise at a tap is
the difference between the oracle run that way and the oracle in float64, both forced through the backend's
own values, so that it is the error of that one step.
"""

from dataclasses import dataclass

import numpy as np

from assay.golden.emulate_bfloat16 import TransformersBfloat16
from assay.golden.emulate_llamacpp import LlamaCpp, LlamaCppFloat32
from assay.golden.emulate_mlx import MetalOnCpu, MlxLmBfloat16, MlxLmFloat32, MlxLmOnGpuBfloat16
from assay.golden.emulate_openai import OpenAiMetal, OpenAiTorchBfloat16
from assay.golden.emulate_q8 import Q8, Q8Float16Cache
from assay.golden.emulation import Emulation, Float16Cache
from assay.golden.errors import GoldenError
from assay.golden.rounding import round_mantissa


@dataclass(frozen=True)
class Profile:
    """The numerics of a backend: `compute` is NumPy's dtype, `mantissa` the explicit bits a stored value keeps.

    `rounds` says in words where values are rounded besides that, and `sources` where this can be read.
    """

    name: str
    compute: np.dtype
    mantissa: int
    deviations: tuple[str, ...] = ()  # ids of mistakes that the backend makes by design (see golden/mistakes)
    emulation: type[Emulation] = Emulation  # steps that are more than the oracle's with a rounding at the end
    rounds: str = ""
    sources: tuple[str, ...] = ()

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of one rounding to nearest: 2^-(mantissa + 1)."""
        return 2.0 ** -(self.mantissa + 1)

    def round(self, name: str, array: np.ndarray) -> np.ndarray:
        """A tap: the array as this profile would store it."""
        if self.mantissa >= np.finfo(self.compute).nmant or not np.issubdtype(array.dtype, np.floating):
            return array
        return round_mantissa(array.astype(np.float32), self.mantissa).astype(self.compute)


_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_RAMP = "yarn-ramp-rounded"
_LLAMA_CPP_DEVIATIONS = (_RAMP, "yarn-betas-ignored")
_GGML = "ggml-cpu: ggml-cpu.c (type_traits_cpu), ops.cpp, ggml-quants.c, as in llama-cpp-python 0.3.36"
_LLAMA_CPP = "llama.cpp src/models/openai-moe.cpp, ggml.c (ggml_rope_yarn_corr_dims)"
_MLX_LM = "mlx-lm 0.32 models/rope_utils.py, models/gpt_oss.py"

PROFILES = {
    profile.name: profile
    for profile in (
        Profile("float64", _FLOAT64, 52),
        Profile("float32", _FLOAT32, 23),
        Profile("float16", _FLOAT32, 10),
        Profile("bfloat16", _FLOAT32, 7),
        Profile(
            "q8",
            _FLOAT32,
            23,
            emulation=Q8,
            rounds="inputs of products with quantised weights to int8, by blocks",
            sources=("assay fast/quantised.py", "ggml-quants.c quantize_row_q8_0"),
        ),
        Profile(
            "float32-f16-cache",
            _FLOAT32,
            23,
            emulation=Float16Cache,
            rounds="keys after the rotation and values to float16",
            sources=("assay fast/cpu/cache.py",),
        ),
        Profile(
            "q8-f16-cache",
            _FLOAT32,
            23,
            emulation=Q8Float16Cache,
            rounds="inputs of products with quantised weights to int8, by blocks; keys after the rotation and values "
            "to float16",
            sources=("assay fast/quantised.py, fast/cpu/cache.py", "ggml-quants.c quantize_row_q8_0"),
        ),
        Profile(
            "transformers-float32",
            _FLOAT32,
            23,
            rounds="nothing else",
            sources=("transformers 5.23 models/gpt_oss, models/llama",),
        ),
        Profile(
            "transformers-bfloat16",
            _FLOAT32,
            7,
            emulation=TransformersBfloat16,
            rounds="every torch operation: cos and sin before the rotation, scores before scaling, softmax after "
            "subtracting the largest in bfloat16 (gpt-oss), experts' products before the bias, experts added up in "
            "order of their ids",
            sources=("transformers 5.23 models/gpt_oss, models/llama",),
        ),
        Profile(
            "openai-torch-float32",
            _FLOAT32,
            23,
            rounds="nothing else",
            sources=("openai/gpt-oss gpt_oss/torch/model.py, its parameters widened",),
        ),
        Profile(
            "openai-torch-bfloat16",
            _FLOAT32,
            7,
            emulation=OpenAiTorchBfloat16,
            rounds="every torch operation: cos and sin before the rotation, scores before and after scaling, experts' "
            "products before the bias, each step of the activation",
            sources=("openai/gpt-oss 7b58334 gpt_oss/torch/model.py",),
        ),
        Profile(
            "openai-metal",
            _FLOAT32,
            23,
            emulation=OpenAiMetal,
            rounds="RMSNorm's gain to bfloat16; rotary frequencies by exp in float32; fast::exp in attention",
            sources=("openai/gpt-oss 7b58334 gpt_oss/metal/source, metal/scripts/create-local-model.py",),
        ),
        Profile(
            "metal-cpu-float32",
            _FLOAT32,
            23,
            emulation=MetalOnCpu,
            rounds="sums one after the other",
            sources=("golden/mlx_cpu.py",),
        ),
        Profile(
            "metal-cpu-bfloat16",
            _FLOAT32,
            7,
            emulation=MetalOnCpu,
            rounds="what it stores; sums in float32, one after the other",
            sources=("golden/mlx_cpu.py",),
        ),
        Profile("mlx-lm-gpu-float32", _FLOAT32, 23, (_RAMP,), rounds="nothing else", sources=(_MLX_LM,)),
        Profile(
            "mlx-lm-gpu-bfloat16",
            _FLOAT32,
            7,
            (_RAMP,),
            MlxLmOnGpuBfloat16,
            "q and k times YaRN's factor before the rotation",
            (_MLX_LM,),
        ),
        Profile(
            "mlx-lm-float32",
            _FLOAT32,
            23,
            (_RAMP,),
            MlxLmFloat32,
            "on the CPU sums one after the other",
            (_MLX_LM, "golden/mlx_cpu.py"),
        ),
        Profile(
            "mlx-lm-bfloat16",
            _FLOAT32,
            7,
            (_RAMP,),
            MlxLmBfloat16,
            "q and k times YaRN's factor before the rotation, normalised values before the gain; on the CPU sums of "
            "products with quantised weights, one after the other",
            (_MLX_LM, "golden/mlx_cpu.py"),
        ),
        Profile(
            "llama.cpp",
            _FLOAT32,
            23,
            _LLAMA_CPP_DEVIATIONS,
            LlamaCpp,
            "activations as the weights' type asks (Q8_0, Q8_1, Q8_K, bfloat16, float16), keys and values to float16, "
            "below 64 queries also queries and the sum of values; angles by repeated multiplication",
            (_GGML, _LLAMA_CPP),
        ),
        Profile(
            "llama.cpp-float32",
            _FLOAT32,
            23,
            _LLAMA_CPP_DEVIATIONS,
            LlamaCppFloat32,
            "activations as the weights' type asks; angles by repeated multiplication",
            (_GGML, _LLAMA_CPP),
        ),
    )
}


def profile_named(name: str) -> Profile:
    """A profile by name; GoldenError lists the known ones."""
    if name not in PROFILES:
        raise GoldenError(f"unknown profile {name!r}", expected=", ".join(PROFILES))
    return PROFILES[name]
