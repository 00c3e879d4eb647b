"""config.json and GGUF metadata read strictly: right values, and one clear error for each wrong or missing key."""

import json
import re
from typing import Any

import numpy as np
import pytest

from assay.loaders.config import HARMLESS, config_from_hf
from assay.loaders.errors import CheckpointError
from assay.loaders.gguf_config import config_from_gguf
from assay.reference.config import (
    FrequencyFactors,
    GptOssConfig,
    Llama3Scaling,
    LlamaConfig,
    LongRopeScaling,
    YarnScaling,
)
from tests.checkpoint_files import CHECKPOINTS

WHERE = "somewhere/config.json"


def values_of(family: str) -> dict[str, Any]:
    return json.loads((CHECKPOINTS / family / "hf" / "config.json").read_text())


def read(family: str, **changes: Any) -> GptOssConfig | LlamaConfig:
    """The family's config.json with changed keys; ... removes one, `scaling__x` is x of rope_scaling."""
    values = values_of(family)
    for key, value in changes.items():
        nested, _, inner = key.rpartition("__")
        place = values[{"scaling": "rope_scaling", "parameters": "rope_parameters"}[nested]] if nested else values
        place.pop(inner if nested else key, None)
        if value is not ...:
            place[inner if nested else key] = value
    return config_from_hf(values, WHERE)


# --- right values ---


def test_gpt_oss():
    kinds = "sliding_attention", "full_attention", "sliding_attention"
    assert read("gpt_oss") == GptOssConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-05,
        rope_theta=150000.0,
        rope_scaling=YarnScaling(16.0, 8.0, 1.0, 96, False, 1.2772588722239782),  # 0.1 ln 16 + 1
        max_position_embeddings=1536,
        tie_word_embeddings=False,
        attention_bias=True,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        sliding_window=12,
        layer_types=kinds,
    )


def test_llama():
    config = read("llama")
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (10000.0, 1e-5, True)
    assert (config.sliding_window, config.attention_bias, config.mlp_bias) == (None, False, False)


def test_mistral_has_its_window_and_the_nested_rope_of_transformers_5():
    config = read("mistral")
    assert (config.sliding_window, config.rope_scaling, config.rope_theta) == (12, None, 10000.0)
    assert read("mistral", sliding_window=None).sliding_window is None


def test_phi3():
    config = read("phi3")
    # factors as float32 has them, in every container: 1.6 is 1.600000023841858
    long = (1.0299999713897705, 1.25, 1.600000023841858, 2.200000047683716)
    long += (3.0999999046325684, 4.300000190734863, 5.0, 5.400000095367432)
    short = (1.0, 1.0099999904632568, 1.0499999523162842, 1.100000023841858)
    short += (1.2000000476837158, 1.350000023841858, 1.5, 1.600000023841858)
    assert config.rope_scaling == LongRopeScaling(short, long, 24, 1.2356091792709865)  # sqrt(1 + ln(128/24) / ln 24)
    assert (config.head_dim, config.num_attention_heads, config.num_key_value_heads) == (16, 2, 1)
    assert (config.sliding_window, config.attention_bias, config.mlp_bias) == (18, False, False)


def test_forms_of_longrope():
    """Under its older name, under both (transformers 5 keeps the old beside the new), and the 4k models without."""
    same = read("phi3")
    assert read("phi3", scaling__type="su") == same
    assert read("phi3", scaling__type="su", scaling__rope_type="longrope") == same
    inside = {"scaling__original_max_position_embeddings": 24}
    assert read("phi3", **inside) == read("phi3", original_max_position_embeddings=..., **inside) == same
    assert read("phi3", auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, attention_bias=False) == same
    plain = read("phi3", rope_scaling=None, sliding_window=None)
    assert (plain.rope_scaling, plain.sliding_window) == (None, None)
    assert read("phi3", sliding_window=...).sliding_window is None


def test_attention_factor_of_longrope():
    """Phi-3-mini-128k's: sqrt(1 + ln 32 / ln 4096) = sqrt(17 / 12)."""
    real = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    factor_of = lambda **changes: read("phi3", **real, **changes).rope_scaling.attention_factor  # noqa: E731
    assert factor_of() == pytest.approx((17 / 12) ** 0.5, rel=1e-15)
    assert factor_of(scaling__factor=64.0) == pytest.approx(1.5**0.5, rel=1e-15)
    assert factor_of(scaling__attention_factor=1.5) == 1.5
    assert factor_of(scaling__attention_factor=None, scaling__factor=None) == factor_of()
    assert (
        factor_of(scaling__factor=1.0) == read("phi3", max_position_embeddings=24).rope_scaling.attention_factor == 1.0
    )


