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


# the CPU path's numerics: products in float32 or with inputs rounded to int8; f16: keys and values in float16
CPU_MODES = ("exact", "q8", "exact-f16", "q8-f16")


def products_and_cache(mode: str) -> tuple[str, np.dtype]:
    """What a mode of the CPU path says of the products, `exact` or `q8`, and of the dtype of keys and values.

    Raises ValueError for an unknown mode.
    """
    if mode not in CPU_MODES:
        raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(CPU_MODES)}")
    products, _, cache = mode.partition("-")
    return products, np.dtype(np.float16 if cache else np.float32)


def cache_bytes(config: Config, length: int, dtype: np.dtype) -> int:
    """Bytes of the keys and values of one sequence; a windowed layer keeps as many positions as its window."""
    held = sum(min(length, config.window(i) or length) for i in range(config.num_hidden_layers))
    return held * config.num_key_value_heads * config.head_dim * 2 * dtype.itemsize
