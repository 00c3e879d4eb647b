"""Guessing ahead: what is looked up, what is taken, and that the tokens are those without it."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.fast.cpu import CpuModel
from assay.fast.cpu.batch import forward_batch, forward_some
from assay.fast.speculate import Guesses, agreeing, lookup, most_likely, speculate
from assay.reference.generate import Sampling, generate
from tests.fast.models import gpt_oss_config, llama_config, random_model


@pytest.mark.parametrize(
    ("seen", "count", "guessed"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], 2, [9, 8]),
        ([1, 2, 3, 9, 8, 1, 2, 3], 9, [9, 8, 1, 2, 3]),
        ([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3], 1, [4]),  # three tokens that match, before two that stand later
        ([7, 3, 5, 8, 3, 6, 3], 1, [6]),  # of equal matches the last
        ([4, 4], 3, [4]),
        ([1, 2, 3], 3, []),
        ([1], 3, []),
        ([1, 2, 1], 0, []),
    ],
)
def test_lookup(seen, count, guessed):
    assert lookup(seen, count) == guessed


@pytest.mark.parametrize(
    ("guessed", "best", "count"), [([], [5], 0), ([5], [5, 6], 1), ([5, 6], [5, 7, 8], 1), ([4, 5], [5, 4, 5], 0)]
)
def test_agreeing(guessed, best, count):
    assert agreeing(guessed, best) == count


class Automaton:
    """An engine whose next token follows from the last two: it remembers what it was told to keep, and checks that."""

    def __init__(self, V: int, seed: int) -> None:
        self.next = np.random.default_rng(seed).integers(0, V, (V, V))
        self.V, self.past = V, list[int]()

    def check(self, new, keep):
        whole = [0, *self.past, *new.tolist()]
        after = [self.next[a, b] for a, b in pairwise(whole)][-len(new) :]
        logits = np.eye(self.V)[after]
        self.past += new[: keep(logits)].tolist()
        return logits

    def step(self, new):
        return self.check(new, len)


def plain(engine, prompt, count, stop):
    out, new = [], np.array(prompt)
    while len(out) < count and not (out and out[-1] in stop):
        out.append(int(engine.step(new)[-1].argmax()))
        new = np.array(out[-1:])
    return out


@given(
    V=st.integers(2, 6),
    seed=st.integers(0, 99),
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
    count=st.integers(1, 40),
    most=st.integers(0, 7),
    stop=st.sets(st.integers(0, 5), max_size=1),
)
def test_tokens_are_those_of_plain_generation(V, seed, prompt, count, most, stop):
    guesses, engine = Guesses(), Automaton(V, seed)
    out = list(speculate(engine.step, engine.check, prompt, count, most, guesses, frozenset(stop)))
    assert out == plain(Automaton(V, seed), prompt, count, stop)
    assert 0 <= guesses.right <= guesses.tried <= most * guesses.passes
    known = prompt + out
    assert engine.past[: len(known) - 1] == known[: len(engine.past)][: len(known) - 1]  # nothing wrong is remembered


@pytest.mark.parametrize(
    "config",
    [gpt_oss_config(), llama_config(sliding_window=5), llama_config(tie_word_embeddings=False)],
    ids=["oss", "window", "llama"],
)
def test_the_cpu_path_takes_back_what_was_wrong(config):
    """Random models repeat themselves little: guesses are wrong, behind rings that they would have overwritten."""
    model = CpuModel(config, random_model(config, seed=3))
    cache, prompt, guesses = model.new_cache(), [3, 1, 4, 1, 5, 9, 2, 6] * 3, Guesses()
    step = lambda new: forward_batch(model, [new], [cache])  # noqa: E731
    check = lambda new, keep: forward_some(model, new, cache, keep)  # noqa: E731
    out = list(speculate(step, check, prompt, 40, 4, guesses))
    alone, new, want = model.new_cache(), np.array(prompt), []
    for _ in range(40):
        want.append(int(model.forward(new, cache=alone)[-1].argmax()))
        new = np.array(want[-1:])
    assert out == want
    assert guesses.tried > guesses.right


class Losing(Automaton):
    """Logits after `lost` tokens are no numbers."""

    def __init__(self, V: int, seed: int, lost: int, value: float) -> None:
        super().__init__(V, seed)
        self.lost, self.value = lost, value

    def check(self, new, keep):
        start = len(self.past)
        return super().check(new, lambda logits_TV: keep(self.spoilt(logits_TV, start)))

    def spoilt(self, logits_TV, start):
        logits_TV[max(self.lost - start, 0) :, self.V // 2] = self.value
        return logits_TV


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("lost", range(2, 16))
def test_logits_that_are_no_numbers(lost, value):
    """The same tokens before, and the same error, as the oracle's generation, also where they follow guesses."""
    prompt = [0, 1, 0]
    runs = (
        generate(Losing(3, 1, lost, value).step, prompt, 30, Sampling()),
        speculate((engine := Losing(3, 1, lost, value)).step, engine.check, prompt, 30, 4, Guesses()),
    )
    told = []
    for run in runs:
        out = []
        with pytest.raises(FloatingPointError, match="1 of 3 logits are NaN or infinite") as error:
            out.extend(run)  # keeps what came before the error
        told.append((out, str(error.value)))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("logits_TV", "tokens"),
    [
        ([[0, 3, 3], [np.nan, 9, np.inf], [1, np.inf, 0], [-np.inf, 0, 1]], [1, -2, -1, 2]),
        ([[-np.inf, -np.inf]], [0]),
    ],
)
def test_most_likely(logits_TV, tokens):
    assert most_likely(np.float32(logits_TV)) == tokens


def test_acceptance():
    guesses = Guesses()
    assert guesses.acceptance == 0
    guesses.note(4, 3)
    guesses.note(4, 0)
    assert (guesses.acceptance, guesses.passes) == (3 / 8, 2)
