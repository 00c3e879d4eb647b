"""The MLX path on MLX's default device: prompts, single tokens and batches, against limits that MLX measures there."""

import functools
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from assay.fast.metal import MetalModel
from tests.speed.conftest import Open, Time
from tests.speed.limits import best
from tests.speed.work import token_work

pytestmark = pytest.mark.speed

NAMES = ["gpt-oss-20b, 2 layers", "smollm2-135m"]
MODES = ["float32", "bfloat16"]
STEPS = 16


@pytest.fixture(scope="module")
def device_limits(quick: bool) -> tuple[float, float]:
    """Bytes a second that a sum reads; operations a second of a square product in bfloat16."""
    if quick:
        return 1.0, 1.0
    values = mx.ones(1 << 27, mx.float32)
    matrix = mx.ones((2048, 2048), mx.bfloat16 if mx.default_device().type == mx.gpu else mx.float32)
    return values.nbytes / best(lambda: mx.eval(values.sum())), 2 * 2048**3 / best(lambda: mx.eval(matrix @ matrix))


@pytest.fixture(scope="module")
def metal_model(checkpoint: Open) -> Callable[[str, str], MetalModel]:
    """A synthetic checkpoint in the MLX path: name, mode. One at a time, for a device may not hold two."""

    @functools.lru_cache(maxsize=1)
    def loaded(name: str, mode: str) -> MetalModel:
        opened = checkpoint(name)
        return MetalModel(opened.config, opened.tensors, mode)

    return loaded


@pytest.mark.parametrize("T", [64, 256])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_prefill(time: Time, benchmark, checkpoint: Open, metal_model, device_limits, name, mode, T) -> None:
    """Logits of every position."""
    model = metal_model(name, mode)
    tokens = np.arange(T) % model.config.vocab_size
    logits_TV = time(lambda: model.forward(tokens), tokens=T, seconds=2)
    note_share(benchmark, 0, T * token_work(checkpoint(name))[1], device_limits)
    assert np.isfinite(logits_TV).all()


@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_decode(time: Time, benchmark, checkpoint: Open, metal_model, device_limits, name, mode, B) -> None:
    """Sixteen tokens of each of B sequences, each step one pass."""
    model = metal_model(name, mode)
    nbytes, operations = token_work(checkpoint(name))
    cache = model.new_cache()
    model.forward_batch(np.ones((B, 8), np.int64), cache=cache)
    logits = []

    def decode() -> None:
        for _ in range(STEPS):
            logits.append(model.forward_batch(np.ones((B, 1), np.int64), cache=cache))

    time(decode, tokens=B * STEPS, rounds=5)
    note_share(benchmark, STEPS * nbytes, B * STEPS * operations, device_limits)
    assert np.isfinite(logits[-1]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_load(time: Time, checkpoint: Open, name: str, mode: str) -> None:
    """From the open file to a model that has run one token."""
    opened = checkpoint(name)
    logits_1V = time(lambda: MetalModel(opened.config, opened.tensors, mode).forward(np.array([1])), rounds=3)
    assert np.isfinite(logits_1V).all()


def note_share(benchmark, nbytes: float, operations: float, limits: tuple[float, float]) -> None:
    """The device's limits and the share that was reached; nothing in quick mode."""
    if benchmark.stats is not None:
        least = max(nbytes / limits[0], operations / limits[1])
        benchmark.extra_info["share of limit"] = least / benchmark.stats.stats.median
        benchmark.extra_info["device GB/s"], benchmark.extra_info["device GOP/s"] = (1e-9 * rate for rate in limits)
