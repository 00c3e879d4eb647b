"""Sequences in a batch against each of them alone: same bits in mode exact, whatever their lengths."""

import numpy as np
import pytest

from assay.fast.cpu import CpuModel
from assay.fast.cpu.batch import forward_batch, forward_some
from tests.checkpoint_files import CHECKPOINTS, opened
from tests.fast.models import gpt_oss_config, llama_config, random_model

NAMES = sorted(str(p.relative_to(CHECKPOINTS)) for p in CHECKPOINTS.glob("*/*") if p.is_dir())
PROMPTS = (1, 2, 9, 31, 5, 17, 8, 1, 20, 3, 4, 6, 7, 10, 11, 12, 13, 14, 15, 16, 40)


def sequences(V: int, steps: int) -> tuple[list[np.ndarray], np.ndarray]:
    """21 prompts, and the tokens that follow each."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, V, T) for T in PROMPTS], rng.integers(0, V, (steps, len(PROMPTS)))


def together(model: CpuModel, prompts: list[np.ndarray], steps_NB: np.ndarray) -> list[np.ndarray]:
    """Logits [B,V] after the prompts, run as one batch, and after each step."""
    caches = [model.new_cache() for _ in prompts]
    return [forward_batch(model, rows, caches) for rows in (prompts, *steps_NB[:, :, None])]


def alone(model: CpuModel, prompt: np.ndarray, step_N: np.ndarray) -> list[np.ndarray]:
    """The same of one sequence: [V] each."""
    cache = model.new_cache()
    return [model.forward(row, cache=cache)[-1] for row in (prompt, *step_N[:, None])]


def assert_batch_is_one_by_one(model: CpuModel, same_bits: bool) -> None:
    prompts, steps_NB = sequences(model.config.vocab_size, 3)
    batch = together(model, prompts, steps_NB)
    for b in range(0, len(prompts), 2):
        for got, want in zip((logits[b] for logits in batch), alone(model, prompts[b], steps_NB[:, b]), strict=True):
            if same_bits:
                np.testing.assert_array_equal(got, want)
            else:
                assert np.linalg.norm(got - want) < 2e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("name", NAMES)
def test_test_checkpoints(name: str) -> None:
    checkpoint = opened(name)
    assert_batch_is_one_by_one(CpuModel(checkpoint.config, checkpoint.tensors), same_bits=True)


@pytest.mark.parametrize("config", [gpt_oss_config(), llama_config(sliding_window=5, bias=True)], ids=["oss", "llama"])
def test_windows_that_the_sequences_cross_at_different_steps(config) -> None:
    assert_batch_is_one_by_one(CpuModel(config, random_model(config, seed=2)), same_bits=True)


def test_a_float16_cache() -> None:
    config = gpt_oss_config()
    assert_batch_is_one_by_one(CpuModel(config, random_model(config, seed=2), mode="exact-f16"), same_bits=True)


def test_caches_of_two_types_are_refused() -> None:
    """The kernel takes all of them for the first one's."""
    config = gpt_oss_config()
    tensors = random_model(config, seed=2)
    exact, half = (CpuModel(config, tensors, mode=mode) for mode in ("exact", "exact-f16"))
    with pytest.raises(ValueError, match="caches of one type: float16, float32"):
        forward_batch(exact, [np.array([1]), np.array([2])], [exact.new_cache(), half.new_cache()])


@pytest.mark.parametrize("kept", [0, 1, 3, 14])
def test_of_a_pass_only_some_tokens_stay(kept: int) -> None:
    """Fourteen more are more than the 16 slots of a window of five can spare: the ring is unrolled for them."""
    config = llama_config(sliding_window=5)
    model = CpuModel(config, random_model(config, seed=2))
    token_T = np.random.default_rng(3).integers(0, config.vocab_size, 30)
    some, plain = model.new_cache(), model.new_cache()
    model.forward(token_T[:7], cache=some)
    forward_some(model, token_T[7:21], some, lambda logits: kept)
    model.forward(token_T[: 7 + kept], cache=plain)
    for token in token_T[21:]:
        got, want = (model.forward([token], cache=cache) for cache in (some, plain))
        np.testing.assert_array_equal(got, want)


def test_q8_agrees_within_its_own_rounding() -> None:
    """Sums are taken in another order for one column than for many, which may turn the rounding of an input."""
    config = gpt_oss_config()
    tensors = random_model(config, 4, "Q8_0", "MXFP4_BLOCKS")
    assert_batch_is_one_by_one(CpuModel(config, tensors, mode="q8"), same_bits=False)


def test_a_batch_of_one_is_the_last_row() -> None:
    config = llama_config()
    model = CpuModel(config, random_model(config, seed=3))
    tokens = np.arange(30)
    got = forward_batch(model, [tokens], [model.new_cache()])
    np.testing.assert_array_equal(got, model.forward(tokens)[-1:])


def test_what_is_no_batch() -> None:
    config = llama_config()
    model = CpuModel(config, random_model(config, seed=3))
    cache, other = model.new_cache(), CpuModel(gpt_oss_config(), random_model(gpt_oss_config(), seed=3)).new_cache()
    row = np.array([1])
    for rows, caches in (([row], []), ([], []), ([row, row], [cache, cache])):
        with pytest.raises(ValueError, match=f"{len(rows)} rows, {len(caches)} caches"):
            forward_batch(model, rows, caches)
    with pytest.raises(ValueError, match="another configuration"):
        forward_batch(model, [row], [other])
    with pytest.raises(ValueError, match="token id 101 at position 0"):
        forward_batch(model, [row, np.array([101])], [cache, model.new_cache()])
    with pytest.raises(ValueError, match="513 tokens in all: the model's context holds 512"):
        forward_batch(model, [row, np.ones(513, int)], [cache, model.new_cache()])
    assert cache.length == 0
