"""Configs written back: a typed config as config.json (Hugging Face, MLX) or as GGUF metadata.

Both are the inverse of a reader (`loaders.config`, `loaders.gguf_config`); `loaders.convert` reads what it wrote
and compares, so a field that a container cannot say is an error and not a silent change.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from assay.loaders.config import longrope_attention_factor, yarn_attention_factor
from assay.loaders.errors import CheckpointError
from assay.reference.config import (
    Config,
    FrequencyFactors,
    GptOssConfig,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

CLASSES = {
    "gpt_oss": "GptOssForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# original contexts and blend ends that models with Llama-3 scaling have; the factor shows in the divisors themselves
LLAMA3_CONTEXTS = [1 << bits for bits in range(5, 21)]
LLAMA3_ENDS = [(1.0, 4.0)]


def model_type_of(config: Config, is_phi3: bool) -> str:
    """Hugging Face's model_type for a config; `is_phi3` if the file that it came from is laid out so."""
    if isinstance(config, GptOssConfig):
        return "gpt_oss"
    if is_phi3 or isinstance(config.rope_scaling, LongRopeScaling):
        return "phi3"
    return "llama" if config.sliding_window is None else "mistral"


def hf_config(config: Config, model_type: str, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in the form of the released models, which transformers 4 and 5 and mlx-lm all read.

    `dtype` is F32, F16 or BF16; `token_ids` holds bos_token_id and the like. Raises CheckpointError for a RoPE
    scaling that config.json has no words for.
    """
    values: dict[str, Any] = {
        "architectures": [CLASSES[model_type]],
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": _hf_scaling(config),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": TORCH_NAMES[dtype],
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if isinstance(config, GptOssConfig):
        values |= _gpt_oss(config)
    elif model_type == "llama":
        values |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    else:  # MistralConfig and Phi3Config have no biases: a config with them fails when it is read back
        values |= {"sliding_window": config.sliding_window}
    if model_type == "phi3":
        values |= _phi3(config)
    return dict(sorted((values | dict(token_ids)).items()))


def _gpt_oss(config: GptOssConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "attention_bias": config.attention_bias,
        "experts_per_token": config.num_experts_per_tok,
        "layer_types": list(config.layer_types),
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_local_experts": config.num_local_experts,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
    }
    if isinstance(config.rope_scaling, YarnScaling):
        values["initial_context_length"] = config.rope_scaling.original_max_position_embeddings
    if config.swiglu_alpha != 1.702:  # the code's constant, which released configs leave out
        values["swiglu_alpha"] = config.swiglu_alpha
    return values


def _phi3(config: Config) -> dict[str, Any]:
    scaling, original = config.rope_scaling, config.max_position_embeddings
    if isinstance(scaling, LongRopeScaling):
        original = scaling.original_max_position_embeddings
    # Phi3Config's own padding token is 32000, which smaller vocabularies do not have
    return {"original_max_position_embeddings": original, "pad_token_id": None}


def _hf_scaling(config: Config) -> dict[str, Any] | None:
    scaling = said_in_hf(config).rope_scaling
    match scaling:
        case None:
            return None
        case Llama3Scaling():
            return {**vars(scaling), "rope_type": "llama3"}
        case YarnScaling():
            values: dict[str, Any] = {**vars(scaling), "rope_type": "yarn"}
            if scaling.attention_factor == yarn_attention_factor(scaling.factor):
                del values["attention_factor"]
            return values
        case LongRopeScaling(short, long, original, m):
            values = {"type": "longrope", "short_factor": list(short), "long_factor": list(long)}
            formula = longrope_attention_factor(config.max_position_embeddings / original, original)
            return values if m == formula else values | {"attention_factor": m}
        case _:
            raise CheckpointError(f"config.json has no words for {type(scaling).__name__} that this writer knows")


def said_in_hf(config: Config) -> Config:
    """The config as config.json says it: GGUF's table of divisors named as the Llama-3 scaling that it came from.

    Raises CheckpointError for divisors that no known Llama-3 scaling gives.
    """
    if not isinstance(config.rope_scaling, FrequencyFactors):
        return config
    factors = np.array(config.rope_scaling.factors)
    for low, high in LLAMA3_ENDS:
        for context in LLAMA3_CONTEXTS:
            scaling = Llama3Scaling(float(factors.max()), low, high, context)
            # float32 rounding of both tables is at most a few 1e-7
            if np.allclose(llama3_factors(config, scaling), factors, rtol=3e-6, atol=0):
                return replace(config, rope_scaling=scaling)
    raise CheckpointError(
        "the file's rope_freqs.weight is no Llama-3 scaling that config.json could name",
        expected=f"low_freq_factor and high_freq_factor {LLAMA3_ENDS}, a power of two as original context",
        got=f"divisors {factors.min():g} to {factors.max():g}",
    )


def llama3_factors(config: Config, scaling: Llama3Scaling) -> np.ndarray:
    """Llama-3 scaling as one divisor a rotary pair, float32 [C/2]: GGUF's rope_freqs.weight.

    In float32 from the first step on, as llama.cpp's converter does it (conversion/llama.py): the same bits.
    """
    one = np.float32(1)
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freq = one / np.float32(config.rope_theta) ** exponent
    wavelength = np.float32(2 * math.pi) / freq
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    blend = one / ((one - smooth) / np.float32(scaling.factor) + smooth)
    outer = np.where(wavelength < context / high, one, np.float32(scaling.factor))
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(between, blend, outer).astype(np.float32)


def gguf_arch(model_type: str) -> str:
    """The architecture's name in GGUF."""
    return {"gpt_oss": "gpt-oss", "mistral": "llama"}.get(model_type, model_type)


def gguf_config(config: Config, model_type: str) -> dict[str, Any]:
    """The config as GGUF metadata, under the keys of its architecture; what `rope_tensors` holds goes beside it.

    Raises CheckpointError for a RoPE scaling that GGUF has no words for.
    """
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        **_gguf_scaling(config.rope_scaling),
    }
    if config.sliding_window is not None:
        values["attention.sliding_window"] = config.sliding_window
    if isinstance(config, GptOssConfig):
        values |= {
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.intermediate_size,
        }
    else:
        values |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    return {f"{gguf_arch(model_type)}.{key}": value for key, value in values.items()}


