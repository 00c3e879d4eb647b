"""The key/value cache: what a later chunk of the same sequence needs of the earlier ones."""

import numpy as np


class KVCache:
    """Keys (after RoPE) and values of every past position, layer by layer.

    Sliding layers keep all of them too: the mask alone decides what a query sees, so that there is no
    ring whose wrap could hide a mistake.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def extend(self, layer: int, k_TKC: np.ndarray, v_TKC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append this chunk's keys and values; answer all of the layer's, each [S,K,C]."""
        if layer in self._layers:
            k_SKC, v_SKC = self._layers[layer]
            k_TKC, v_TKC = np.concatenate((k_SKC, k_TKC)), np.concatenate((v_SKC, v_TKC))
        self._layers[layer] = k_TKC, v_TKC
        return k_TKC, v_TKC

    def advance(self, T: int) -> None:
        """Count a chunk's positions once all layers have it."""
        self.length += T
