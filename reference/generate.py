"""Choosing tokens: greedy or sampled, one step at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from assay.reference.config import Config, LongRopeScaling

Step = Callable[[np.ndarray], np.ndarray]  # tokens [T] that follow what was seen -> logits [T,V]
PastT = TypeVar("PastT")


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits, applied in this order (as transformers and vLLM do).

    repetition_penalty: logits of tokens already seen are divided by it if positive, multiplied if negative
    (Keskar et al. 2019, arXiv:1909.05858, made sign-safe); temperature 0 means greedy: the largest logit,
    ties to the lower id; top_k keeps the k largest (0: all); top_p keeps the smallest set of most likely
    tokens whose probability reaches p, the token that crosses it included (Holtzman et al. 2020).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        finite = math.isfinite(self.temperature) and math.isfinite(self.repetition_penalty)
        good = self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and self.repetition_penalty > 0
        if not (finite and good):
            raise ValueError(
                "sampling needs finite temperature >= 0, top_k >= 0, 0 < top_p <= 1, repetition_penalty > 0; got "
                f"{self.temperature}, {self.top_k}, {self.top_p}, {self.repetition_penalty}"
            )


def probabilities(logits_V: np.ndarray, seen: Sequence[int], sampling: Sampling) -> np.ndarray:
    """The distribution that a token is drawn from, float64 [V]; all of it on one token where greedy.

    Raises FloatingPointError for logits, after the penalty, that are NaN or plus infinity: there is none then.
    """
    logits = penalised(logits_V, seen, sampling.repetition_penalty)
    if wrong := np.count_nonzero(np.isnan(logits) | (logits == np.inf)):
        raise FloatingPointError(f"{wrong} of {len(logits)} logits are NaN or infinite")
    if sampling.temperature == 0:
        return np.eye(1, len(logits), int(np.argmax(logits)))[0]
    order = np.argsort(-logits, kind="stable")  # most likely first, ties to the lower id
    if 0 < sampling.top_k < len(order):
        order = order[: sampling.top_k]
    with np.errstate(over="ignore"):  # far below the largest: no probability is left
        p = np.exp((logits[order] - logits[order[0]]) / sampling.temperature)
    p /= p.sum()
    reached_before = np.cumsum(p) - p  # a token stays if those before it have not reached top_p
    p = np.where(reached_before < sampling.top_p, p, 0)
    result = np.zeros(len(logits))
    result[order] = p / p.sum()
    return result


def penalised(logits_V: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """Logits, float64 [V], with the tokens already seen made less likely; each once, however often seen."""
    logits = np.array(logits_V, np.float64)
    ids = np.unique(np.asarray(seen, np.int64))
    with np.errstate(over="ignore"):
        logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return logits


def crosses_long_rope(config: Config, past: int, T: int) -> bool:
    """Whether T tokens after a past within LongRoPE's original context reach beyond it, where the factors change."""
    scaling = config.rope_scaling
    return isinstance(scaling, LongRopeScaling) and 0 < past <= scaling.original_max_position_embeddings < past + T


def remembering(run: Callable[[np.ndarray, PastT], np.ndarray], new_cache: Callable[[], PastT], config: Config) -> Step:
    """A step over `run(tokens, cache)`, which keeps the cache from one to the next.

    Keys that were turned by LongRoPE's short factors do not go with queries turned by the long ones: where these set
    in, everything is run again, as transformers does (Phi3ForCausalLM.prepare_inputs_for_generation).
    """
    seen: list[int] = []
    cache = new_cache()

    def step(new: np.ndarray) -> np.ndarray:
        nonlocal cache
        again = crosses_long_rope(config, len(seen), len(new))
        seen.extend(new.tolist())
        if again:
            cache = new_cache()
            return run(np.array(seen), cache)[-len(new) :]
        return run(new, cache)

    return step


def generate(
    step: Step, prompt: Sequence[int], max_tokens: int, sampling: Sampling, stop: frozenset[int] = frozenset()
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that continue the prompt, ending after one of `stop`.

    `step` runs tokens through an engine that remembers those before. The same seed gives the same tokens
    for the same logits.
    """
    rng = np.random.default_rng(sampling.seed)
    seen = list(prompt)
    new = np.asarray(prompt, np.int64)
    for _ in range(max_tokens):
        reached_V = np.cumsum(probabilities(step(new)[-1], seen, sampling))
        # the last entry is the total as summed here: p.sum() can round higher, and a draw would fall beyond the end
        token = int(np.searchsorted(reached_V, rng.random() * reached_V[-1], side="right"))
        yield token
        if token in stop:
            return
        seen.append(token)
        new = np.array([token])
