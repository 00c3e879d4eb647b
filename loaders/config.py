"""Configs read strictly: a key that is missing or unknown, and could change the numbers, is an error."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from assay.loaders.errors import CheckpointError
from assay.reference.config import (
    Config,
    FrequencyFactors,
    GptOssConfig,
    Llama3Scaling,
    LlamaConfig,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

# keys of config.json that do not enter the forward pass
HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",  # where Python code of the checkpoint's own would be; we run none
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_length",
        "max_window_layers",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "quantization",
        "quantization_config",
        "resid_pdrop",
        "return_dict",
        "router_aux_loss_coef",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    ]
)
ARCHITECTURES = {"gpt_oss": "gpt-oss", "llama": "llama", "mistral": "llama", "phi3": "phi3"}


class _Keys:
    """A config.json whose keys are taken one by one, so that those left over can be named."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = dict(values), where

    def take(self, key: str, kinds: type | tuple[type, ...], **default: Any) -> Any:
        """A key's value, checked for its type; absent is an error unless a default says what absence means.

        Where the default is None, null is the same as absent.
        """
        if key not in self.values or (self.values[key] is None and default.get("default", ...) is None):
            self.values.pop(key, None)
            if "default" in default:
                return default["default"]
            raise CheckpointError(
                f"key {key!r} is missing, and the numbers depend on it",
                where=self.where,
                remedy=f"add {key!r} with the value the model was trained with",
            )
        value = self.values.pop(key)
        good = _is_finite_number(value) if kinds is float else isinstance(value, kinds)
        if kinds is int and isinstance(value, bool):
            good = False
        if not good:
            raise CheckpointError(f"key {key!r} has the wrong type", where=self.where, expected=kinds, got=repr(value))
        return float(value) if kinds is float else value

    def positive(self, key: str, **default: Any) -> int:
        """An integer of at least 1."""
        value = self.take(key, int, **default)
        if value is not None and not 1 <= value < 2**31:
            raise CheckpointError(f"key {key!r} is out of range", where=self.where, expected="1 to 2^31", got=value)
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """A key that may be absent, but whose other values would change the numbers."""
        if key in self.values and (value := self.values.pop(key)) not in allowed:
            raise CheckpointError(
                f"key {key!r} asks for something this model does not do",
                where=self.where,
                expected=" or ".join(map(repr, allowed)),
                got=repr(value),
            )

    def done(self) -> None:
        """Raise if keys are left that nobody read."""
        if unknown := sorted(set(self.values) - HARMLESS):
            raise CheckpointError(
                f"unknown key{'s' * (len(unknown) > 1)}: {', '.join(map(repr, unknown))}",
                where=self.where,
                expected="only keys whose effect on the numbers is known",
                remedy="remove the key if it has no effect on the forward pass; otherwise this model is not supported",
            )


def _is_finite_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def config_from_hf(values: Mapping[str, Any], where: str) -> Config:
    """The config of a parsed config.json (Hugging Face's keys, which MLX shares).

    Raises CheckpointError for an unknown architecture and for missing, unknown or inconsistent keys.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = f"model_type one of {sorted(ARCHITECTURES)}"
        raise CheckpointError("unknown architecture", where=where, expected=known, got=repr(model_type))
    keys = _Keys(values, where)
    match model_type:
        case "gpt_oss":
            config: Config = _gpt_oss(keys)
        case "phi3":
            config = _phi3(keys)
        case _:
            config = _llama(keys, model_type)
    keys.done()
    return checked(config, where)


def _shared(keys: _Keys) -> dict[str, Any]:
    """The fields that both families have."""
    hidden_size, heads = keys.positive("hidden_size"), keys.positive("num_attention_heads")
    head_dim = keys.positive("head_dim", default=None) or hidden_size // heads
    positions = keys.positive("max_position_embeddings")
    theta, scaling = _rope(keys, positions)
    keys.must_be("hidden_act", "silu", "swish")
    keys.must_be("partial_rotary_factor", 1, 1.0, None)
    return {
        "vocab_size": keys.positive("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": keys.positive("intermediate_size"),
        "num_hidden_layers": keys.positive("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.positive("num_key_value_heads", default=None) or heads,
        "head_dim": head_dim,
        "rms_norm_eps": keys.take("rms_norm_eps", float),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": positions,
        # absent means false, as in the Hugging Face classes; a checkpoint without lm_head then fails by name
        "tie_word_embeddings": keys.take("tie_word_embeddings", bool, default=False),
    }


def _llama(keys: _Keys, model_type: str) -> LlamaConfig:
    shared = _shared(keys)
    keys.must_be("pretraining_tp", 1)
    if model_type == "llama":
        keys.must_be("sliding_window", None)
    window = keys.positive("sliding_window", default=None)
    if layer_types := keys.take("layer_types", (list, type(None)), default=None):
        wanted = "full_attention" if window is None else "sliding_attention"
        if any(kind != wanted for kind in layer_types):
            raise CheckpointError("unexpected layer_types", where=keys.where, expected=wanted, got=layer_types)
    return LlamaConfig(
        **shared,
        # absent biases mean none; bias tensors in the file would then be reported as unused
        attention_bias=keys.take("attention_bias", bool, default=False),
        mlp_bias=keys.take("mlp_bias", bool, default=False),
        sliding_window=window,
    )


def _phi3(keys: _Keys) -> LlamaConfig:
    """phi-3: no biases, LongRoPE or plain; its fused matrices are the same model as Llama's separate ones."""
    shared = _shared(keys)
    if not isinstance(shared["rope_scaling"], LongRopeScaling | None):  # transformers would read "yarn" as LongRoPE
        raise CheckpointError("unknown RoPE scaling of phi-3", where=keys.where, expected="none, longrope or su")
    keys.take("original_max_position_embeddings", int, default=None)  # LongRoPE has taken it; nothing else asks
    keys.must_be("attention_bias", False)
    window = keys.positive("sliding_window", default=None)  # the query itself counted, as transformers masks
    return LlamaConfig(**shared, attention_bias=False, mlp_bias=False, sliding_window=window)