@pytest.mark.parametrize("family", ["gpt_oss", "llama", "mistral", "phi3"])
def test_integers_where_floats_are_meant(family):
    key = "parameters__rope_theta" if family == "mistral" else "rope_theta"
    config = read(family, **{key: 10000})
    assert type(config.rope_theta) is float


def test_what_absence_means():
    assert read("llama", head_dim=...).head_dim == 16
    assert read("llama", num_key_value_heads=...).num_key_value_heads == 4
    assert read("llama", tie_word_embeddings=...).tie_word_embeddings is False
    assert read("llama", rope_scaling=...).rope_scaling is None
    assert read("llama", attention_bias=True, mlp_bias=True).mlp_bias is True
    yarn = read("gpt_oss", scaling__truncate=..., scaling__beta_fast=..., scaling__beta_slow=...).rope_scaling
    assert (yarn.truncate, yarn.beta_fast, yarn.beta_slow) == (True, 32.0, 1.0)
    assert read("gpt_oss", scaling__attention_factor=1.5).rope_scaling.attention_factor == 1.5
    assert read("gpt_oss", scaling__factor=1.0).rope_scaling.attention_factor == 1.0
    assert read("gpt_oss", swiglu_alpha=1.5).swiglu_alpha == 1.5


def test_old_name_of_the_scaling_type():
    assert read("llama", scaling__rope_type=..., scaling__type="llama3") == read("llama")


def test_windows_of_layers():
    config = read("gpt_oss")
    assert [config.window(i) for i in range(3)] == [12, None, 12]
    assert [read("mistral").window(i) for i in range(2)] == [12, 12]
    assert read("llama").window(0) is None


# --- wrong keys: (family, change, what the message must hold) ---

