"""Distributions on five logits written out exactly, and the loop that draws from them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import assay.reference as reference
from assay.reference.generate import Sampling, generate, penalised, probabilities
from tests.checkpoint_files import expected, opened, tokens_of

# probabilities 1/16, 8/16, 2/16, 4/16, 1/16 of tokens 0 to 4
LOGITS = np.log(np.array([1.0, 8.0, 2.0, 4.0, 1.0]))


def distribution(seen: tuple[int, ...] = (), **settings: float) -> np.ndarray:
    return 16 * probabilities(LOGITS, seen, Sampling(**({"temperature": 1.0} | settings)))  # type: ignore[arg-type]


def test_temperature_one_is_the_softmax():
    np.testing.assert_allclose(distribution(), [1, 8, 2, 4, 1], rtol=1e-14)


@pytest.mark.parametrize(("temperature", "power"), [(0.5, 2), (2.0, 0.5), (1 / 3, 3)])
def test_temperature_divides_the_logits(temperature, power):
    weights = np.array([1.0, 8.0, 2.0, 4.0, 1.0]) ** power
    np.testing.assert_allclose(distribution(temperature=temperature), 16 * weights / weights.sum(), rtol=1e-13)


def test_temperature_zero_is_greedy_with_ties_to_the_lower_id():
    assert distribution(temperature=0.0).tolist() == [0, 16, 0, 0, 0]
    assert probabilities(np.array([1.0, 7.0, 7.0]), (), Sampling()).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("k", "wanted"),
    [
        (0, [1, 8, 2, 4, 1]),
        (1, [0, 16, 0, 0, 0]),
        (2, [0, 32 / 3, 0, 16 / 3, 0]),
        (4, [16 / 15, 128 / 15, 32 / 15, 64 / 15, 0]),  # of the tied tokens 0 and 4 the lower id stays
        (5, [1, 8, 2, 4, 1]),
        (9, [1, 8, 2, 4, 1]),
    ],
)
def test_top_k(k, wanted):
    np.testing.assert_allclose(distribution(top_k=k), wanted, rtol=1e-14)


@pytest.mark.parametrize(
    ("p", "wanted"),
    [
        (1e-9, [0, 16, 0, 0, 0]),  # at least one token always stays
        (0.49, [0, 16, 0, 0, 0]),
        (0.51, [0, 32 / 3, 0, 16 / 3, 0]),  # the token that crosses p is kept
        (0.74, [0, 32 / 3, 0, 16 / 3, 0]),
        (0.76, [0, 64 / 7, 16 / 7, 32 / 7, 0]),
        (0.9, [16 / 15, 128 / 15, 32 / 15, 64 / 15, 0]),
        (1.0, [1, 8, 2, 4, 1]),
    ],
)
def test_top_p(p, wanted):
    np.testing.assert_allclose(distribution(top_p=p), wanted, rtol=1e-14)


def test_top_p_works_on_what_top_k_left():
    """Of the two tokens left (2/3, 1/3), 0.6 keeps one; of all five it would keep two."""
    np.testing.assert_allclose(distribution(top_k=2, top_p=0.6), [0, 16, 0, 0, 0])


def test_top_p_works_after_the_temperature():
    """At temperature 1/2 the first token has 64/86 and passes 0.7 alone; at 1 it does not."""
    assert np.count_nonzero(distribution(temperature=0.5, top_p=0.7)) == 1
    assert np.count_nonzero(distribution(temperature=1.0, top_p=0.7)) == 2


def test_penalty_divides_positive_and_multiplies_negative_logits_once_each():
    got = penalised(np.array([2.0, -2.0, 0.0, 3.0, -3.0]), [0, 0, 0, 1, 2], 4.0)
    assert got.tolist() == [0.5, -8, 0, 3, -3]


def test_penalty_comes_before_the_temperature():
    """ln 8 halves to ln 2^1.5, and the temperature of 1/2 squares that: 8; the others 1, 4, 16, 1."""
    np.testing.assert_allclose(
        distribution((1, 1), repetition_penalty=2.0, temperature=0.5), np.array([1, 8, 4, 16, 1]) * 16 / 30
    )


def test_penalty_of_one_changes_nothing():
    assert penalised(LOGITS, [0, 1, 2, 3, 4], 1.0).tolist() == LOGITS.tolist()


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1),
    repetition_penalty=st.floats(0.5, 2),
)


@given(hnp.arrays(np.float32, 10, elements=st.floats(-30, 30, width=32)), st.lists(st.integers(0, 9)), samplings)
def test_a_distribution_sums_to_one_and_keeps_its_order(logits, seen, sampling):
    p = probabilities(logits, seen, sampling)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert p.min() >= 0
    best = np.argmax(np.where(p > 0, penalised(logits, seen, sampling.repetition_penalty), -np.inf))
    assert p[best] == p.max()  # logits closer than a rounding of exp get equal probabilities
    if sampling.top_k:
        assert np.count_nonzero(p) <= sampling.top_k


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
    ],
)
def test_settings_out_of_range_are_refused_with_all_of_them_named(wrong):
    with pytest.raises(ValueError, match=r"temperature >= 0.*top_k >= 0.*top_p.*repetition_penalty"):
        Sampling(**wrong)


# --- the loop ---


def counting(V: int = 5):
    """A step whose most likely token is the last one plus 1, and a list of what it was fed."""
    fed = []

    def step(new: np.ndarray) -> np.ndarray:
        fed.append(new.tolist())
        return np.eye(V)[(new + 1) % V]

    return step, fed


def test_prompt_goes_in_whole_then_one_token_at_a_time():
    step, fed = counting()
    assert list(generate(step, [3, 0, 1], 4, Sampling())) == [2, 3, 4, 0]
    assert fed == [[3, 0, 1], [2], [3], [4]]


def test_stop_token_ends_and_is_the_last_yielded():
    step, fed = counting()
    assert list(generate(step, [0], 10, Sampling(), frozenset({3}))) == [1, 2, 3]
    assert len(fed) == 3


def test_penalty_sees_the_prompt_and_what_was_generated():
    step = lambda new: np.tile([5.0, 4.0, 3.0, 2.9, 1.0], (len(new), 1))  # noqa: E731
    assert list(generate(step, [0], 3, Sampling(repetition_penalty=10.0))) == [1, 2, 3]


def test_same_seed_same_tokens_and_other_seed_others():
    step = lambda new: np.tile(LOGITS, (len(new), 1))  # noqa: E731
    drawn = [list(generate(step, [0], 50, Sampling(temperature=1.0, seed=seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_draws_follow_the_distribution():
    """4000 draws, each share within five standard deviations; token 2 is never drawn under top-k 2."""
    step = lambda new: np.tile(LOGITS, (len(new), 1))  # noqa: E731
    p = distribution(temperature=1.0) / 16
    drawn = np.bincount(list(generate(step, [0], 4000, Sampling(temperature=1.0))), minlength=5)
    assert np.all(np.abs(drawn - 4000 * p) < 5 * np.sqrt(4000 * p * (1 - p)))
    drawn = np.bincount(list(generate(step, [0], 500, Sampling(temperature=1.0, top_k=2))), minlength=5)
    assert np.flatnonzero(drawn).tolist() == [1, 3]


class AlmostOne:
    """A generator that always draws the largest float below 1."""

    def random(self) -> float:
        return float(np.nextafter(1, 0))


@given(st.integers(0, 2**32))
@settings(max_examples=50, derandomize=True)
def test_the_largest_draw_is_still_a_token_of_the_vocabulary(seed):
    logits = np.random.default_rng(seed).normal(size=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: AlmostOne())
        (token,) = generate(lambda new: logits[None], [0], 1, Sampling(temperature=1.0))
    assert 0 <= token < 1000


@pytest.mark.parametrize("family", ["gpt_oss", "llama", "mistral"])
def test_greedy_with_the_cache_takes_the_most_likely_of_the_whole_sequence(family):
    """The first token is the argmax of transformers' logits; each later one of a fresh pass over everything."""
    model, cache = opened(f"{family}/hf").model(), reference.KVCache()
    prompt = tokens_of(family)
    out = list(generate(lambda new: reference.forward(model, new, cache=cache), prompt, 8, Sampling()))
    assert out[0] == expected(family)["logits"][-1].argmax()
    again = [int(reference.forward(model, np.array(prompt + out[:n]))[-1].argmax()) for n in range(8)]
    assert out == again


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_no_numbers_give_no_token(wrong, temperature):
    with pytest.raises(FloatingPointError, match="1 of 3 logits are NaN or infinite"):
        probabilities(np.array([1, wrong, 2]), [], Sampling(temperature=temperature))


@pytest.mark.filterwarnings("error")
def test_settings_at_the_ends_of_the_floats():
    """The smallest temperature is greedy, the largest draws alike; a penalty can make logits infinite."""
    logits = np.array([3.0, 5.0, -200.0])
    assert probabilities(logits, [], Sampling(temperature=5e-324)).tolist() == [0, 1, 0]
    assert probabilities(logits, [], Sampling(temperature=1e308)) == pytest.approx([1 / 3] * 3)
    assert probabilities(logits, [2], Sampling(temperature=1, repetition_penalty=1e308))[2] == 0
    with pytest.raises(FloatingPointError):
        probabilities(logits, [0], Sampling(repetition_penalty=1e-308))
