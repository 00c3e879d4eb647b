"""Rotary frequencies against the oracle, which shares no code, and against transformers."""

from dataclasses import replace

import numpy as np
import pytest

from assay.fast.cpu.rope import rotary_frequencies, rotary_tables
from assay.loaders.config import longrope_attention_factor
from assay.reference.config import FrequencyFactors, Llama3Scaling, LongRopeScaling, YarnScaling
from assay.reference.rope import inverse_frequencies, rope_tables
from tests.fast.models import llama_config

YARN = YarnScaling(32.0, 32.0, 1.0, 4096, False, 1.3465735902799727)
LLAMA3 = Llama3Scaling(32.0, 1.0, 4.0, 8192)
LONGROPE = LongRopeScaling(tuple(np.linspace(1, 3, 32)), tuple(np.geomspace(1, 60, 32)), 4096, 1.19)
SCALINGS = {
    "plain": None,
    "llama3": LLAMA3,
    "llama3 of a short context": replace(LLAMA3, original_max_position_embeddings=64),
    "yarn": YARN,
    "yarn, rounded": replace(YARN, truncate=True),
    "yarn, ramp from below 0": replace(YARN, original_max_position_embeddings=32),
    "yarn, ramp past the last pair": replace(YARN, original_max_position_embeddings=2**22),
    "yarn, ramp past twice as many": replace(YARN, original_max_position_embeddings=2**39),
    "yarn without width": replace(YARN, beta_slow=32.0),
    "factors": FrequencyFactors(tuple(np.linspace(1, 40, 32))),
}


def config_of(scaling, head_dim=64, theta=150000.0):
    """A Llama config; only its RoPE matters."""
    return replace(llama_config(rope_scaling=scaling), head_dim=head_dim, rope_theta=theta)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies(name):
    config = config_of(SCALINGS[name])
    want = inverse_frequencies(64, 150000.0, config.rope_scaling)
    np.testing.assert_allclose(rotary_frequencies(config), want, rtol=1e-13)


def test_truncate_is_honoured():
    """gpt-oss: pairs 9 to 17 differ between the exact ramp and the rounded one, and no others."""
    exact, rounded = (np.array(rotary_frequencies(config_of(replace(YARN, truncate=t)))) for t in (False, True))
    np.testing.assert_array_equal(np.flatnonzero(~np.isclose(exact, rounded, rtol=1e-12)), np.arange(9, 18))


@pytest.mark.parametrize(("end", "factors"), [(1, "short"), (4096, "short"), (4097, "long"), (131072, "long")])
def test_longrope(end, factors):
    """The long factors from one position beyond the original context on; both as the oracle has them."""
    config = config_of(LONGROPE)
    got = np.array(rotary_frequencies(config, end))
    np.testing.assert_allclose(got, inverse_frequencies(64, 150000.0, LONGROPE, end), rtol=1e-13)
    divisors = getattr(LONGROPE, f"{factors}_factor")
    np.testing.assert_allclose(got, np.array(rotary_frequencies(config_of(None))) / divisors, rtol=1e-13)


@pytest.mark.parametrize(("start", "T"), [(0, 4096), (4000, 96), (4000, 97), (4096, 1), (100_000, 3)])
def test_longrope_tables(start, T):
    """The end of the chunk decides for all of it."""
    config = config_of(LONGROPE)
    want = rope_tables(config, np.arange(start, start + T), np.dtype(np.float64))
    for got, exact in zip(rotary_tables(config, start, T), want, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-7)


@pytest.mark.parametrize("name", ["plain", "llama3", "yarn"])
def test_tables(name):
    """Rounded once, at any position; YaRN's factor included."""
    config = config_of(SCALINGS[name])
    for start in (0, 1000, 100_000):
        want = rope_tables(config, np.arange(start, start + 3), np.dtype(np.float64))
        for got, exact in zip(rotary_tables(config, start, 3), want, strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, exact, atol=1e-7)


@pytest.mark.peers
@pytest.mark.parametrize("truncate", [False, True])
def test_yarn_against_transformers(truncate):
    from transformers import GptOssConfig as HfConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": truncate,
    }
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](HfConfig(head_dim=64, rope_parameters=parameters), "cpu")
    ours = rotary_frequencies(config_of(replace(YARN, truncate=truncate)))
    np.testing.assert_allclose(ours, frequencies.numpy(), rtol=1e-6)
    assert factor == pytest.approx(YARN.attention_factor, rel=1e-12)


@pytest.mark.peers
def test_llama3_against_transformers():
    from transformers import LlamaConfig as HfConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](HfConfig(head_dim=64, rope_parameters=parameters), "cpu")
    ours = rotary_frequencies(config_of(LLAMA3, theta=500000.0))
    np.testing.assert_allclose(ours, frequencies.numpy(), rtol=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("length", [4096, 4097])
def test_longrope_against_transformers(length):
    from transformers import Phi3Config as HfConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "longrope",
        "rope_theta": 150000.0,
        "short_factor": list(LONGROPE.short_factor),
        "long_factor": list(LONGROPE.long_factor),
    }
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 131072}
    theirs = HfConfig(**sizes, original_max_position_embeddings=4096, rope_parameters=parameters)
    frequencies, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=length)
    np.testing.assert_allclose(rotary_frequencies(config_of(LONGROPE), length), frequencies.numpy(), rtol=1e-6)
    assert factor == pytest.approx(longrope_attention_factor(32.0, 4096), rel=1e-15)
