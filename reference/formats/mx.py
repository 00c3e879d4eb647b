"""Microscaling: small elements that share a scale, group by group (OCP MX v1.0, and what followed it).

One codec for all of them: elements E2M1, E2M3, E3M2, E4M3, E5M2 or INT8, scales E8M0 (OCP), E4M3 (NVFP4)
or float16. Codes lie least significant bits first, so elements 2j and 2j+1 share byte j of a 4-bit format,
the low nibble first, as Hugging Face and MLX have it. GGUF orders them otherwise: see ggml.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from assay.reference.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, E8M0_METAL, INT8, Element
from assay.reference.formats.floats import F16
from assay.reference.formats.packing import unpack_codes


class ScaleFormat(Protocol):
    """How a scale is stored: an `Element` or a `FloatFormat`."""

    @property
    def name(self) -> str: ...
    @property
    def stored(self) -> np.dtype: ...
    @property
    def to_float32(self) -> Callable[[np.ndarray], np.ndarray]: ...


@dataclass(frozen=True)
class Microscaled:
    """Groups of elements with a scale each; parts `blocks` uint8 [..., n, group*bits/8] and `scales` [..., n]."""

    name: str
    element: Element
    scale: ScaleFormat
    group: int = 32

    @property
    def group_bytes(self) -> int:
        """Bytes of codes in a group."""
        return self.group * self.element.bits // 8

    def shape(self, parts: dict[str, np.ndarray]) -> tuple[int, ...]:
        """The shape of the decoded array."""
        *rows, n = parts["scales"].shape
        return (*rows, self.group * n)

    def decode(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        """float32 [..., n*group]; exact, or infinite from 2^128 on: the product of two short significands."""
        elements = self.element.to_float32(unpack_codes(parts["blocks"], self.element.bits))
        with np.errstate(over="ignore", invalid="ignore"):
            values = elements * self.scale.to_float32(parts["scales"])[..., None]
        return values.reshape(*values.shape[:-2], -1)


MXFP4 = Microscaled("MXFP4", E2M1, E8M0)
MXFP6_E2M3 = Microscaled("MXFP6_E2M3", E2M3, E8M0)
MXFP6_E3M2 = Microscaled("MXFP6_E3M2", E3M2, E8M0)
MXFP8_E4M3 = Microscaled("MXFP8_E4M3", E4M3, E8M0)
MXFP8_E5M2 = Microscaled("MXFP8_E5M2", E5M2, E8M0)
MXINT8 = Microscaled("MXINT8", INT8, E8M0)
MXFP4_METAL = Microscaled("MXFP4_METAL", E2M1, E8M0_METAL)
NVFP4 = Microscaled("NVFP4", E2M1, E4M3, group=16)
FP4_F16 = Microscaled("FP4_F16", E2M1, F16)

MICROSCALED = {
    format.name: format
    for format in (MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2, MXINT8, MXFP4_METAL, NVFP4, FP4_F16)
}
