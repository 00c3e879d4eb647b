"""Driving a fast engine and comparing what it shows with the oracle in float64."""

import numpy as np
import pytest

from assay.loaders.errors import CheckpointError
from assay.reference import Model, forward
from assay.reference.cache import KVCache
from assay.reference.config import LongRopeScaling
from assay.reference.taps import default_taps
from assay.reference.weights import Tensor
from tests.fast.models import llama_config, random_model

LONGROPE = llama_config(rope_scaling=LongRopeScaling((1.0,) * 10, tuple(np.geomspace(2, 30, 10)), 16, 1.2))

# Norm of a tap's error over the norm of the tap. A float32 operation on data of size 1 rounds by about 0.3 U
# in the mean, U = 2^-24; about 10 stages a layer lie one after the other, and errors of independent stages
# add up as a root of the sum of squares: 3 layers make some 6 U to 10 U. The activation and the router's
# softmax magnify by small factors. 2^-19 is 32 U; the largest seen over many seeds is 11 U in Numba (`act` of
# Llama), 13 U in MLX.
ALLOWANCE = 2.0**-19


def tokens_of(config, T, seed=0):
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, T)


def traced(model, tokens, chunks):
    """Logits and taps of a pass in chunks; taps joined along T, which is their first axis."""
    seen, logits, cache, start = {}, [], model.new_cache(), 0
    for T in chunks:
        keep = lambda name, array: seen.setdefault(name, []).append(array)  # noqa: E731
        logits.append(model.forward(tokens[start : start + T], cache=cache, tap=keep))
        start += T
    assert cache.length == start == len(tokens)
    return np.concatenate(logits), {name: np.concatenate(parts) for name, parts in seen.items()}


def oracle_taps(config, tensors, tokens):
    """The oracle's taps in float64, but for the heavy ones."""
    taps, names = {}, default_taps(config)

    def keep(name, array):
        if name in names:
            taps[name] = array
        return array

    forward(Model(config, tensors), tokens, tap=keep)
    return taps


def error(got, expected):
    """||got - expected|| / ||expected||."""
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def assert_taps_match(got, want):
    """The same taps in the same order, expert ids equal, all else within the allowance."""
    assert list(got) == list(want)
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        if name.endswith("expert_ids"):
            np.testing.assert_array_equal(got[name], expected, err_msg=name)
        else:
            assert got[name].dtype == np.float32
            assert error(got[name], expected) < ALLOWANCE, f"{name}: {error(got[name], expected) / 2**-24:.1f} U"


def assert_longrope_in_chunks(model_class, chunks):
    """Where the long factors set in between chunks, keys cached before stay as they were turned: as in the oracle."""
    tensors, tokens = random_model(LONGROPE, seed=1), tokens_of(LONGROPE, sum(chunks))
    cache, pieces = KVCache(), np.split(tokens, np.cumsum(chunks)[:-1])
    want = np.concatenate([forward(Model(LONGROPE, tensors), piece, cache=cache) for piece in pieces])
    assert error(traced(model_class(LONGROPE, tensors), tokens, chunks)[0], want) < ALLOWANCE


def assert_refuses_bad_weights(model_class, config, tensors):
    """Missing and misshapen weights are refused at load, by name: kernels check no bounds."""
    name = "model.layers.1.mlp.up_proj.weight"
    up = tensors.pop(name)
    with pytest.raises(CheckpointError, match=rf"{name}: tensor missing"):
        model_class(config, tensors)
    tensors[name] = Tensor(name, up.shape[::-1], up.encoding, {"values": up.parts["values"].T})
    with pytest.raises(CheckpointError, match=r"expected: \[160, 96\]\n  got: \[96, 160\]"):
        model_class(config, tensors)
