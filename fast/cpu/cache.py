"""Keys and values of past positions: a ring on windowed layers, a growing array on the others."""

import numpy as np

from assay.reference.config import Config

NO_WINDOW = 1 << 62  # a window that never hides a key
FIRST_CAPACITY = 64  # positions; doubled when full


class LayerCache:
    """Position s lies in slot s % capacity of `k` and `v`, float32 [capacity,K,C].

    A windowed layer's capacity is its window; on any other layer it stays above the length, and the
    slot is the position itself.
    """

    def __init__(self, window: int | None, K: int, C: int) -> None:
        self.window = NO_WINDOW if window is None else window
        self.length = 0
        capacity = FIRST_CAPACITY if window is None else window
        self.k, self.v = np.empty((2, capacity, K, C), np.float32)

    def append(self, k_TKC: np.ndarray, v_TKC: np.ndarray) -> None:
        """Keep a chunk's keys and values: all of them, or as many of the last as the window holds."""
        end = self.length + len(k_TKC)
        if self.window == NO_WINDOW:
            self._reserve(end)
        kept = min(len(k_TKC), len(self.k))
        slots = np.arange(end - kept, end) % len(self.k)
        self.k[slots], self.v[slots] = k_TKC[len(k_TKC) - kept :], v_TKC[len(v_TKC) - kept :]
        self.length = end

    def _reserve(self, length: int) -> None:
        capacity = len(self.k)
        while capacity < length:
            capacity *= 2
        if capacity > len(self.k):
            grown = np.empty((2, capacity, *self.k.shape[1:]), np.float32)
            grown[:, : self.length] = self.k[: self.length], self.v[: self.length]
            self.k, self.v = grown


class CpuCache:
    """The past of one sequence on every layer."""

    def __init__(self, config: Config) -> None:
        self.config = config
        K, C = config.num_key_value_heads, config.head_dim
        self.layers = [LayerCache(config.window(i), K, C) for i in range(config.num_hidden_layers)]

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[-1].length