MISSING = [
    *[("llama", key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")],
    *[("llama", key) for key in ("vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings")],
    *[("llama", f"scaling__{key}") for key in ("factor", "low_freq_factor", "high_freq_factor")],
    ("llama", "scaling__original_max_position_embeddings"),
    ("mistral", "parameters__rope_theta"),
    *[("phi3", f"scaling__{key}") for key in ("short_factor", "long_factor")],
    ("phi3", "original_max_position_embeddings"),
    *[("gpt_oss", key) for key in ("rope_theta", "rms_norm_eps", "swiglu_limit", "layer_types", "sliding_window")],
    *[("gpt_oss", key) for key in ("num_local_experts", "num_experts_per_tok", "attention_bias")],
    *[("gpt_oss", f"scaling__{key}") for key in ("factor", "original_max_position_embeddings")],
]


@pytest.mark.parametrize(("family", "key"), MISSING)
def test_missing_key_is_named(family, key):
    with pytest.raises(CheckpointError, match=re.escape(f"key {key.rpartition('__')[2]!r} is missing")) as error:
        read(family, **{key: ...})
    assert WHERE in str(error.value)


WRONG = {
    "unknown architecture": ("llama", {"model_type": "qwen3"}, "unknown architecture", "'gpt_oss', 'llama', 'mistral'"),
    "no architecture": ("llama", {"model_type": ...}, "unknown architecture", "got: None"),
    "architecture is a list": ("llama", {"model_type": ["llama"]}, "unknown architecture", "['llama']"),
    "unknown key": ("llama", {"logit_scale": 0.5}, "unknown key: 'logit_scale'", "no effect on the forward pass"),
    "two unknown keys": ("llama", {"b": 1, "a": 2}, "unknown keys: 'a', 'b'"),
    "unknown key of the scaling": ("llama", {"scaling__magic": 2}, "rope_scaling: unknown key: 'magic'"),
    "text for a number": ("llama", {"hidden_size": "64"}, "'hidden_size' has the wrong type", "'64'"),
    "bool for a number": ("llama", {"hidden_size": True}, "'hidden_size' has the wrong type"),
    "float for an integer": ("llama", {"hidden_size": 64.0}, "'hidden_size' has the wrong type"),
    "number for a bool": ("llama", {"tie_word_embeddings": 1}, "'tie_word_embeddings' has the wrong type"),
    "null eps": ("llama", {"rms_norm_eps": None}, "'rms_norm_eps' has the wrong type", "None"),
    "NaN eps": ("llama", {"rms_norm_eps": float("nan")}, "'rms_norm_eps' has the wrong type", "nan"),
    "infinite theta": ("llama", {"rope_theta": float("inf")}, "'rope_theta' has the wrong type", "inf"),
    "theta beyond float": ("llama", {"rope_theta": 10**400}, "'rope_theta' has the wrong type"),
    "negative eps": ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
    "theta of one": ("llama", {"rope_theta": 1.0}, "rope_theta is 1.0"),
    "no layers": ("llama", {"num_hidden_layers": 0}, "'num_hidden_layers' is out of range"),
    "a size beyond 2^31": ("llama", {"vocab_size": 2**31}, "'vocab_size' is out of range", str(2**31)),
    "odd head": ("llama", {"head_dim": 15}, "head_dim 15 is odd"),
    "heads do not group": ("llama", {"num_key_value_heads": 3}, "num_attention_heads is not a multiple"),
    "other activation": ("llama", {"hidden_act": "gelu"}, "'hidden_act'", "'silu' or 'swish'", "'gelu'"),
    "activation of gpt-oss": ("gpt_oss", {"hidden_act": "gelu"}, "'hidden_act'", "'gelu'"),
    "partial rotation": ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor'", "0.5"),
    "tensor parallelism": ("llama", {"pretraining_tp": 2}, "'pretraining_tp'", "got: 2"),
    "window in a Llama": ("llama", {"sliding_window": 64}, "'sliding_window'", "got: 64"),
    "scaling of another kind": ("llama", {"scaling__rope_type": "dynamic"}, "unknown RoPE scaling", "dynamic"),
    "scaling is a list": ("llama", {"rope_scaling": [1]}, "'rope_scaling' has the wrong type"),
    "scaling type is a list": ("llama", {"scaling__rope_type": ["yarn"]}, "unknown RoPE scaling"),
    "two types": ("llama", {"scaling__type": "yarn"}, "'type'", "'llama3'"),
    "theta twice": ("mistral", {"rope_theta": 5000.0}, "'rope_theta'", "10000.0", "5000.0"),
    "mscale": ("gpt_oss", {"scaling__mscale": 0.7}, "'mscale'", "0.7"),
    "truncate is a number": ("gpt_oss", {"scaling__truncate": 0}, "'truncate' has the wrong type"),
    "scaling factor of zero": ("gpt_oss", {"scaling__factor": 0}, "factor"),
    "scaling factor below zero": ("llama", {"scaling__factor": -8.0}, "factor"),
    "no ramp": ("llama", {"scaling__low_freq_factor": 4.0}, "low_freq_factor"),
    "no rotations": ("gpt_oss", {"scaling__beta_slow": 0.0}, "beta_slow"),
    "experts under two names": ("gpt_oss", {"experts_per_token": 3}, "'experts_per_token'", "got: 3"),
    "context under two names": ("gpt_oss", {"initial_context_length": 4096}, "'initial_context_length'", "4096"),
    "more experts than there are": (
        "gpt_oss",
        {"num_experts_per_tok": 5, "experts_per_token": 5},
        "more experts per token than experts",
    ),
    "layer types do not fit": ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, not 3"),
    "layer type unknown": ("gpt_oss", {"layer_types": ["linear"] * 3}, "unknown layer types", "linear"),
    "layer type no text": ("gpt_oss", {"layer_types": [["x"]] * 3}, "unknown layer types"),
    "layer types of a Llama": ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "layer type of a Llama no text": ("llama", {"layer_types": [{}, {}]}, "layer_types"),
    "YaRN in phi-3": (
        "phi3",
        {"scaling__type": "yarn", "scaling__factor": 2.0, "scaling__original_max_position_embeddings": 24}
        | {"scaling__long_factor": ..., "scaling__short_factor": ..., "original_max_position_embeddings": ...},
        "unknown RoPE scaling of phi-3",
    ),
    "two kinds of scaling": ("phi3", {"scaling__rope_type": "llama3"}, "'type'", "'longrope'"),
    "original context twice": ("phi3", {"scaling__original_max_position_embeddings": 48}, "24", "got: 48"),
    "original context of one": ("phi3", {"original_max_position_embeddings": 1}, "original context of more than one"),
    "original context of zero": ("phi3", {"original_max_position_embeddings": 0}, "out of range"),
    "too few factors": ("phi3", {"scaling__long_factor": [1.0] * 7}, "7 long factors, not 8"),
    "too many factors": ("phi3", {"scaling__short_factor": [1.0] * 9}, "9 short factors, not 8"),
    "factor of zero": ("phi3", {"scaling__short_factor": [1.0] * 7 + [0]}, "short factor that is not positive"),
    "factor beyond float32": (
        "phi3",
        {"scaling__long_factor": [1e39] * 8},
        "long factor that is not positive and finite",
    ),
    "factor is text": ("phi3", {"scaling__long_factor": ["1"] * 8}, "'long_factor' has the wrong type"),
    "factors are a number": ("phi3", {"scaling__long_factor": 2.0}, "'long_factor' has the wrong type"),
    "attention factor of zero": ("phi3", {"scaling__attention_factor": 0}, "attention factor is 0"),
    "attention factor beyond float": (
        "phi3",
        {"scaling__attention_factor": 10**400},
        "'attention_factor' has the wrong",
    ),
    "separate scales": ("phi3", {"scaling__long_mscale": 1.2}, "unknown key: 'long_mscale'"),
    "partial rotation of phi-3": ("phi3", {"partial_rotary_factor": 0.75}, "'partial_rotary_factor'", "0.75"),
    "biases in phi-3": ("phi3", {"attention_bias": True}, "'attention_bias'", "got: True"),
    "phi-3's window of zero": ("phi3", {"sliding_window": 0}, "'sliding_window' is out of range"),
    "window of zero": ("gpt_oss", {"sliding_window": 0}, "'sliding_window' is out of range"),
    "window of null": ("gpt_oss", {"sliding_window": None}, "'sliding_window' has the wrong type"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_key_is_named(case):
    family, change, *parts = WRONG[case]
    with pytest.raises(CheckpointError) as error:
        read(family, **change)
    for part in (WHERE, *parts):
        assert part in str(error.value)


@pytest.mark.parametrize("family", ["gpt_oss", "llama", "mistral"])
def test_every_key_matters_or_is_known_not_to(family):
    """Removing any key either fails by name, gives another config, or the key is one that does not act."""
    # absent, these mean what the file says
    restated = {"head_dim", "hidden_act", "attention_bias", "mlp_bias", "pretraining_tp", "tie_word_embeddings"}
    restated |= {"experts_per_token", "initial_context_length"}
    whole = read(family)
    for key in values_of(family):
        try:
            same = read(family, **{key: ...}) == whole
        except CheckpointError:
            same = False
        assert not same or key in HARMLESS | restated, key


# --- GGUF metadata ---

SHAPES = {"token_embd.weight": (320, 64), "output.weight": (320, 64), "blk.0.attn_q.bias": (128,)}
GPT_OSS_GGUF = {
    "general.architecture": "gpt-oss",
    "gpt-oss.block_count": 3,
    "gpt-oss.context_length": 1536,
    "gpt-oss.embedding_length": 64,
    "gpt-oss.feed_forward_length": 96,
    "gpt-oss.expert_feed_forward_length": 96,
    "gpt-oss.attention.head_count": 4,
    "gpt-oss.attention.head_count_kv": 2,
    "gpt-oss.attention.key_length": 32,
    "gpt-oss.attention.value_length": 32,
    "gpt-oss.attention.sliding_window": 12,
    "gpt-oss.attention.layer_norm_rms_epsilon": 1e-05,
    "gpt-oss.rope.freq_base": 150000.0,
    "gpt-oss.rope.scaling.type": "yarn",
    "gpt-oss.rope.scaling.factor": 16.0,
    "gpt-oss.rope.scaling.original_context_length": 96,
    "gpt-oss.rope.scaling.yarn_beta_fast": 8.0,
    "gpt-oss.expert_count": 4,
    "gpt-oss.expert_used_count": 2,
}
LLAMA_GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-05,
    "llama.rope.freq_base": 10000.0,
}
SHAPES_OF_LLAMA = {"token_embd.weight": (384, 64), "blk.0.attn_q.weight": (64, 64), "blk.1.attn_q.weight": (64, 64)}
PHI3_GGUF = {
    "general.architecture": "phi3",
    "phi3.block_count": 2,
    "phi3.context_length": 128,
    "phi3.embedding_length": 32,
    "phi3.feed_forward_length": 64,
    "phi3.attention.head_count": 2,
    "phi3.attention.head_count_kv": 1,
    "phi3.attention.layer_norm_rms_epsilon": 1e-05,
    "phi3.attention.sliding_window": 18,
    "phi3.rope.dimension_count": 16,
    "phi3.rope.freq_base": 10000.0,
    "phi3.rope.scaling.original_context_length": 24,
    "phi3.rope.scaling.attn_factor": 1.2356092,  # as float32 has it
}
SHAPES_OF_PHI3 = {"token_embd.weight": (320, 32), "output.weight": (320, 32), "blk.0.attn_qkv.weight": (64, 32)}
SETS = "rope_factors_short.weight", "rope_factors_long.weight"
EIGHT_ONES = np.ones(8, np.float32)


def read_gguf_config(base: dict[str, Any], changes: dict[str, Any] | None = None, factors=None, shapes=SHAPES):
    values = base | (changes or {})
    rope = factors if isinstance(factors, dict) else {} if factors is None else {"rope_freqs.weight": factors}
    return config_from_gguf({k: v for k, v in values.items() if v is not ...}, shapes, rope, "x.gguf")


def test_gguf_gpt_oss_is_the_config_of_hugging_face():
    assert read_gguf_config(GPT_OSS_GGUF) == read("gpt_oss")


def test_gguf_llama():
    config = read_gguf_config(LLAMA_GGUF, factors=np.arange(1, 9, dtype=np.float32), shapes=SHAPES_OF_LLAMA)
    assert config.rope_scaling == FrequencyFactors((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0))
    assert (config.tie_word_embeddings, config.attention_bias, config.vocab_size) == (True, False, 384)
    assert (config.head_dim, config.sliding_window, config.rms_norm_eps) == (16, None, 1e-5)


def test_gguf_yarn_of_a_llama_is_rounded_and_of_gpt_oss_is_not():
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    llama = read_gguf_config(LLAMA_GGUF, yarn | {"llama.rope.scaling.original_context_length": 128})
    assert llama.rope_scaling.truncate is True
    assert read_gguf_config(GPT_OSS_GGUF).rope_scaling.truncate is False


def read_phi3_gguf(changes: dict[str, Any] | None = None, rope=...):
    scaling = read("phi3").rope_scaling
    arrays = [np.array(factors, np.float32) for factors in (scaling.short_factor, scaling.long_factor)]
    rope = dict(zip(SETS, arrays, strict=True)) if rope is ... else rope
    return read_gguf_config(PHI3_GGUF, changes, rope, SHAPES_OF_PHI3)


def test_gguf_phi3_is_the_config_of_hugging_face():
    assert read_phi3_gguf() == read("phi3")


def test_gguf_phi3_of_another_attention_factor_keeps_it():
    assert read_phi3_gguf({"phi3.rope.scaling.attn_factor": 1.2356}).rope_scaling.attention_factor == 1.2356


def test_gguf_phi3_without_factors_is_plain_and_a_window_of_zero_is_none():
    """As the converter writes Phi-3-mini-4k (original context, no scaling) and Phi-4 (no window)."""
    config = read_phi3_gguf({"phi3.attention.sliding_window": 0, "phi3.rope.scaling.attn_factor": ...}, rope={})
    assert config == read("phi3", rope_scaling=None, sliding_window=None)


WRONG_PHI3 = {
    "one set of factors": ({}, {SETS[1]: EIGHT_ONES}, "'rope_factors_short.weight' is missing"),
    "too few": ({}, dict.fromkeys(SETS, EIGHT_ONES[:7]), "7 short factors, not 8"),
    "NaN": ({}, dict.fromkeys(SETS, EIGHT_ONES * np.float32(np.nan)), "not positive and finite"),
    "no attention factor": ({"phi3.rope.scaling.attn_factor": ...}, ..., "attn_factor' is missing"),
    "no original context": (
        {"phi3.rope.scaling.original_context_length": ...},
        ...,
        "original_context_length' is missing",
    ),
    "attention factor without factors": ({}, {}, "attn_factor"),
    "partial rotation": ({"phi3.rope.dimension_count": 12}, ..., "dimension_count", "got: 12"),
    "scaling of another kind": ({"phi3.rope.scaling.type": "yarn"}, ..., "rope.scaling.type", "yarn"),
    "negative window": ({"phi3.attention.sliding_window": -1}, ..., "sliding_window", "out of range"),
}


@pytest.mark.parametrize("case", WRONG_PHI3)
def test_wrong_phi3_metadata_is_named(case):
    change, rope, *parts = WRONG_PHI3[case]
    with pytest.raises(CheckpointError) as error:
        read_phi3_gguf(change, rope)
    for part in ("x.gguf", *parts):
        assert part in str(error.value)


WRONG_GGUF = {
    "architecture": (LLAMA_GGUF, {"general.architecture": "qwen3"}, "unknown architecture", "qwen3"),
    "no architecture": (LLAMA_GGUF, {"general.architecture": ...}, "unknown architecture"),
    "architecture is an array": (LLAMA_GGUF, {"general.architecture": np.array([1, 2])}, "unknown architecture"),
    "no eps": (LLAMA_GGUF, {"llama.attention.layer_norm_rms_epsilon": ...}, "layer_norm_rms_epsilon", "missing"),
    "no layers": (LLAMA_GGUF, {"llama.block_count": ...}, "'llama.block_count' is missing"),
    "no window": (GPT_OSS_GGUF, {"gpt-oss.attention.sliding_window": ...}, "sliding_window", "missing"),
    "text for a number": (LLAMA_GGUF, {"llama.block_count": "2"}, "'llama.block_count' has the wrong type"),
    "heads by layer": (LLAMA_GGUF, {"llama.attention.head_count": np.array([4, 4])}, "head_count", "wrong type"),
    "zero heads": (LLAMA_GGUF, {"llama.attention.head_count": 0}, "head_count", "out of range"),
    "NaN eps": (LLAMA_GGUF, {"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
    "infinite theta": (LLAMA_GGUF, {"llama.rope.freq_base": float("inf")}, "freq_base", "out of range", "inf"),
    "unknown key": (LLAMA_GGUF, {"llama.logit_scale": 2.0}, "unknown metadata: llama.logit_scale"),
    "experts in a Llama": (LLAMA_GGUF, {"llama.expert_count": 8}, "llama.expert_count", "got: 8"),
    "partial rotation": (LLAMA_GGUF, {"llama.rope.dimension_count": 8}, "dimension_count", "got: 8"),
    "values of another size": (LLAMA_GGUF, {"llama.attention.value_length": 8}, "value_length"),
    "vocabulary of another size": (LLAMA_GGUF, {"llama.vocab_size": 100}, "vocab_size", "320"),
    "vocabulary size is an array": (LLAMA_GGUF, {"llama.vocab_size": np.array([320, 320])}, "vocab_size"),
    "pattern by layer": (
        GPT_OSS_GGUF,
        {"gpt-oss.attention.sliding_window_pattern": np.array([True, False, True])},
        "sliding_window_pattern",
    ),
    "scaling unknown": (LLAMA_GGUF, {"llama.rope.scaling.type": "linear"}, "'linear' is unknown"),
    "scaling without factor": (GPT_OSS_GGUF, {"gpt-oss.rope.scaling.factor": ...}, "factor"),
    "scaling factor of zero": (GPT_OSS_GGUF, {"gpt-oss.rope.scaling.factor": 0.0}, "factor"),
}


@pytest.mark.parametrize("case", WRONG_GGUF)
def test_wrong_metadata_is_named(case):
    base, change, *parts = WRONG_GGUF[case]
    with pytest.raises(CheckpointError) as error:
        read_gguf_config(base, change)
    for part in ("x.gguf", *parts):
        assert part in str(error.value)


WRONG_FACTORS = {
    "too few": np.ones(7, np.float32),
    "too many": np.ones(9, np.float32),
    "zero": EIGHT_ONES - np.eye(8, dtype=np.float32)[3],
    "NaN": EIGHT_ONES * np.float32(np.nan),
    "infinite": EIGHT_ONES * np.float32(np.inf),
}


@pytest.mark.parametrize("case", WRONG_FACTORS)
def test_wrong_frequency_factors_are_refused(case):
    with pytest.raises(CheckpointError, match=r"x\.gguf.*rope_freqs\.weight"):
        read_gguf_config(LLAMA_GGUF, factors=WRONG_FACTORS[case])


def test_no_embedding_is_named():
    with pytest.raises(CheckpointError, match=r"'token_embd\.weight' is missing"):
        read_gguf_config(LLAMA_GGUF, shapes={})
