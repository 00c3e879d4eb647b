"""A pattern of an error, and what patterns are fitted to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.golden.places import at

Array = np.ndarray
Change = Callable[[Array], Array]
ENOUGH = 8  # values for each number that is fitted: with fewer, noise could be fitted too
LISTED = 64  # numbers of a pattern that a report holds
SLIGHT = 1e-3  # relative distance within which a number is called by its name


@dataclass(frozen=True)
class Pattern:
    """A change with the numbers that were fitted, and what it says."""

    name: str
    sentence: str
    parameters: dict[str, Any]
    change: Change


@dataclass(frozen=True)
class Seen:
    """A tensor as expected and as it came (finite, float64), and the places on each axis where they differ."""

    axes: str
    expected: Array
    got: Array
    level: float  # root mean square of the noise
    affected: tuple[Array, ...]
    others: Mapping[str, Array]  # further tensors, by tap: some may stand in this one's place
    ids_TA: Array | None = None

    @property
    def block(self) -> tuple[Array, ...]:
        """Index of the places where both differ."""
        return np.ix_(*self.affected)

    def where(self) -> str:
        """The affected places of each axis in words; empty if that is everywhere."""
        sizes = zip(self.axes, self.affected, self.expected.shape, strict=True)
        parts = [at(letter, places, n) for letter, places, n in sizes if len(places) < n]
        return f" at {', '.join(parts)}" if parts else ""

    def within(self, change: Change) -> Change:
        """The change made to the affected block only."""

        def changed(x: Array) -> Array:
            x = x.copy()
            x[self.block] = change(x[self.block])
            return x

        return changed
