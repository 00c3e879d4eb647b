"""Emulations: the oracle made to compute as a certain backend does by design, through taps and operands alone.

An emulation stands at both ends of every step. `computed` is handed what the oracle computed for a tap and may
answer what the backend's own sequence of roundings makes of the same inputs; `handed_on` is given the value that
goes on, and may round it as the next operation does to its operand. Matrix products round their activations
through the weights that the model gives out.
"""

from collections.abc import Callable

import numpy as np

from assay.golden.rounding import to_float16
from assay.reference.config import Config
from assay.reference.model import Model
from assay.reference.ops import attention_mask


class Emulation:
    """Nothing but the oracle; a subclass has a method for each kind of tap that its backend computes otherwise.

    Such a method, named like the tap, takes the layer and the oracle's array and answers the backend's.
    `now` holds the values of the current layer that went on, by kind of tap.
    """

    def __init__(self, model: Model[Config]):
        self.model = model
        self.now: dict[str, np.ndarray] = {}
        self.position_T = np.arange(0)

    @property
    def config(self) -> Config:
        return self.model.config

    def begin(self, start: int, T: int) -> None:
        """The chunk of T positions from `start` is next."""
        self.position_T = np.arange(start, start + T)

    def computed(self, name: str, array: np.ndarray) -> np.ndarray:
        """The backend's value of a tap, given the oracle's from the same inputs."""
        layer, kind = split_name(name)
        step = getattr(self, kind, None)
        return array if step is None else step(layer, array)

    def handed_on(self, name: str, array: np.ndarray) -> np.ndarray:
        """What the next operation takes in for a tap."""
        self.now[split_name(name)[1]] = array
        return array

    def mask_TS(self, layer: int) -> np.ndarray:
        """Who sees whom in a layer, bool [T,S]."""
        return attention_mask(self.position_T, np.arange(self.position_T[-1] + 1), self.config.window(layer))


class Float16Cache(Emulation):
    """Keys (after RoPE) and values rounded to float16 where they enter the cache, and nothing else."""

    def handed_on(self, name: str, array: np.ndarray) -> np.ndarray:
        array = to_float16(array) if split_name(name)[1] in ("k_rope", "v") else array
        return super().handed_on(name, array)


def split_name(name: str) -> tuple[int, str]:
    head, _, kind = name.rpartition(".")
    return (int(head.partition(".")[2]) if head else -1), kind


class _Matrix(np.ndarray):
    """Weights that say how they are multiplied with activations; in every other operation plain numbers."""

    product: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    def __array_finalize__(self, obj: object) -> None:
        self.product = getattr(obj, "product", None)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        operands = [np.asarray(x) for x in inputs]
        if ufunc is np.matmul and self.product is not None:
            return self.product(*operands)
        return getattr(ufunc, method)(*operands, **kwargs)


def with_product(weight: np.ndarray, product: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """The weights, x @ weight.T computed as product(x, weight.T)."""
    matrix = weight.view(_Matrix)
    matrix.product = product
    return matrix
