"""Plain elements without blocks, little-endian: floats of 16, 32 and 64 bits, and integers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FloatFormat:
    """An element format without blocks; its one part, `values` [...], has the dtype `stored`."""

    name: str
    stored: np.dtype
    to_float32: Callable[[np.ndarray], np.ndarray]

    def shape(self, parts: dict[str, np.ndarray]) -> tuple[int, ...]:
        """The shape of the decoded array."""
        return parts["values"].shape

    def decode(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        """float32 [...]; exact, but for F64, I32 and I64, which are rounded to nearest even."""
        return self.to_float32(parts["values"])


def bfloat16_to_float32(code: np.ndarray) -> np.ndarray:
    """bfloat16 codes, uint16 [...], are the upper halves of float32 codes: float32 [...]."""
    return (code.astype(np.uint32) << 16).view(np.float32)


def _to_float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite
        return values.astype(np.float32)


F64 = FloatFormat("F64", np.dtype("<f8"), _to_float32)
F32 = FloatFormat("F32", np.dtype("<f4"), _to_float32)
F16 = FloatFormat("F16", np.dtype("<f2"), _to_float32)
BF16 = FloatFormat("BF16", np.dtype("<u2"), bfloat16_to_float32)
I8 = FloatFormat("I8", np.dtype("i1"), _to_float32)
I16 = FloatFormat("I16", np.dtype("<i2"), _to_float32)
I32 = FloatFormat("I32", np.dtype("<i4"), _to_float32)
I64 = FloatFormat("I64", np.dtype("<i8"), _to_float32)

# GGUF's tensor type numbers (ggml.h `enum ggml_type`)
GGML_PLAIN = {0: F32, 1: F16, 24: I8, 25: I16, 26: I32, 27: I64, 28: F64, 30: BF16}
