"""Keys and values of past positions on the device: rings on windowed layers, growing arrays on the others."""

import mlx.core as mx
import numpy as np

from assay.reference.config import Config

STEP = 256  # positions by which an array grows

KeysValues = tuple[mx.array, mx.array]


class LayerCache:
    """Position s lies in slot s % window of k and v [B,K,capacity,C], or in slot s where there is no window.

    What `extend` writes counts once `commit` is called; until then it lies in slots that nobody looks at, so that a
    pass that fails leaves the cache as it was.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.length = 0
        self.kv: KeysValues | None = None
        self._pending: KeysValues | None = None

    def extend(self, k: mx.array, v: mx.array) -> KeysValues:
        """The keys and values that a chunk [B,K,T,C] may see, its own last; in order of position if T > 1."""
        if self.window is not None and k.shape[2] > 1:
            return self._extend_ring(self.window, k, v)
        start, end = self.length, self.length + k.shape[2]
        self._pending = self.kv = self._reserved(end, k, v)
        slot = start if self.window is None else start % self.window
        for buffer, new in zip(self.kv, (k, v), strict=True):
            buffer[:, :, slot : slot + new.shape[2]] = new
        held = end if self.window is None else min(end, self.window)
        return self.kv[0][:, :, :held], self.kv[1][:, :, :held]

    def commit(self, T: int) -> None:
        """Count the T positions that the last `extend` was given."""
        self.kv, self._pending = self._pending, None
        self.length += T

    def _reserved(self, end: int, k: mx.array, v: mx.array) -> KeysValues:
        """The buffers, with room for positions up to `end` or for a whole window."""
        capacity = 0 if self.kv is None else self.kv[0].shape[2]
        wanted = end if self.window is None else min(end, self.window)
        if self.kv is not None and wanted <= capacity:
            return self.kv
        grown = -(-wanted // STEP) * STEP
        grown = grown if self.window is None else min(grown, self.window)
        more = tuple(mx.zeros((*new.shape[:2], grown - capacity, new.shape[3]), new.dtype) for new in (k, v))
        if self.kv is None:
            return more[0], more[1]
        return mx.concatenate([self.kv[0], more[0]], axis=2), mx.concatenate([self.kv[1], more[1]], axis=2)

    def _extend_ring(self, window: int, k: mx.array, v: mx.array) -> KeysValues:
        start, end = self.length, self.length + k.shape[2]
        if self.kv is not None and start:
            slots = mx.array(np.arange(max(0, start - window + 1), start) % window)
            k, v = (mx.concatenate([past[:, :, slots], new], axis=2) for past, new in zip(self.kv, (k, v), strict=True))
        # the last `window` positions, turned so that each comes to lie in its slot
        turn = end % window if end > window else 0
        self._pending = mx.roll(k[:, :, -window:], turn, axis=2), mx.roll(v[:, :, -window:], turn, axis=2)
        return k, v


class MetalCache:
    """The past of one sequence, or of several of equal length, on every layer."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.layers = [LayerCache(config.window(i)) for i in range(config.num_hidden_layers)]

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[-1].length

    @property
    def sequences(self) -> int | None:
        """How many sequences it holds; None while it is empty."""
        return self.layers[-1].kv[0].shape[0] if self.length and self.layers[-1].kv is not None else None

    @property
    def arrays(self) -> list[mx.array]:
        """All keys and values, to be evaluated together."""
        return [array for layer in self.layers if layer.kv is not None for array in layer.kv]


def visible_keys(window: int | None, start: int, T: int) -> mx.array | str | None:
    """The mask of a chunk of T positions from `start` on over what `LayerCache.extend` answers: bool [T,S].

    "causal", MLX's name for all keys up to the query's own, where the window hides none of them; None for one token.
    """
    if T == 1:
        return None
    if window is None or start + T <= window:
        return "causal"
    past = min(start, window - 1)
    query, key = mx.arange(past, past + T)[:, None], mx.arange(past + T)[None]
    return (key <= query) & (query - key < window)
