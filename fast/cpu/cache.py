"""Keys and values of past positions: a ring on windowed layers, a growing array on the others.

They are kept in float32, or rounded to float16, to nearest even; what is beyond its range, from 65520 on, becomes
infinity, as in llama.cpp's cache.
"""

from typing import Any, NamedTuple

import numpy as np

from assay.reference.config import Config

NO_WINDOW = 1 << 62  # a window that never hides a key
LANES = 16  # keys side by side: a vector holds the scores of so many
FLOAT32 = np.dtype(np.float32)
FIRST_CAPACITY = 64  # positions; doubled when full; a multiple of LANES, as every capacity is


class Slots(NamedTuple):
    """Keys [B,K,C,16] and values [16 B,K,C] as kernels take them, bytes: of float16 where `half` is true."""

    k: np.ndarray
    v: np.ndarray
    blocks: int
    heads: int
    half: bool


class KeysValues(NamedTuple):
    """Keys [B,K,C,16] and values [16 B,K,C]: position s lies in slot (s - start) % capacity.

    Keys stand in blocks of 16 slots, so that one vector operation serves the scores of 16 of them.
    """

    k: np.ndarray
    v: np.ndarray
    start: int

    def put(self, position_T: np.ndarray, k_TKC: np.ndarray, v_TKC: np.ndarray) -> None:
        """Write keys and values of some positions."""
        slots = (position_T - self.start) % len(self.v)
        with np.errstate(over="ignore"):
            if len(slots) == 1:  # the same, faster
                self.k[slots[0] // LANES, :, :, slots[0] % LANES], self.v[slots[0]] = k_TKC[0], v_TKC[0]
                return
            self.k[slots // LANES, :, :, slots % LANES], self.v[slots] = k_TKC, v_TKC

    def get(self, position_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of some positions, [T,K,C] each."""
        slots = (position_T - self.start) % len(self.v)
        return self.k[slots // LANES, :, :, slots % LANES], self.v[slots]

    def in_bytes(self) -> Slots:
        """The same memory, for kernels."""
        k, v = (array.reshape(-1).view(np.uint8) for array in (self.k, self.v))
        return Slots(k, v, len(self.k), self.v.shape[1], self.v.dtype == np.float16)


def empty_slots(positions: int, K: int, C: int, dtype: np.dtype, start: int = 0) -> KeysValues:
    """Room for so many positions, rounded up to whole blocks."""
    blocks = -(-positions // LANES)
    return KeysValues(np.empty((blocks, K, C, LANES), dtype), np.empty((blocks * LANES, K, C), dtype), start)


class LayerCache:
    """The slots of one layer: a windowed layer's hold at least its window, any other's stay above its length."""

    def __init__(self, window: int | None, K: int, C: int, dtype: np.dtype = FLOAT32) -> None:
        self.window = NO_WINDOW if window is None else window
        self.length = 0
        self.slots = empty_slots(FIRST_CAPACITY if window is None else window, K, C, dtype)

    def past(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of all positions, of a windowed layer of the window's last, [S,K,C] each.

        Of a ring the oldest is one that no later query sees; a chunk that is not counted may have overwritten it.
        """
        return self.slots.get(np.arange(max(0, self.length - self.window), self.length))

    def _first(self) -> int:
        return max(0, self.length + 1 - self.window)  # the window counts the query's own position

    def append(self, k_TKC: np.ndarray, v_TKC: np.ndarray) -> None:
        """Keep a chunk's keys and values: all of them, or as many of the last as the window holds."""
        end = self.length + len(k_TKC)
        self.reserve(end)
        kept = min(len(k_TKC), self.window)
        self.slots.put(np.arange(end - kept, end), k_TKC[len(k_TKC) - kept :], v_TKC[len(v_TKC) - kept :])
        self.length = end

    def with_chunk(self, k_TKC: np.ndarray, v_TKC: np.ndarray) -> KeysValues:
        """Slots that also hold a chunk's positions, and all that its queries see; the cache's length stays.

        The chunk is written behind what the cache holds, where no later query misses what was there. Where it is
        longer than a ring has slots to spare, the ring is unrolled instead.
        """
        end, first = self.length + len(k_TKC), self._first()
        self.reserve(end)
        slots = self.slots
        if self.window != NO_WINDOW and end - first > len(slots.v):
            start = first // LANES * LANES
            _, K, C = slots.v.shape
            slots = empty_slots(end - start, K, C, slots.v.dtype, start)
            slots.put(np.arange(first, self.length), *self.slots.get(np.arange(first, self.length)))
        slots.put(np.arange(self.length, end), k_TKC, v_TKC)
        return slots

    def reserve(self, length: int) -> None:
        """Make room for so many positions; a ring has it."""
        capacity = len(self.slots.v)
        if self.window != NO_WINDOW or capacity >= length:
            return
        while capacity < length:
            capacity *= 2
        _, K, C = self.slots.v.shape
        grown = empty_slots(capacity, K, C, self.slots.v.dtype)
        grown.k[: len(self.slots.k)], grown.v[: len(self.slots.v)] = self.slots.k, self.slots.v
        self.slots = grown


class CpuCache:
    """The past of one sequence on every layer, in float32 or float16."""

    def __init__(self, config: Config, dtype: np.dtype = FLOAT32) -> None:
        self.config, self.dtype = config, dtype
        K, C = config.num_key_value_heads, config.head_dim
        self.layers = [LayerCache(config.window(i), K, C, dtype) for i in range(config.num_hidden_layers)]
        self.workspace: Any = None  # what a pass over one token writes, made by the first

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[-1].length

    def count_one(self) -> None:
        """Keep the one token whose keys and values were written behind those held, where they stay."""
        for layer in self.layers:
            layer.length += 1