def _gguf_scaling(scaling: RopeScaling) -> dict[str, Any]:
    match scaling:
        case None | Llama3Scaling() | FrequencyFactors():
            return {}
        case YarnScaling():
            return {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": float(scaling.factor),
                "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
                "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
                "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
            }
        case LongRopeScaling():
            return {
                "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
                "rope.scaling.attn_factor": float(scaling.attention_factor),
            }
        case _:
            raise CheckpointError(f"GGUF has no words for {type(scaling).__name__} that this writer knows")


def rope_tensors(config: Config) -> dict[str, np.ndarray]:
    """The RoPE scaling that GGUF carries as tensors, float32 [C/2] each."""
    match config.rope_scaling:
        case Llama3Scaling() as scaling:
            return {"rope_freqs.weight": llama3_factors(config, scaling)}
        case FrequencyFactors(factors):
            return {"rope_freqs.weight": np.array(factors, np.float32)}
        case LongRopeScaling(short, long):
            named = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
            return {name: np.array(factors, np.float32) for name, factors in named.items()}
        case _:
            return {}


def said_in_gguf(config: Config) -> Config:
    """The config as a GGUF says it: Llama-3 scaling as a table of divisors."""
    if not isinstance(config.rope_scaling, Llama3Scaling):
        return config
    factors = tuple(llama3_factors(config, config.rope_scaling).tolist())
    return replace(config, rope_scaling=FrequencyFactors(factors))
