"""Greedy generation that guesses: tokens that followed the same words before are run together, and checked.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): no second model. A guess is taken only where
it is the most likely token, so that the tokens are those of plain greedy generation if an engine's logits do not depend
on how tokens are cut into chunks: the CPU path's do not in mode `exact`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LONGEST_MATCH = 3  # tokens before a guess that must have been seen in this order; shorter ones are tried after

Step = Callable[[np.ndarray], np.ndarray]  # tokens [T] that follow what was seen -> logits [T,V]
Keep = Callable[[np.ndarray], int]
# tokens [T] after those seen -> logits [T,V]; of the tokens as many are remembered as the function says of the logits
Check = Callable[[np.ndarray, Keep], np.ndarray]


@dataclass
class Guesses:
    """How many tokens were guessed, and how many of them right; `passes` through the model after the prompt's."""

    tried: int = 0
    right: int = 0
    passes: int = 0

    def note(self, tried: int, right: int) -> None:
        """Count a pass."""
        self.tried, self.right, self.passes = self.tried + tried, self.right + right, self.passes + 1

    @property
    def acceptance(self) -> float:
        """The share of guesses that were right."""
        return self.right / self.tried if self.tried else 0.0


def lookup(seen: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the last few tokens where these stood last, the longest match first."""
    tokens = np.asarray(seen)
    for length in range(min(LONGEST_MATCH, len(tokens) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], length)
        places = np.flatnonzero((windows == tokens[-length:]).all(axis=1))
        if len(places):
            start = places[-1] + length
            return tokens[start : start + count].tolist()
    return []


def speculate(
    step: Step,
    check: Check,
    prompt: Sequence[int],
    max_tokens: int,
    most: int,
    guesses: Guesses,
    stop: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield what greedy generation yields (ties to the lower id), with up to `most` guesses a pass.

    `step` runs the prompt in the engine that `check` goes on with. Ends after `max_tokens` or one of `stop`.
    Raises FloatingPointError, as greedy generation does, after the last token whose logits are numbers.
    """
    seen, left = [*prompt], max_tokens
    logits_TV = step(np.asarray(prompt, np.int64))
    V, (following,) = logits_TV.shape[1], most_likely(logits_TV[-1:])
    while True:
        if following < 0:
            raise FloatingPointError(f"{-following} of {V} logits are NaN or infinite")
        yield following
        left -= 1
        if following in stop or not left:
            return
        seen.append(following)
        guessed, best = lookup(seen, min(most, left - 1)), list[int]()

        def keep(logits_TV: np.ndarray, guessed: list[int] = guessed, best: list[int] = best) -> int:
            best.extend(most_likely(logits_TV))
            return 1 + agreeing(guessed, best)

        check(np.array([following, *guessed]), keep)
        right = agreeing(guessed, best)
        guesses.note(len(guessed), right)
        for token in guessed[:right]:
            yield token
            left -= 1
            if token in stop:
                return
        seen += guessed[:right]
        following = best[right]


def most_likely(logits_TV: np.ndarray) -> list[int]:
    """The token of the largest logit a row, ties to the lower id; -n where n logits are NaN or plus infinity."""
    ids_T = logits_TV.argmax(axis=-1)
    for i, largest in enumerate(logits_TV[np.arange(len(ids_T)), ids_T]):
        if np.isnan(largest) or largest == np.inf:  # argmax finds these first
            ids_T[i] = -np.count_nonzero(np.isnan(logits_TV[i]) | (logits_TV[i] == np.inf))
    return ids_T.tolist()


def agreeing(guessed: Sequence[int], best: Sequence[int]) -> int:
    """How many guesses, from the first on, are the most likely token."""
    return next(
        (i for i, (guess, token) in enumerate(zip(guessed, best, strict=False)) if guess != token), len(guessed)
    )
