"""The CPU path's mode q8: inputs of products with quantised weights rounded to int8, all else in float32."""

from dataclasses import dataclass

import numpy as np

from assay.fast.quantised import quantises_inputs
from assay.golden.emulation import Emulation
from assay.reference.config import Config
from assay.reference.model import Model
from assay.reference.precision import round_q8


class _RoundsItsInput:
    """A weight matrix W for products x @ W.T: rounds x first."""

    __array_ufunc__ = None  # NumPy then leaves the product to __rmatmul__

    def __init__(self, weight: np.ndarray) -> None:
        self._weight = weight

    @property
    def T(self) -> "_RoundsItsInput":
        return self

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        return round_q8(x) @ self._weight.T


@dataclass(frozen=True)
class _QuantisedInputs(Model[Config]):
    def weight(self, name: str, part: int | range | None = None) -> np.ndarray:
        array = super().weight(name, part)
        if not quantises_inputs(self.tensors[name]):
            return array
        return _RoundsItsInput(array)  # type: ignore[return-value]  # a product's right side, which is all it is used for


class Q8(Emulation):
    """The oracle with the rounded inputs."""

    def __init__(self, model: Model[Config]):
        super().__init__(_QuantisedInputs(model.config, model.tensors, model.dtype))
