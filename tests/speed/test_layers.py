"""Each type of layer alone, on weights of released shapes: attention over a past, experts, the dense feed-forward."""

import numpy as np
import pytest

from assay.fast.cpu import CpuModel
from assay.fast.cpu.engine import attention, dense, mixture_of_experts
from assay.fast.cpu.rope import rotary_tables
from tests.speed.conftest import Load, Time
from tests.speed.work import layer_work

pytestmark = pytest.mark.speed

MODES = ("exact", "q8")
GPT_OSS, SMOLLM2 = "gpt-oss-20b, 2 layers", "smollm2-135m"


def unseen(name: str, array: np.ndarray) -> np.ndarray:
    return array


def inputs(model: CpuModel, T: int) -> np.ndarray:
    return np.random.default_rng(T).normal(size=(T, model.config.hidden_size)).astype(np.float32)


@pytest.mark.parametrize("past", [0, 1000])
@pytest.mark.parametrize("T", [1, 64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "layer"), [(GPT_OSS, 0), (GPT_OSS, 1), (SMOLLM2, 0)])
def test_attention(
    time: Time, cpu_model: Load, quick: bool, name: str, layer: int, mode: str, T: int, past: int
) -> None:
    """Layer 0 of gpt-oss has a window of 128 positions, layer 1 none."""
    model = cpu_model(name, mode)
    cache, config = model.new_cache(), model.config
    if past:
        model.forward(np.arange(min(past, 100 if quick else past)) % config.vocab_size, cache=cache)
    x_TD, weights = inputs(model, T), model._weights.layers[layer]
    tables = rotary_tables(config, cache.length, T)
    y_TD, _ = time(
        lambda: attention(x_TD, weights, config, tables, cache.layers[layer], unseen),
        **layer_work([weights.q, weights.k, weights.v, weights.o], T),
    )
    assert np.isfinite(y_TD).all()


@pytest.mark.parametrize("T", [1, 20, 64, 256])
@pytest.mark.parametrize("mode", MODES)
def test_experts(time: Time, cpu_model: Load, mode: str, T: int) -> None:
    model = cpu_model(GPT_OSS, mode)
    x_TD, weights, config = inputs(model, T), model._weights.layers[0], model.config
    seen: dict[str, np.ndarray] = {}
    mixture_of_experts(x_TD, weights, config, lambda name, array: seen.setdefault(name, array))
    used = len(np.unique(seen["expert_ids"]))
    y_TD = time(
        lambda: mixture_of_experts(x_TD, weights, config, unseen),
        **layer_work([weights.gate, weights.up, weights.down], T * config.num_experts_per_tok, used),
    )
    assert np.isfinite(y_TD).all()


@pytest.mark.parametrize("T", [1, 64, 256])
@pytest.mark.parametrize("mode", MODES)
def test_dense(time: Time, cpu_model: Load, mode: str, T: int) -> None:
    model = cpu_model(SMOLLM2, mode)
    x_TD, weights = inputs(model, T), model._weights.layers[0]
    y_TD = time(lambda: dense(x_TD, weights, unseen), **layer_work([weights.gate, weights.up, weights.down], T))
    assert np.isfinite(y_TD).all()
