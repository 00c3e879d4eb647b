"""Configs from GGUF metadata, where a model's hyperparameters have llama.cpp's names."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from assay.loaders.config import checked, longrope_attention_factor, require_plausible_depth, yarn_attention_factor
from assay.loaders.errors import CheckpointError
from assay.reference.config import (
    Config,
    FrequencyFactors,
    GptOssConfig,
    LlamaConfig,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

ARCHITECTURES = ("gpt-oss", "llama", "phi3")
# tensors that belong to the config: divisors of the rotary frequencies
ROPE_TENSORS = {"llama": ("rope_freqs.weight",), "phi3": ("rope_factors_short.weight", "rope_factors_long.weight")}


class _Metadata:
    """The keys under one architecture's prefix, taken one by one."""

    def __init__(self, metadata: Mapping[str, Any], arch: str, where: str):
        self.arch, self.where, self._metadata = arch, where, metadata
        self._left = {key for key in metadata if key.startswith(f"{arch}.")}

    def take(self, name: str, kind: type, *, least: int = 1, **default: Any) -> Any:
        key = f"{self.arch}.{name}"
        self._left.discard(key)
        if key not in self._metadata:
            if "default" in default:
                return default["default"]
            raise CheckpointError(f"metadata key {key!r} is missing, and the numbers depend on it", where=self.where)
        value = self._metadata[key]
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise CheckpointError(
                f"metadata key {key!r} has the wrong type", where=self.where, expected=kind, got=value
            )
        too_far = kind is int and isinstance(value, int) and not least <= value < 2**31
        if too_far or (isinstance(value, float) and not math.isfinite(value)):
            raise CheckpointError(f"metadata key {key!r} is out of range", where=self.where, got=value)
        return kind(value)

    def must_be(self, name: str, *allowed: Any) -> None:
        key = f"{self.arch}.{name}"
        self._left.discard(key)
        value = self._metadata.get(key, allowed[0])
        if not isinstance(value, (bool, int, float, str)) or value not in allowed:
            raise CheckpointError(
                f"metadata key {key!r} asks for something this model does not do",
                where=self.where,
                expected=" or ".join(map(repr, allowed)),
                got=repr(value),
            )

    def done(self) -> None:
        if self._left:
            raise CheckpointError(
                f"unknown metadata: {', '.join(sorted(self._left))}",
                where=self.where,
                expected=f"only {self.arch}.* keys whose effect on the numbers is known",
            )


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope: Mapping[str, np.ndarray], where: str
) -> Config:
    """The config of a GGUF file.

    `shapes` are the stored tensors' (a missing output.weight means a tied head, an attn_q.bias biases);
    `rope` the decoded tensors [C/2] that ROPE_TENSORS names for the architecture, as far as the file has them.
    Raises CheckpointError for an unknown architecture and for missing, unknown or inconsistent keys.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise CheckpointError(
            "unknown architecture", where=where, expected=f"general.architecture one of {ARCHITECTURES}", got=arch
        )
    keys = _Metadata(metadata, arch, where)
    match arch:
        case "gpt-oss":
            config: Config = _gpt_oss(keys, shapes)
        case "phi3":
            config = _phi3(keys, shapes, rope)
        case _:
            config = _llama(keys, shapes, rope.get("rope_freqs.weight"))
    keys.done()
    return checked(config, where)


def _shared(keys: _Metadata, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    if "token_embd.weight" not in shapes:
        raise CheckpointError("tensor 'token_embd.weight' is missing", where=keys.where)
    V = shapes["token_embd.weight"][0]
    keys.must_be("vocab_size", V)
    layers = keys.take("block_count", int)
    require_plausible_depth(layers, len(shapes), keys.where)
    D, H = keys.take("embedding_length", int), keys.take("attention.head_count", int)
    C = keys.take("attention.key_length", int, default=D // H)
    for name in ("attention.value_length", "rope.dimension_count"):
        keys.must_be(name, C)
    return {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": layers,
        "num_attention_heads": H,
        "num_key_value_heads": keys.take("attention.head_count_kv", int, default=H),
        "head_dim": C,
        "rms_norm_eps": keys.take("attention.layer_norm_rms_epsilon", float),
        "rope_theta": keys.take("rope.freq_base", float, default=10000.0),  # absent: llama.cpp's value
        "max_position_embeddings": keys.take("context_length", int),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
    }


def _llama(keys: _Metadata, shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None) -> LlamaConfig:
    for name in ("expert_count", "expert_used_count"):
        keys.must_be(name, 0)
    scaling = _scaling(keys)
    if rope_factors is not None:
        if scaling is not None:
            raise CheckpointError("both rope_freqs.weight and a RoPE scaling type", where=keys.where)
        scaling = FrequencyFactors(tuple(rope_factors.ravel().tolist()))
    return LlamaConfig(
        **_shared(keys, shapes),
        intermediate_size=keys.take("feed_forward_length", int),
        rope_scaling=scaling,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        sliding_window=keys.take("attention.sliding_window", int, default=None),
    )


def _phi3(keys: _Metadata, shapes: Mapping[str, tuple[int, ...]], rope: Mapping[str, np.ndarray]) -> LlamaConfig:
    return LlamaConfig(
        **_shared(keys, shapes),
        intermediate_size=keys.take("feed_forward_length", int),
        rope_scaling=_longrope(keys, rope),
        mlp_bias=False,
        # 0 says there is none; llama.cpp ignores any other value, the model was trained with it (phi-3-mini-4k: 2047)
        sliding_window=keys.take("attention.sliding_window", int, least=0, default=None) or None,
    )


def _longrope(keys: _Metadata, rope: Mapping[str, np.ndarray]) -> LongRopeScaling | None:
    """LongRoPE, whose factors are two tensors; without them phi-3 has plain RoPE."""
    keys.must_be("rope.scaling.type", "longrope", "none")  # llama.cpp's converter writes neither
    keys.must_be("rope.scaling.factor", 1.0)
    if not rope:
        keys.take("rope.scaling.original_context_length", int, default=None)
        keys.must_be("rope.scaling.attn_factor", 1.0)
        return None
    if missing := [name for name in ROPE_TENSORS["phi3"] if name not in rope]:
        raise CheckpointError(f"tensor {missing[0]!r} is missing, the other set of factors is there", where=keys.where)
    short, long = (tuple(rope[name].ravel().tolist()) for name in ROPE_TENSORS["phi3"])
    original = keys.take("rope.scaling.original_context_length", int)
    stored = keys.take("rope.scaling.attn_factor", float)
    formula = longrope_attention_factor(keys.take("context_length", int) / original, original)
    # the file has a float32; where that is the formula's value rounded, the formula's is meant
    is_formula = math.isclose(stored, formula, rel_tol=2**-23)
    return LongRopeScaling(short, long, original, formula if is_formula else stored)


def _gpt_oss(keys: _Metadata, shapes: Mapping[str, tuple[int, ...]]) -> GptOssConfig:
    shared = _shared(keys, shapes)
    F = keys.take("expert_feed_forward_length", int)
    keys.take("feed_forward_length", int, default=F)  # of the dense layers that gpt-oss has none of
    keys.must_be("attention.sliding_window_pattern", 2)
    keys.must_be("rope.freq_base_swa", shared["rope_theta"])
    kinds = "sliding_attention", "full_attention"
    return GptOssConfig(
        **shared,
        intermediate_size=F,
        rope_scaling=_scaling(keys),
        num_local_experts=keys.take("expert_count", int),
        num_experts_per_tok=keys.take("expert_used_count", int),
        # GGUF has no keys for these: they are constants of the architecture (llama.cpp openai-moe.cpp)
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        sliding_window=keys.take("attention.sliding_window", int),
        layer_types=tuple(kinds[i % 2] for i in range(shared["num_hidden_layers"])),
    )


def _scaling(keys: _Metadata) -> RopeScaling:
    """RoPE scaling from the metadata: none or YaRN.

    GGUF cannot say whether YaRN's ramp is rounded; every gpt-oss released says it is not, and YaRN's
    own code, which is what a Llama with YaRN was trained with, rounds.
    """
    kind = keys.take("rope.scaling.type", str, default="none")
    factor = keys.take("rope.scaling.factor", float, default=None)
    original = keys.take("rope.scaling.original_context_length", int, default=None)
    beta_fast = keys.take("rope.scaling.yarn_beta_fast", float, default=32.0)
    beta_slow = keys.take("rope.scaling.yarn_beta_slow", float, default=1.0)
    for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        keys.must_be(f"rope.scaling.{name}", 1.0)
    keys.must_be("rope.scaling.finetuned", False, True)
    if kind == "none":
        return None
    if kind != "yarn" or factor is None or original is None:
        raise CheckpointError(
            f"RoPE scaling {kind!r} is unknown or lacks its factor or original_context_length",
            where=keys.where,
            expected="none, or yarn with rope.scaling.factor and rope.scaling.original_context_length",
        )
    return YarnScaling(
        factor=factor,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        original_max_position_embeddings=original,
        truncate=keys.arch != "gpt-oss",
        attention_factor=yarn_attention_factor(factor),
    )
