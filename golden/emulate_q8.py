"""The CPU path's mode q8: inputs of products with quantised weights rounded to int8, all else in float32."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from assay.fast.quantised import BLOCK, input_block
from assay.golden.emulation import Emulation, Float16Cache
from assay.reference.config import Config
from assay.reference.model import Model
from assay.reference.precision import round_q8, round_q8_K


class _RoundsItsInput:
    """A weight matrix W for products x @ W.T: rounds x first."""

    __array_ufunc__ = None  # NumPy then leaves the product to __rmatmul__

    def __init__(self, weight: np.ndarray, rounding: Callable[[np.ndarray], np.ndarray]) -> None:
        self._weight, self._rounding = weight, rounding

    @property
    def T(self) -> "_RoundsItsInput":
        return self

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        return self._rounding(x) @ self._weight.T


@dataclass(frozen=True)
class _QuantisedInputs(Model[Config]):
    def weight(self, name: str, part: int | range | None = None) -> np.ndarray:
        array = super().weight(name, part)
        block = input_block(self.tensors[name])
        if not block:
            return array
        return _RoundsItsInput(array, round_q8 if block == BLOCK else round_q8_K)  # type: ignore[return-value]  # a product's right side, which is all it is used for


class Q8(Emulation):
    """The oracle with the rounded inputs."""

    def __init__(self, model: Model[Config]):
        super().__init__(_QuantisedInputs(model.config, model.tensors, model.dtype))


class Q8Float16Cache(Q8, Float16Cache):
    """The same with a float16 cache."""
