"""Whole models on the CPU path against the oracle in float64: every tap, any chunking, any encoding."""

from dataclasses import replace

import numpy as np
import pytest

from assay.fast.cpu import CpuModel
from assay.reference import Model, forward
from assay.reference.config import Llama3Scaling
from assay.reference.precision import round_q8
from assay.reference.taps import tap_table
from tests.fast.cpu.poison import poisoned
from tests.fast.engines import (
    ALLOWANCE,
    assert_longrope_in_chunks,
    assert_refuses_bad_weights,
    assert_taps_match,
    error,
    oracle_taps,
    tokens_of,
    traced,
)
from tests.fast.models import YARN, gpt_oss_config, llama_config, random_model

CONFIGS = {
    "llama": llama_config(),
    "llama, window 5, biases, own head": llama_config(sliding_window=5, tie_word_embeddings=False, bias=True),
    "llama, window 8, llama-3 rope": llama_config(sliding_window=8, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
    "gpt-oss, window 8": gpt_oss_config(),
    "gpt-oss, window 5, rounded ramp, one expert": replace(
        gpt_oss_config(sliding_window=5, experts_per_tok=1), rope_scaling=replace(YARN, truncate=True)
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("T", [1, 40])
def test_every_tap(name, T):
    """All of the table but the attention matrices that a fused kernel does not form."""
    config = CONFIGS[name]
    tensors, tokens = random_model(config, seed=1), tokens_of(config, T)
    logits, taps = traced(CpuModel(config, tensors), tokens, [T])
    heavy = [tap for tap, spec in tap_table(config).items() if spec.heavy]
    assert set(taps) == set(tap_table(config)) - set(heavy)
    np.testing.assert_array_equal(taps["logits"], logits)
    assert_taps_match(taps, oracle_taps(config, tensors, tokens))


@pytest.mark.parametrize("chunks", [[16], [17], [40], [10, 6, 1, 5], [16, 24], [1] * 20])
def test_longrope_in_chunks(chunks):
    assert_longrope_in_chunks(CpuModel, chunks)


@pytest.mark.parametrize("name", CONFIGS)
def test_random_activations_reach_every_branch(name):
    """Otherwise the test above would say less than it seems to: both clamps engage, tokens differ in experts."""
    config = CONFIGS[name]
    taps = oracle_taps(config, random_model(config, seed=1), tokens_of(config, 40))
    if "layers.0.expert_gate" in taps:
        assert (taps["layers.0.expert_gate"] > config.swiglu_limit).any()
        assert (np.abs(taps["layers.0.expert_up"]) > config.swiglu_limit).any()
        assert len(np.unique(taps["layers.0.expert_ids"])) > config.num_experts_per_tok


@pytest.mark.parametrize("mode", ["exact", "exact-f16"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", [[1] * 40, [7, 8, 9, 16], [5, 5, 1, 29], [3, 37], [39, 1]])
def test_any_chunking_gives_the_same_bits(name, chunks, mode):
    """Across ring boundaries: chunks shorter and longer than the window, ends on it and beside it."""
    config = CONFIGS[name]
    model, tokens = CpuModel(config, random_model(config, seed=2), mode=mode), tokens_of(config, 40)
    (logits, taps), (whole_logits, whole_taps) = traced(model, tokens, chunks), traced(model, tokens, [40])
    np.testing.assert_array_equal(logits, whole_logits)
    for tap, expected in whole_taps.items():
        np.testing.assert_array_equal(taps[tap], expected, err_msg=tap)


@pytest.mark.parametrize("T", [127, 128, 129, 300])
def test_the_window_of_gpt_oss(T):
    """128 positions: a prompt against the oracle, and its end token by token."""
    config = gpt_oss_config(sliding_window=128, layers=2)
    tensors, tokens = random_model(config, seed=3), tokens_of(config, T)
    model = CpuModel(config, tensors)
    logits, taps = traced(model, tokens, [T])
    assert_taps_match(taps, oracle_taps(config, tensors, tokens))
    np.testing.assert_array_equal(traced(model, tokens, [T - 4, 1, 1, 1, 1])[0], logits)


@pytest.mark.parametrize(
    ("encoding", "experts"),
    [("BF16", "MXFP4"), ("Q8_0", "MXFP4_BLOCKS"), ("affine8", "affine4"), ("F16", "BF16"), ("Q4_1", "Q4_0")],
)
def test_encodings(encoding, experts):
    """Weights as the containers have them, experts another encoding than the rest."""
    config = gpt_oss_config()
    tensors, tokens = random_model(config, 4, encoding, experts), tokens_of(config, 12)
    assert_taps_match(traced(CpuModel(config, tensors), tokens, [12])[1], oracle_taps(config, tensors, tokens))


class RoundsItsInput:
    """A weight matrix for products x @ W.T that rounds x first."""

    __array_ufunc__ = None

    def __init__(self, weight):
        self.weight, self.T = weight, self

    def __rmatmul__(self, x):
        return round_q8(x) @ self.weight.T


class RoundingModel(Model):
    """The oracle of mode q8: inputs of products with weights in blocks or groups are rounded."""

    def weight(self, name, part=None):
        array = super().weight(name, part)
        return array if self.tensors[name].encoding.name in ("F32", "F16", "BF16") else RoundsItsInput(array)


def forced_errors(model, tokens, taps, cache=np.float32):
    """The error of each tap when the oracle computes it from the engine's own earlier taps, its cache in a dtype."""
    errors = {}

    def force(name, array):
        if name not in taps:
            return array
        errors[name] = error(taps[name], array)
        return taps[name].astype(cache if name.endswith((".k_rope", ".v")) else np.float32).astype(array.dtype)

    forward(model, tokens, tap=force)
    return errors


def forced_error(config, tensors, tokens, taps):
    """The largest error of a tap of mode q8."""
    return max(forced_errors(RoundingModel(config, tensors), tokens, taps).values())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", [[40], [1] * 40])
def test_a_float16_cache_is_the_oracle_with_rounded_keys_and_values(name, chunks):
    """And the rounding is there, in the output of attention alone."""
    config = CONFIGS[name]
    tensors, tokens = random_model(config, seed=1), tokens_of(config, 40)
    _, taps = traced(CpuModel(config, tensors, mode="exact-f16"), tokens, chunks)
    assert max(forced_errors(Model(config, tensors), tokens, taps, np.float16).values()) < ALLOWANCE
    without = forced_errors(Model(config, tensors), tokens, taps)
    assert {tap.split(".")[-1] for tap, error in without.items() if error > ALLOWANCE} == {"attn_heads"}


def test_a_float16_cache_grows_and_turns():
    """Beyond the first capacity, and token by token over the end of a ring."""
    config = gpt_oss_config(sliding_window=128, layers=2)
    tensors, tokens = random_model(config, seed=3), tokens_of(config, 300)
    model = CpuModel(config, tensors, mode="exact-f16")
    logits, taps = traced(model, tokens, [300])
    assert max(forced_errors(Model(config, tensors), tokens, taps, np.float16).values()) < ALLOWANCE
    np.testing.assert_array_equal(traced(model, tokens, [60, *[1] * 140, 100])[0], logits)


Q8_ENCODINGS = [
    ("BF16", "MXFP4"), ("Q8_0", "MXFP4_BLOCKS"), ("affine8", "affine4"), ("F16", "Q4_0"), ("Q4_1", "Q4_0")
]  # fmt: skip


@pytest.mark.parametrize(("encoding", "experts"), Q8_ENCODINGS)
@pytest.mark.parametrize("chunks", [[1], [3], [40], [30, 1, 1, 3, 5], [1] * 9])
def test_q8_is_the_oracle_with_rounded_inputs(encoding, experts, chunks):
    """Each step, from the engine's own values, to float32's accuracy: far below what the rounding itself does."""
    config = gpt_oss_config()
    tensors, tokens = random_model(config, 4, encoding, experts), tokens_of(config, sum(chunks))
    _, taps = traced(CpuModel(config, tensors, mode="q8"), tokens, chunks)
    assert forced_error(config, tensors, tokens, taps) < ALLOWANCE
    _, exact = traced(CpuModel(config, tensors), tokens, chunks)
    assert forced_error(config, tensors, tokens, exact) > 100 * ALLOWANCE


def test_q8_of_a_dense_model():
    config = replace(llama_config(sliding_window=5), head_dim=32)  # 6 x 32 inputs of o_proj: whole blocks
    tensors, tokens = random_model(config, 4, "Q4_1"), tokens_of(config, 20)
    model = CpuModel(config, tensors, mode="q8")
    logits, taps = traced(model, tokens, [20])
    assert forced_error(config, tensors, tokens, taps) < ALLOWANCE
    np.testing.assert_array_equal(model.forward(tokens), logits)


def test_q8_with_any_number_of_threads():
    config = gpt_oss_config()
    tensors, tokens = random_model(config, 4, "Q8_0", "MXFP4_BLOCKS"), tokens_of(config, 11)
    one, two = (CpuModel(config, tensors, mode="q8", threads=n).forward(tokens) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_unknown_mode():
    config = llama_config()
    with pytest.raises(ValueError, match="unknown mode 'int4': expected one of exact, q8, exact-f16, q8-f16"):
        CpuModel(config, random_model(config, seed=9), mode="int4")


def test_results_do_not_depend_on_threads_or_taps():
    config = gpt_oss_config()
    tensors, tokens = random_model(config, seed=5), tokens_of(config, 9)
    untraced = CpuModel(config, tensors).forward(tokens)
    np.testing.assert_array_equal(CpuModel(config, tensors, threads=1).forward(tokens), untraced)
    np.testing.assert_array_equal(traced(CpuModel(config, tensors), tokens, [9])[0], untraced)


def test_taps_are_read_only_and_kept_intact():
    """What a tap was handed still holds at the end of the pass."""
    config = gpt_oss_config()
    model, tokens, copies, kept = CpuModel(config, random_model(config, seed=6)), tokens_of(config, 9), {}, {}

    def look(name, array):
        assert not array.flags.writeable
        copies[name], kept[name] = array.copy(), array

    cache = model.new_cache()
    model.forward(tokens, cache=cache, tap=look)
    model.forward(tokens, cache=cache)
    for name, array in kept.items():
        np.testing.assert_array_equal(array, copies[name], err_msg=name)


@pytest.mark.parametrize("mode", ["exact", "q8", "q8-f16"])
@pytest.mark.parametrize("config", [gpt_oss_config(), replace(llama_config(sliding_window=5), head_dim=32)])
def test_nothing_is_read_before_it_is_written(config, mode):
    """Every array that a model, its cache and its workspace are made of holds NaN, or wild numbers, at first."""
    tensors, tokens = random_model(config, 4, "Q8_0", "MXFP4_BLOCKS"), tokens_of(config, 20)

    def run():
        return traced(CpuModel(config, tensors, mode=mode), tokens, [1, 1, 7, 1, 9, 1])

    (logits, taps), (want_logits, want_taps) = poisoned(run), run()
    np.testing.assert_array_equal(logits, want_logits)
    for name, want in want_taps.items():
        assert np.isfinite(want).all()
        np.testing.assert_array_equal(taps[name], want, err_msg=name)


def test_a_failed_pass_leaves_the_cache_as_it_was():
    config = gpt_oss_config(sliding_window=5)
    model, tokens = CpuModel(config, random_model(config, seed=7)), tokens_of(config, 12)

    def fail(name, array):
        if name == "layers.2.attn_out":
            raise KeyError(name)

    cache = model.new_cache()
    model.forward(tokens[:7], cache=cache)
    with pytest.raises(KeyError):
        model.forward(tokens[7:], cache=cache, tap=fail)
    assert cache.length == 7
    np.testing.assert_array_equal(model.forward(tokens[7:], cache=cache), model.forward(tokens)[7:])


def test_two_sequences_share_a_model():
    config = llama_config(sliding_window=5)
    model, tokens = CpuModel(config, random_model(config, seed=8)), tokens_of(config, 20)
    one, two = model.new_cache(), model.new_cache()
    for t in range(10):
        first = model.forward(tokens[t : t + 1], cache=one)
        model.forward(tokens[10 + t : 11 + t], cache=two)
    np.testing.assert_array_equal(first, model.forward(tokens[:10])[-1:])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([3, 101, 5], "token id 101 at position 1: the vocabulary has ids 0 to 100"),
        ([-1], "token id -1 at position 0"),
        ([], "non-empty row of integers"),
        ([[1, 2]], "non-empty row of integers"),
        ([1.0], "non-empty row of integers"),
    ],
)
def test_bad_tokens(tokens, message):
    config = llama_config()
    with pytest.raises(ValueError, match=message):
        CpuModel(config, random_model(config, seed=9)).forward(np.array(tokens))


def test_more_tokens_than_the_context_holds():
    config = replace(llama_config(), max_position_embeddings=20)
    model = CpuModel(config, random_model(config, seed=9))
    cache = model.new_cache()
    model.forward(np.arange(19), cache=cache)
    model.forward(np.array([3]), cache=cache)
    with pytest.raises(ValueError, match="21 tokens in all: the model's context holds 20"):
        model.forward(np.array([3]), cache=cache)
    assert cache.length == 20


def test_cache_of_another_model():
    config = llama_config()
    other = CpuModel(gpt_oss_config(), random_model(gpt_oss_config(), seed=9)).new_cache()
    with pytest.raises(ValueError, match="another configuration"):
        CpuModel(config, random_model(config, seed=9)).forward(np.array([1]), cache=other)


def test_missing_and_misshapen_weights():
    assert_refuses_bad_weights(CpuModel, llama_config(), random_model(llama_config(), seed=9))
