"""Whole models of released shapes: prompts and single tokens. The limit is that of the weights alone."""

import numpy as np
import pytest

from tests.speed.conftest import Load, Open, Time
from tests.speed.work import token_work

pytestmark = pytest.mark.speed

NAMES = ["gpt-oss-20b, 2 layers", "smollm2-135m"]
MODES = ["exact", "q8"]
STEPS = 16


@pytest.mark.parametrize("T", [64, 256])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_prefill(time: Time, checkpoint: Open, cpu_model: Load, name: str, mode: str, T: int) -> None:
    """Logits of every position, as `forward` gives them."""
    model = cpu_model(name, mode)
    tokens = np.arange(T) % model.config.vocab_size
    _, operations = token_work(checkpoint(name))
    logits_TV = time(lambda: model.forward(tokens), operations=T * operations, quantised=mode == "q8", tokens=T)
    assert np.isfinite(logits_TV).all()


@pytest.mark.parametrize("past", [8, 1000])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_decode(time: Time, checkpoint: Open, cpu_model: Load, quick: bool, name: str, mode: str, past: int) -> None:
    """Sixteen greedy tokens, one by one, after a past of so many."""
    model, logits = cpu_model(name, mode), []
    nbytes, operations = token_work(checkpoint(name))
    cache = model.new_cache()
    model.forward(np.arange(min(past, 100 if quick else past)) % model.config.vocab_size, cache=cache)

    def decode() -> None:
        token = 1
        for _ in range(STEPS):
            logits.append(model.forward(np.array([token]), cache=cache)[-1])
            token = int(logits[-1].argmax())

    time(decode, nbytes=STEPS * nbytes, operations=STEPS * operations, quantised=mode == "q8", tokens=STEPS, rounds=5)
    assert np.isfinite(logits[-1]).all()
