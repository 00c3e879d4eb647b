"""Whole models through MLX against the oracle in float64: taps, chunks, batches, decoding."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

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

pytestmark = pytest.mark.peers

CONFIGS = {
    "llama, biases, own head": llama_config(tie_word_embeddings=False, bias=True),
    "llama, window 5": llama_config(sliding_window=5),
    "gpt-oss, window 8": gpt_oss_config(),
    "gpt-oss, window 5, rounded ramp, one expert": replace(
        gpt_oss_config(sliding_window=5, experts_per_tok=1), rope_scaling=replace(YARN, truncate=True)
    ),
}


def model_of(config, seed=1, mode="float32", encoding="F32", experts="MXFP4"):
    from assay.fast.metal import MetalModel

    tensors = random_model(config, seed, encoding, experts)
    return MetalModel(config, tensors, mode), tensors


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", [[1], [40], [7, 8, 1, 1, 23], [1] * 40, [3, 37]], ids=str)
def test_every_tap(name, chunks):
    """All of the table but the attention matrices, in its order; fewer and more pairs than are sorted by expert."""
    config = CONFIGS[name]
    model, tensors = model_of(config)
    tokens = tokens_of(config, sum(chunks))
    logits, taps = traced(model, tokens, chunks)
    np.testing.assert_array_equal(taps["logits"], logits)
    assert_taps_match(taps, oracle_taps(config, tensors, tokens))


@pytest.mark.parametrize(
    ("encoding", "experts"),
    [("BF16", "MXFP4"), ("Q8_0", "MXFP4_BLOCKS"), ("affine8", "affine4"), ("F16", "BF16"), ("Q4_1", "Q4_0")],
)
def test_encodings(encoding, experts):
    config = gpt_oss_config()
    model, tensors = model_of(config, 4, "float32", encoding, experts)
    tokens = tokens_of(config, 12)
    assert error(model.forward(tokens), oracle_taps(config, tensors, tokens)["logits"]) < ALLOWANCE


def test_what_is_decoded_is_said():
    config = gpt_oss_config()
    assert model_of(config, mode="bfloat16", encoding="BF16")[0].notices == ()
    assert model_of(config, mode="bfloat16", encoding="Q8_0", experts="MXFP4_BLOCKS")[0].notices == ()
    assert model_of(config, mode="bfloat16", encoding="F16", experts="Q4_0")[0].notices == (
        "F16 decoded to float32: 17 tensors",
    )


def test_quantised_weights_stay_quantised():
    import mlx.core as mx

    from assay.fast.metal.linear import Panels, Plain, Quantised
    from assay.fast.metal.ops import on_cpu

    config = gpt_oss_config()
    model, tensors = model_of(config, mode="bfloat16", encoding="BF16")
    layer = model._weights.layers[0]
    assert isinstance(layer.gate.matrix, Quantised)
    assert (
        layer.gate.matrix.weight.nbytes == tensors["model.layers.0.mlp.experts.gate_proj.weight"].parts["blocks"].nbytes
    )
    if on_cpu():
        assert isinstance(layer.q.matrix, Panels)
        assert layer.q.matrix.weight.dtype == mx.float32
    else:
        assert isinstance(layer.q.matrix, Plain)
        assert layer.q.matrix.weight.nbytes == tensors["model.layers.0.self_attn.q_proj.weight"].nbytes


@pytest.mark.parametrize("chunks", [[16], [17], [10, 6, 1, 5], [16, 24], [1] * 20], ids=str)
def test_longrope_in_chunks(chunks):
    from assay.fast.metal import MetalModel

    assert_longrope_in_chunks(MetalModel, chunks)


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
def test_looking_changes_nothing(mode):
    config = gpt_oss_config()
    model, _ = model_of(config, mode=mode)
    tokens = tokens_of(config, 40)
    np.testing.assert_array_equal(traced(model, tokens, [40])[0], model.forward(tokens))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
def test_greedy_is_the_most_likely_token_each_time(name, mode):
    """Past the window, with the device a step ahead."""
    config = CONFIGS[name]
    model, _ = model_of(config, mode=mode)
    prompt, cache, expected = tokens_of(config, 6), model.new_cache(), []
    new = prompt
    for _ in range(12):
        expected.append(int(model.forward(new, cache=cache)[-1].argmax()))
        new = np.array(expected[-1:])
    assert list(islice(model.greedy(prompt), 12)) == expected


def test_a_batch_is_its_sequences():
    config = gpt_oss_config(sliding_window=5)
    model, _ = model_of(config)
    tokens = np.stack([tokens_of(config, 14, seed) for seed in range(3)])
    cache = model.new_cache()
    logits = np.concatenate(
        [model.forward_batch(tokens[:, a:b], cache=cache) for a, b in ((0, 9), (9, 10), (10, 14))], 1
    )
    for row, got in zip(tokens, logits, strict=True):
        assert error(got, model.forward(row)) < ALLOWANCE


def test_a_greedy_batch_is_its_sequences():
    config = gpt_oss_config(sliding_window=5)
    model, _ = model_of(config)
    tokens = np.stack([tokens_of(config, 6, seed) for seed in range(3)])
    together = np.stack(list(islice(model.greedy_batch(tokens), 10)), axis=1)
    np.testing.assert_array_equal(together, [list(islice(model.greedy(row), 10)) for row in tokens])


def test_greedy_ends_where_the_context_does():
    """As many tokens as `forward` can give one after the other."""
    config = replace(gpt_oss_config(sliding_window=5), max_position_embeddings=12)
    model, _ = model_of(config)
    prompt, cache, expected = tokens_of(config, 8), model.new_cache(), []
    new = prompt
    while cache.length + len(new) <= 12:
        expected.append(int(model.forward(new, cache=cache)[-1].argmax()))
        new = np.array(expected[-1:])
    assert list(model.greedy(prompt)) == expected
    assert len(expected) == 5
    assert len(list(model.greedy(tokens_of(config, 12)))) == 1


def test_bad_batches_and_modes():
    from assay.fast.metal import MetalModel

    model, tensors = model_of(gpt_oss_config(sliding_window=5))
    for run in (model.forward_batch, model.greedy_batch):
        with pytest.raises(ValueError, match=r"sequences of one length, got lengths \[1, 2\]"):
            run([[1, 2], [3]])
        with pytest.raises(ValueError, match=r"sequences of one length, got lengths \[\]"):
            run(np.zeros((0, 3), int))
    cache = model.new_cache()
    model.forward_batch(np.ones((3, 4), int), cache=cache)
    for T in (1, 4):
        with pytest.raises(ValueError, match="the cache holds 3 sequences, got tokens of 2"):
            model.forward_batch(np.ones((2, T), int), cache=cache)
        with pytest.raises(ValueError, match="the cache holds 3 sequences, got tokens of 1"):
            model.forward(np.ones(T, int), cache=cache)
    assert cache.length == 4
    with pytest.raises(ValueError, match="unknown mode 'float16': expected one of float32, bfloat16"):
        MetalModel(model.config, tensors, "float16")


def test_taps_are_read_only_and_a_failed_pass_leaves_the_cache_as_it_was():
    config = gpt_oss_config(sliding_window=5)
    model, _ = model_of(config)
    tokens = tokens_of(config, 14)

    def fail(name, array):
        assert not array.flags.writeable
        if name == "layers.2.attn_out":
            raise KeyError(name)

    cache = model.new_cache()
    expected = traced(model, tokens, [7, 1, 6])[0]
    model.forward(tokens[:7], cache=cache)
    for T in (7, 1):
        with pytest.raises(KeyError):
            model.forward(tokens[7 : 7 + T], cache=cache, tap=fail)
        assert cache.length == 7
    np.testing.assert_array_equal(model.forward(tokens[7:8], cache=cache), expected[7:8])
    np.testing.assert_array_equal(model.forward(tokens[8:], cache=cache), expected[8:])


def test_two_sequences_share_a_model():
    config = llama_config(sliding_window=5)
    model, _ = model_of(config)
    tokens, one, two = tokens_of(config, 20), model.new_cache(), model.new_cache()
    for t in range(10):
        first = model.forward(tokens[t : t + 1], cache=one)
        model.forward(tokens[10 + t : 11 + t], cache=two)
    assert error(first, model.forward(tokens[:10])[-1:]) < ALLOWANCE


def test_bad_input():
    """Token ids, caches and weights: one message each, before anything runs."""
    from assay.fast.metal import MetalModel

    config = llama_config()
    model, tensors = model_of(config)
    with pytest.raises(ValueError, match="token id 101 at position 1: the vocabulary has ids 0 to 100"):
        model.forward(np.array([3, 101]))
    with pytest.raises(ValueError, match="token id -1 at position 0"):
        model.greedy(np.array([-1]))
    with pytest.raises(ValueError, match="token id 101 at position 1"):
        model.greedy_batch(np.array([[3, 4], [5, 101]]))
    cache = model.new_cache()
    model.forward(np.arange(3), cache=cache)
    with pytest.raises(ValueError, match="513 tokens in all: the model's context holds 512"):
        model.forward(np.ones(510, int), cache=cache)
    with pytest.raises(ValueError, match="another configuration"):
        model.forward(np.array([1]), cache=model_of(gpt_oss_config())[0].new_cache())
    assert_refuses_bad_weights(MetalModel, config, tensors)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What a GPU is given, on the CPU: weights as stored, MLX's own RMSNorm, products in the mode's dtype."""
    from assay.fast.metal import linear, ops, shares, weights

    for module in (linear, ops, shares, weights):
        monkeypatch.setattr(module, "on_cpu", lambda: False)


