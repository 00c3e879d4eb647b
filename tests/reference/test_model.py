"""The whole oracle: against transformers, across containers, and over any split of a sequence into chunks."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay.reference as reference
from assay.reference.config import Config
from assay.reference.formats import F32
from assay.reference.model import Model
from assay.reference.taps import Recorder, default_taps, tap_table
from assay.reference.weights import Tensor, weight_shapes
from tests.checkpoint_files import expected, opened, tokens_of
from tests.fast.models import gpt_oss_config, llama_config, random_model


def nmse(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sum((got - wanted) ** 2) / np.sum(np.asarray(wanted, np.float64) ** 2))


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def taps_of(model: Model, tokens: list[int], chunks: list[int], names=None) -> dict[str, np.ndarray]:
    recorder, cache, start = Recorder(model.config, names or default_taps(model.config)), reference.KVCache(), 0
    for T in chunks:
        reference.forward(model, np.array(tokens[start : start + T]), cache=cache, tap=recorder)
        start += T
    assert start == len(tokens) == cache.length
    return recorder.values


@functools.cache
def logits_of(name: str) -> np.ndarray:
    return reference.forward(opened(name).model(), np.array(tokens_of(name.split("/")[0])))


# --- against transformers ---


@pytest.mark.parametrize("family", ["gpt_oss", "llama", "mistral", "phi3"])
def test_agrees_with_transformers(family):
    """Logits and hidden states of transformers in float32; what is left is its own rounding."""
    wanted = {name: array for name, array in expected(family).items() if name != "tokens"}
    got = taps_of(opened(f"{family}/hf").model(), tokens_of(family), [40], wanted)
    assert len(wanted) == opened(f"{family}/hf").config.num_hidden_layers + 3
    np.testing.assert_array_equal(got["embed"], wanted["embed"])
    for name, array in wanted.items():
        assert nmse(got[name], array) < (1e-10 if name == "logits" else 1e-11), name


@pytest.mark.parametrize("family", ["gpt_oss", "llama", "mistral", "phi3"])
def test_float32_run_differs_from_float64_by_float32_rounding(family):
    in_float32 = reference.forward(opened(f"{family}/hf").model(np.float32), np.array(tokens_of(family)))
    assert in_float32.dtype == np.float32
    assert 1e-16 < nmse(in_float32, logits_of(f"{family}/hf")) < 1e-11


def test_every_feature_of_the_checkpoint_shows_in_the_numbers():
    """The agreement above would mean little for a feature that does not act."""
    checkpoint, tokens = opened("gpt_oss/hf"), np.array(tokens_of("gpt_oss"))
    config = checkpoint.config
    changed = {
        "window": replace(config, sliding_window=13),
        "layer order": replace(config, layer_types=("full_attention", "sliding_attention", "full_attention")),
        "YaRN rounded": replace(config, rope_scaling=replace(config.rope_scaling, truncate=True)),
        "YaRN factor": replace(config, rope_scaling=replace(config.rope_scaling, attention_factor=1.0)),
        "clamp": replace(config, swiglu_limit=1e9),
        "alpha": replace(config, swiglu_alpha=1.0),
        "experts": replace(config, num_experts_per_tok=1),
        "eps": replace(config, rms_norm_eps=1e-3),
    }
    for what, other in changed.items():
        logits = reference.forward(Model(other, checkpoint.tensors), tokens)
        assert nmse(logits, logits_of("gpt_oss/hf")) > 1e-7, what


# --- one model, three containers ---


def bits(tensor: Tensor) -> np.ndarray:
    return tensor.decode().view(np.uint32)


@pytest.mark.parametrize("container", ["gguf/model.gguf", "mlx"])
def test_gpt_oss_is_the_same_bits_in_every_container(container):
    hf, other = opened("gpt_oss/hf"), opened(f"gpt_oss/{container}")
    assert other.config == hf.config
    assert list(other.tensors) == list(hf.tensors) == list(weight_shapes(hf.config))
    for name, tensor in hf.tensors.items():
        np.testing.assert_array_equal(bits(other.tensors[name]), bits(tensor), err_msg=name)
    assert other.config_sha256 == hf.config_sha256
    assert other.weights_sha256 == hf.weights_sha256


def test_phi3_is_the_same_bits_from_gguf():
    hf, gguf = opened("phi3/hf"), opened("phi3/gguf/model.gguf")
    assert gguf.config == hf.config
    assert (gguf.config_sha256, gguf.weights_sha256) == (hf.config_sha256, hf.weights_sha256)
    np.testing.assert_array_equal(logits_of("phi3/gguf/model.gguf"), logits_of("phi3/hf"))


def test_every_feature_of_phi3_shows_in_the_numbers():
    """On its 40 tokens: those beyond the original context of 24."""
    checkpoint, tokens = opened("phi3/hf"), np.array(tokens_of("phi3"))
    config = checkpoint.config
    longrope = config.rope_scaling
    changed = {
        "window": replace(config, sliding_window=19),
        "long factors": replace(config, rope_scaling=replace(longrope, long_factor=longrope.short_factor)),
        "original context": replace(config, rope_scaling=replace(longrope, original_max_position_embeddings=40)),
        "attention factor": replace(config, rope_scaling=replace(longrope, attention_factor=1.0)),
    }
    for what, other in changed.items():
        logits = reference.forward(Model(other, checkpoint.tensors), tokens)
        assert nmse(logits, logits_of("phi3/hf")) > 1e-4, what


def test_longrope_in_chunks_is_the_same_on_one_side_of_the_switch_only():
    """Keys keep what they were turned with; one call is turned as its last position says."""
    model, tokens = opened("phi3/hf").model(), tokens_of("phi3")
    names = ["logits", "layers.0.k_rope"]
    whole, within = (taps_of(model, tokens[:T], [T], names) for T in (40, 24))
    assert_same_taps(taps_of(model, tokens[:24], [1, 20, 3], names), within)
    assert_same_taps(taps_of(model, tokens, [25, 1, 14], names), whole)
    across = taps_of(model, tokens, [24, 16], names)
    np.testing.assert_array_equal(across["layers.0.k_rope"][:24], within["layers.0.k_rope"])
    np.testing.assert_array_equal(across["layers.0.k_rope"][24:], whole["layers.0.k_rope"][24:])
    assert relative(across["layers.0.k_rope"][:24], whole["layers.0.k_rope"][:24]) > 0.1
    assert nmse(across["logits"][24:], whole["logits"][24:]) > 1e-4


@pytest.mark.parametrize("container", ["gguf/model.gguf", "mlx"])
def test_gpt_oss_logits_agree_to_float64_rounding(container):
    assert relative(logits_of(f"gpt_oss/{container}"), logits_of("gpt_oss/hf")) < 1e-12


def test_llama_gguf_is_the_same_bits_once_the_rope_rows_are_put_back():
    hf, gguf = opened("llama/hf"), opened("llama/gguf/model.gguf")
    for name, tensor in hf.tensors.items():
        np.testing.assert_array_equal(bits(gguf.tensors[name]), bits(tensor), err_msg=name)
    assert gguf.weights_sha256 == hf.weights_sha256
    q = gguf.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert q.layout == ("RoPE rows from neighbour pairs to halves",)
    stored = q.encoding.decode({key: np.swapaxes(part, 1, 2) for key, part in q.parts.items()}).reshape(q.shape)
    assert not np.array_equal(stored, q.decode())  # the file's own order is another one


def test_llama_logits_from_gguf_differ_by_the_rounding_of_its_frequencies_only():
    """GGUF has no words for Llama-3 scaling, only its result: `rope_freqs`, a float32 divisor per pair.

    That is a relative error of 2^-24 of each frequency, so of 39 * 2^-24 = 2.3e-6 rad at the last position.
    """
    difference = relative(logits_of("llama/gguf/model.gguf"), logits_of("llama/hf"))
    assert 0 < difference < 2.3e-6
    hf, gguf = opened("llama/hf").model(), opened("llama/gguf/model.gguf").model()
    logits = reference.forward(Model(hf.config, gguf.tensors), np.array(tokens_of("llama")))
    assert relative(logits, logits_of("llama/hf")) < 1e-12  # with the config of the one, nothing is left


def test_the_head_is_decoded_in_pieces_that_join(monkeypatch):
    monkeypatch.setattr("assay.reference.model.ROWS_AT_A_TIME", 7)
    logits = reference.forward(opened("llama/hf").model(), np.array(tokens_of("llama")))
    assert relative(logits, logits_of("llama/hf")) < 1e-13


def test_a_model_that_may_keep_nothing_computes_the_same():
    checkpoint = opened("gpt_oss/hf")
    model = Model(checkpoint.config, checkpoint.tensors, keep_bytes=0)
    assert relative(reference.forward(model, np.array(tokens_of("gpt_oss"))), logits_of("gpt_oss/hf")) < 1e-13
    assert not model._kept


# --- prefill, chunks, token by token ---

WINDOW = 128
TOKENS = np.random.default_rng(5).integers(0, 101, 300).tolist()


@functools.cache
def small_model(family: str) -> Model:
    """Two layers in memory, float32 weights: gpt-oss one sliding and one full, Mistral two sliding."""
    if family == "gpt_oss":
        config: Config = gpt_oss_config(sliding_window=WINDOW, layers=2)
        assert config.layer_types == ("sliding_attention", "full_attention")
    else:
        config = llama_config(sliding_window=WINDOW)
    return Model(config, random_model(config, seed=3, encoding="F32", experts="F32"))


@functools.cache
def prefill(family: str, T: int) -> dict[str, np.ndarray]:
    return taps_of(small_model(family), TOKENS[:T], [T])


def assert_same_taps(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(got) == list(wanted)
    for name, array in got.items():
        assert array.shape == wanted[name].shape
        assert relative(array, wanted[name]) <= 1e-12, name


@pytest.mark.parametrize("T", [127, 128, 129, 300])
@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_prefill_equals_token_by_token(family, T):
    assert_same_taps(taps_of(small_model(family), TOKENS[:T], [1] * T), prefill(family, T))


@pytest.mark.parametrize("chunks", [[127, 2], [128, 1], [1, 128], [129, 171], [128, 128, 44], [299, 1], [100, 200]])
@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_prefill_equals_chunks_across_the_window(family, chunks):
    T = sum(chunks)
    assert_same_taps(taps_of(small_model(family), TOKENS[:T], chunks), prefill(family, T))


def test_the_window_hides_a_key_of_such_a_sequence():
    """The sequences above are long enough to tell: position 128 no longer sees the first key."""
    model = small_model("gpt_oss")
    weights = taps_of(model, TOKENS[:129], [129], ["layers.0.attn_weights", "layers.1.attn_weights"])
    assert np.all(weights["layers.0.attn_weights"][:, 127, 0] > 0)
    assert np.all(weights["layers.0.attn_weights"][:, 128, 0] == 0)
    assert np.all(weights["layers.1.attn_weights"][:, 128, 0] > 0)


@given(st.lists(st.integers(1, 15), min_size=1, max_size=12))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_prefill_equals_any_chunking_of_a_real_checkpoint(lengths):
    model, tokens = opened("gpt_oss/hf").model(), tokens_of("gpt_oss")
    T = min(sum(lengths), 40)
    chunks = [n for n, before in zip(lengths, np.cumsum([0, *lengths]), strict=False) if before + n <= T]
    chunks += [T - sum(chunks)] * (sum(chunks) < T)
    whole = taps_of(model, tokens[:T], [T], tap_table(model.config))
    pieces = taps_of(model, tokens[:T], chunks, tap_table(model.config))
    np.testing.assert_array_equal(
        [pieces.pop(f"layers.{i}.expert_ids") for i in range(3)],
        [whole.pop(f"layers.{i}.expert_ids") for i in range(3)],
    )
    assert_same_taps(pieces, whole)


# --- stored tensors ---


def test_a_tensor_restricted_before_decoding_is_the_decoded_one_restricted():
    checkpoint = opened("gpt_oss/gguf/model.gguf")
    experts = checkpoint.tensors["model.layers.1.mlp.experts.up_proj.weight"]
    whole = experts.decode()
    np.testing.assert_array_equal(experts[2].decode(), whole[2])
    np.testing.assert_array_equal(experts[1:3].decode(), whole[1:3])
    np.testing.assert_array_equal(experts[np.array([3, 0, 3])].decode(), whole[[3, 0, 3]])
    assert experts[2].shape == (96, 64)
    assert (experts.nbytes, experts.size) == (4 * 96 * 2 * 17, 4 * 96 * 64)


def test_rows_of_a_permuted_tensor_cannot_be_selected():
    q = opened("llama/gguf/model.gguf").tensors["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(ValueError, match="permuted"):
        q[3]


def test_decoding_a_strided_view_gives_its_own_elements():
    values = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    tensor = Tensor("x", (2, 2, 3), F32, {"values": values[:, 1::2]})
    np.testing.assert_array_equal(tensor.decode(), values[:, 1::2])
    assert tensor.decode().flags.c_contiguous