def _gpt_oss(keys: _Keys) -> GptOssConfig:
    shared = _shared(keys)
    experts_per_token = keys.positive("num_experts_per_tok")
    keys.must_be("experts_per_token", experts_per_token)  # the released config's second name for it
    if isinstance(shared["rope_scaling"], YarnScaling):
        keys.must_be("initial_context_length", shared["rope_scaling"].original_max_position_embeddings)
    layer_types = keys.take("layer_types", list)
    return GptOssConfig(
        **shared,
        attention_bias=keys.take("attention_bias", bool),
        num_local_experts=keys.positive("num_local_experts"),
        num_experts_per_tok=experts_per_token,
        swiglu_alpha=keys.take("swiglu_alpha", float, default=1.702),  # a constant of the code, not in released configs
        swiglu_limit=keys.take("swiglu_limit", float),
        sliding_window=keys.positive("sliding_window"),
        layer_types=tuple(layer_types),
    )


def _rope(keys: _Keys, max_positions: int) -> tuple[float, RopeScaling]:
    """theta and scaling from `rope_theta` + `rope_scaling` (to transformers 4) or `rope_parameters` (5)."""
    nested = keys.take("rope_parameters", (dict, type(None)), default=None)
    scaling = keys.take("rope_scaling", (dict, type(None)), default=None)
    rope = _Keys(dict(nested or scaling or {}), f"{keys.where}, {'rope_parameters' if nested else 'rope_scaling'}")
    source = rope if "rope_theta" in rope.values else keys
    theta = source.take("rope_theta", float)
    keys.must_be("rope_theta", theta)
    kind = rope.values.pop("rope_type", None) or rope.values.get("type", "default")
    longrope = ("longrope", "su")  # the second is phi-3's older name for it
    rope.must_be("type", *(longrope if kind in longrope else (kind,)))
    rope.must_be("partial_rotary_factor", 1, 1.0, None)
    match kind:
        case "default":
            result: RopeScaling = None
        case "llama3":
            result = Llama3Scaling(
                factor=rope.take("factor", float),
                low_freq_factor=rope.take("low_freq_factor", float),
                high_freq_factor=rope.take("high_freq_factor", float),
                original_max_position_embeddings=rope.positive("original_max_position_embeddings"),
            )
        case "yarn":
            result = _yarn(rope)
        case "longrope" | "su":
            result = _longrope(rope, keys, max_positions)
        case _:
            raise CheckpointError(
                "unknown RoPE scaling", where=rope.where, expected="default, llama3, yarn or longrope", got=kind
            )
    rope.must_be("max_position_embeddings", max_positions)
    rope.done()
    return theta, result


def _yarn(rope: _Keys) -> YarnScaling:
    factor = rope.take("factor", float)
    rope.must_be("mscale", None)
    rope.must_be("mscale_all_dim", None)
    given = rope.take("attention_factor", float, default=None)
    return YarnScaling(
        factor=factor,
        # absent: 32, 1 and true are the YaRN code's own values, and what transformers takes absence to mean
        beta_fast=rope.take("beta_fast", float, default=32.0),
        beta_slow=rope.take("beta_slow", float, default=1.0),
        original_max_position_embeddings=rope.positive("original_max_position_embeddings"),
        truncate=rope.take("truncate", bool, default=True),
        attention_factor=yarn_attention_factor(factor) if given is None else given,
    )