@pytest.mark.parametrize(
    ("name", "encoding", "experts"),
    [
        ("llama, biases, own head", "F32", "F32"),
        ("llama, window 5", "BF16", "BF16"),
        ("gpt-oss, window 8", "BF16", "MXFP4"),
        ("gpt-oss, window 8", "affine8", "affine4"),
        ("gpt-oss, window 8", "Q8_0", "MXFP4_BLOCKS"),
        ("gpt-oss, window 8", "F16", "BF16"),
    ],
)
def test_what_a_gpu_is_given(as_on_a_gpu, name, encoding, experts):
    config = CONFIGS[name]
    model, tensors = model_of(config, 4, "float32", encoding, experts)
    tokens = tokens_of(config, 40)
    _, taps = traced(model, tokens, [7, 8, 1, 1, 23])
    assert_taps_match(taps, oracle_taps(config, tensors, tokens))


def test_what_a_gpu_is_given_in_bfloat16(as_on_a_gpu):
    """Measured 0.011; MLX's CPU adds up plain products in float32, as its GPUs do."""
    config = CONFIGS["llama, window 5"]
    model, tensors = model_of(config, 1, "bfloat16", "BF16")
    tokens = tokens_of(config, 40)
    assert error(model.forward(tokens), oracle_taps(config, tensors, tokens)["logits"]) < 2.0**-5
