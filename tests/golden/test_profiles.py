"""Profiles of real backends: roundings against outside codecs, and where each emulation departs from the oracle."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import assay.reference as reference
from assay.golden.emulate_llamacpp import OPERAND, _ggml_rope_tables, _RoundedOperands, _summed_in_float16
from assay.golden.emulation import Emulation, with_product
from assay.golden.forced import forced_pass
from assay.golden.noise import PROFILES
from assay.golden.rounding import to_bfloat16, to_float16
from assay.loaders.delegated import DELEGATED
from assay.loaders.gguf_file import GGML_TYPES
from assay.reference.ops import attention_heads, attention_mask, attention_weights
from assay.reference.precision import round_q8
from assay.reference.rope import rope_tables
from assay.reference.taps import default_taps
from assay.reference.weights import Tensor
from tests.checkpoint_files import opened, tokens_of
from tests.golden.faults import GPT_OSS


@given(hnp.arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False)))
def test_16_bit_roundings(x):
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(to_bfloat16(x), x.astype(ml_dtypes.bfloat16).astype(np.float32))
        np.testing.assert_array_equal(to_float16(x), x.astype(np.float16).astype(np.float32))


def test_weights_with_a_product_of_their_own():
    weight = with_product(np.eye(3), lambda x, weight_IO: np.rint(x) @ weight_IO)
    assert (np.array([[0.6, 1.4, 2.0]]) @ weight.T).tolist() == [[1, 1, 2]]
    assert (weight[1] * 2.5).tolist() == [0, 2.5, 0]
    assert type(weight * 1) is np.ndarray


@pytest.mark.parametrize("model", [GPT_OSS, "llama/gguf", "mistral/hf"])
def test_ggml_s_angles_are_the_oracle_s(model):
    config, positions = opened(model).config, np.arange(200)
    for ours, theirs in zip(rope_tables(config, positions, np.dtype(float)), _tables(config, positions), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=200 * 2e-6)
        assert np.abs(theirs - ours).max() > 1e-8


def _tables(config, positions):
    tables = _ggml_rope_tables(config, positions)
    assert tables is not None
    return tables


def test_sums_in_float16_are_attention_with_float16_s_error():
    rng = np.random.default_rng(0)
    scores, v = rng.standard_normal((4, 3, 50)).astype(np.float32), rng.standard_normal((50, 2, 8)).astype(np.float32)
    sinks, mask = rng.standard_normal(4).astype(np.float32), attention_mask(np.arange(47, 50), np.arange(50), 20)
    v = to_float16(v)
    wanted = attention_heads(attention_weights(np.where(mask, scores, 0).astype(float), mask, sinks), v.astype(float))
    error = np.linalg.norm(_summed_in_float16(scores, v, mask, sinks) - wanted) / np.linalg.norm(wanted)
    assert 2**-13 < error < 2**-9


def noise(profile: str, chunks: list[int] | None = None) -> dict[str, float]:
    """Relative noise of each tap of layer 0 of the small gpt-oss in GGUF, nothing forced but what float64 has."""
    checkpoint, tokens = opened("gpt_oss/gguf"), tokens_of("gpt_oss")
    chunks, names = chunks or [len(tokens)], default_taps(opened("gpt_oss/gguf").config)
    exact = forced_pass(checkpoint, tokens, chunks, {}, names)
    noisy = forced_pass(checkpoint, tokens, chunks, exact, names, PROFILES[profile])
    return {
        name.split(".")[-1]: float(np.linalg.norm(noisy[name] - exact[name]) / np.linalg.norm(exact[name]))
        for name in reversed(names)
    }


def test_llama_cpp_rounds_operands_by_the_weights_type_and_the_cache():
    found = noise("llama.cpp")
    assert all(found[tap] < 1e-6 for tap in ("attn_norm", "q_rope", "router_logits", "expert_act", "block_out"))
    assert all(3e-3 < found[tap] < 2e-2 for tap in ("expert_gate", "expert_up", "expert_out"))  # Q8_0 for MXFP4
    assert 2e-4 < found["attn_heads"] < 2e-3  # float16
    without = noise("llama.cpp-float32")
    assert without["attn_heads"] < 1e-6
    assert without["expert_gate"] == found["expert_gate"]


def test_a_float16_cache_rounds_what_attention_reads():
    plain, found = noise("float32"), noise("float32-f16-cache")
    assert {tap for tap in found if found[tap] != plain[tap]} == {"attn_heads"}
    assert 2e-4 < found["attn_heads"] < 1e-3
    assert noise("q8-f16-cache") == noise("q8") | {"attn_heads": found["attn_heads"]}


def test_every_block_format_of_ggml_rounds_its_operands():
    """Also those that gguf-py decodes, whose names here say so; formats of activations are no weights."""
    blocks = {block.name for block in GGML_TYPES.values() if block.elements > 1}
    assert blocks - {"Q8_1", "Q8_K"} <= set(OPERAND)
    weight = Tensor("w", (1, 32), DELEGATED[20], {"blocks": np.full((1, 1, 18), 0x3C, np.uint8)})
    assert weight.encoding.name == "IQ4_NL (by gguf-py)"
    model = _RoundedOperands(opened(GPT_OSS).config, {"w": weight}, np.dtype(np.float64))
    x = np.linspace(-1, 1, 32)[None]
    np.testing.assert_array_equal(x @ model.weight("w").T, round_q8(x) @ weight.decode().astype(float).T)


def test_chunks_change_the_noise_s_kind_only():
    whole, by_one = noise("llama.cpp"), noise("llama.cpp", [1] * 40)
    assert 0.3 < by_one["attn_heads"] / whole["attn_heads"] < 3
    assert by_one["expert_gate"] == pytest.approx(whole["expert_gate"], rel=1e-3)


@pytest.mark.parametrize(
    "profile", ["transformers-bfloat16", "mlx-lm-gpu-bfloat16", "mlx-lm-bfloat16", "openai-torch-bfloat16"]
)
def test_bfloat16_backends_round_more_than_they_store(profile):
    plain, found = noise("bfloat16"), noise(profile)
    assert found["q_rope"] > 1.2 * plain["q_rope"]
    assert found["attn_out"] == plain["attn_out"]


def test_openai_s_metal_kernels_are_float32_with_coarser_exponentials():
    plain, found = noise("float32"), noise("openai-metal")
    assert all(error < 5e-6 for tap, error in found.items() if tap != "attn_norm")
    assert found["q_rope"] > 1.5 * plain["q_rope"]
    assert found["attn_heads"] != plain["attn_heads"]
    assert found["expert_act"] == plain["expert_act"]


def test_profiles_of_backends_name_their_deviations_and_sources():
    deviating = {name: profile.deviations for name, profile in PROFILES.items() if profile.deviations}
    assert deviating == {
        "llama.cpp": ("yarn-ramp-rounded", "yarn-betas-ignored"),
        "llama.cpp-float32": ("yarn-ramp-rounded", "yarn-betas-ignored"),
        "mlx-lm-float32": ("yarn-ramp-rounded",),
        "mlx-lm-bfloat16": ("yarn-ramp-rounded",),
        "mlx-lm-gpu-float32": ("yarn-ramp-rounded",),
        "mlx-lm-gpu-bfloat16": ("yarn-ramp-rounded",),
    }
    plain = {"float64", "float32", "float16", "bfloat16"}
    assert {name for name, profile in PROFILES.items() if not (profile.rounds and profile.sources)} == plain


def test_the_plain_emulation_is_the_oracle():
    checkpoint = opened(GPT_OSS)
    tokens = tokens_of("gpt_oss")
    plain = forced_pass(checkpoint, tokens, [len(tokens)], {}, ["logits"])["logits"]
    assert PROFILES["float64"].emulation is Emulation
    cache = reference.KVCache()
    np.testing.assert_array_equal(plain, reference.forward(checkpoint.model(), np.array(tokens), cache=cache))