def yarn_attention_factor(factor: float) -> float:
    """0.1 ln(s) + 1, the temperature YaRN fits for a stretch s (arXiv:2309.00071, eq. 22)."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(rope: _Keys, keys: _Keys, max_positions: int) -> LongRopeScaling:
    """LongRoPE; phi-3's configs have the original context beside the other scaling keys, not among them."""
    original = keys.positive("original_max_position_embeddings", default=None)
    original = original or rope.positive("original_max_position_embeddings")
    rope.must_be("original_max_position_embeddings", original)
    stretch = rope.take("factor", float, default=None)
    stretch = max_positions / original if stretch is None else stretch
    given = rope.take("attention_factor", float, default=None)
    return LongRopeScaling(
        short_factor=_float32s(rope, "short_factor"),
        long_factor=_float32s(rope, "long_factor"),
        original_max_position_embeddings=original,
        attention_factor=longrope_attention_factor(stretch, original) if given is None else given,
    )


def _float32s(keys: _Keys, key: str) -> tuple[float, ...]:
    """A list of numbers as float32 has them: GGUF stores these factors so, and every engine computes so."""
    values = keys.take(key, list)
    if not all(map(_is_finite_number, values)):
        raise CheckpointError(f"key {key!r} has the wrong type", where=keys.where, expected="a list of numbers")
    with np.errstate(over="ignore"):  # infinities are named with the factor that cannot be, by `checked`
        return tuple(np.array(values, np.float64).astype(np.float32).tolist())


def longrope_attention_factor(stretch: float, original: int) -> float:
    """sqrt(1 + ln(s) / ln(L)), for a stretch s of the original context L (arXiv:2402.13753, section 3.3)."""
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 and original > 1 else 1.0


def checked(config: Config, where: str) -> Config:
    """The config itself, once its fields are consistent with one another."""
    problems = []
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append("num_attention_heads is not a multiple of num_key_value_heads")
    if config.head_dim % 2:
        problems.append(f"head_dim {config.head_dim} is odd, and RoPE turns pairs")
    problems += _scaling_problems(config)
    if not config.rms_norm_eps >= 0:
        problems.append(f"rms_norm_eps is {config.rms_norm_eps}")
    if not config.rope_theta > 1:
        problems.append(f"rope_theta is {config.rope_theta}")
    if isinstance(config, GptOssConfig):
        if config.num_experts_per_tok > config.num_local_experts:
            problems.append("more experts per token than experts")
        if len(config.layer_types) != config.num_hidden_layers:
            problems.append(f"layer_types has {len(config.layer_types)} entries, not {config.num_hidden_layers}")
        if unknown := {str(kind) for kind in config.layer_types if kind not in ("sliding_attention", "full_attention")}:
            problems.append(f"unknown layer types {sorted(unknown)}")
    if problems:
        raise CheckpointError("; ".join(problems), where=where)
    return config


def _scaling_problems(config: Config) -> list[str]:
    """What would make a frequency zero, infinite or NaN."""
    match config.rope_scaling:
        case Llama3Scaling(factor, low, high) if not (factor > 0 and 0 <= low < high):
            return [
                f"RoPE scaling needs factor > 0, 0 <= low_freq_factor < high_freq_factor; got {factor}, {low}, {high}"
            ]
        case YarnScaling(factor, fast, slow) if not (factor > 0 and 0 < slow <= fast):
            return [f"RoPE scaling needs factor > 0 and 0 < beta_slow <= beta_fast; got {factor}, {slow}, {fast}"]
        case LongRopeScaling(short, long, original, m):
            return _longrope_problems(short, long, original, m, config.head_dim // 2)
        case FrequencyFactors(factors) if len(factors) != config.head_dim // 2:
            return [
                f"rope_freqs.weight has {len(factors)} entries, not {config.head_dim // 2}, one for each pair of a head"
            ]
        case FrequencyFactors(factors) if not all(0 < factor < math.inf for factor in factors):
            return ["rope_freqs.weight holds a divisor that is not positive and finite"]
    return []


def _longrope_problems(
    short: tuple[float, ...], long: tuple[float, ...], original: int, attention_factor: float, pairs: int
) -> list[str]:
    problems = []
    for name, factors in (("short", short), ("long", long)):
        if len(factors) != pairs:
            problems.append(f"LongRoPE has {len(factors)} {name} factors, not {pairs}, one for each pair of a head")
        elif not all(0 < factor < math.inf for factor in factors):
            problems.append(f"LongRoPE has a {name} factor that is not positive and finite")
    if original < 2:
        problems.append("LongRoPE needs an original context of more than one position")
    if not 0 < attention_factor < math.inf:
        problems.append(f"LongRoPE's attention factor is {attention_factor}")
    return problems


def require_plausible_depth(layers: int, tensors: int, where: str) -> None:
    """Refuse more layers than the file has tensors, before any table of that many layers is made."""
    if layers > tensors:
        raise CheckpointError(f"the config says {layers} layers, but there are {tensors} tensors in all", where=where)
