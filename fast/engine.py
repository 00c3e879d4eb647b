"""What every fast path offers: `assay.golden` and `assay.cli` drive an engine through these and nothing else."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np

from assay.reference.config import Config

# Handed each exposed tap (names and axes of `assay.reference.taps`); what it answers is ignored, and the
# array is read-only and never written again. What a fused kernel does not expose is simply not handed over.
Observer = Callable[[str, np.ndarray], object]


def unobserved(name: str, array: np.ndarray) -> None:
    """The observer that looks at nothing."""


class Cache(Protocol):
    """The past of one sequence, kept by an engine."""

    @property
    def length(self) -> int:
        """Positions held."""
        ...


OwnCache = TypeVar("OwnCache", bound=Cache)


class Engine(Protocol[OwnCache]):
    """A model that is ready to run."""

    config: Config

    def new_cache(self) -> OwnCache:
        """An empty cache for one sequence."""
        ...

    def forward(self, tokens: np.ndarray, *, cache: OwnCache | None = None, tap: Observer | None = None) -> np.ndarray:
        """Logits, float32 [T,V], of T tokens that follow those in the cache, which grows by them.

        Raises ValueError for token ids that the vocabulary does not have.
        """
        ...


def cache_bytes(config: Config, length: int) -> int:
    """Bytes of the float32 keys and values of one sequence; a windowed layer keeps as many positions as its window."""
    held = sum(min(length, config.window(i) or length) for i in range(config.num_hidden_layers))
    return held * config.num_key_value_heads * config.head_dim * 2 * 4
