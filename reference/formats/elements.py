"""The element and scale formats of microscaling as tables: what every code means, worked out from the parameters.

OCP MX v1.0, section 5.3 (elements) and 5.4.1 (E8M0); FP8 as in OCP OFP8 v1.0: E4M3 has no infinity and one NaN
a sign, E5M2 has both as IEEE 754 would, the 4- and 6-bit formats have neither.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

BYTE = np.dtype(np.uint8)


@dataclass(frozen=True, eq=False)
class Element:
    """A format of at most 8 bits; `values` float32 [2**bits] is its meaning, code by code.

    The codes below 2**(bits-1) are the non-negative values in ascending order, NaN and infinity last.
    """

    name: str
    bits: int
    mantissa_bits: int
    values: np.ndarray = field(repr=False)
    twos_complement: bool = False
    stored: np.dtype = BYTE

    def to_float32(self, codes: np.ndarray) -> np.ndarray:
        """What codes, uint8 [...], mean; exact."""
        return self.values[codes]

    @cached_property
    def magnitudes(self) -> np.ndarray:
        """The finite values without sign, ascending, float64; the place of each is its code."""
        positive = self.values[: 2 ** (self.bits - 1)]
        return positive[np.isfinite(positive)].astype(np.float64)

    @property
    def largest(self) -> np.float32:
        """The largest finite value."""
        return np.float32(self.magnitudes[-1])

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest)), which OCP calls emax."""
        return int(np.frexp(self.largest)[1]) - 1

    def with_sign(self, codes: np.ndarray, negative: np.ndarray) -> np.ndarray:
        """The codes of the negated values where `negative`, from codes of non-negative ones; uint8 [...]."""
        minus = -codes & 0xFF if self.twos_complement else codes | 1 << (self.bits - 1)
        return np.where(negative, minus, codes).astype(np.uint8)


def _float_element(name: str, exponent_bits: int, mantissa_bits: int, nonfinite: tuple[int, ...] = ()) -> Element:
    """Sign, exponent, mantissa, with bias 2^(e-1) - 1 and subnormals; `nonfinite` lists the codes of NaN."""
    bits = 1 + exponent_bits + mantissa_bits
    codes = np.arange(2 ** (bits - 1))
    exponent, mantissa = codes >> mantissa_bits, codes & 2**mantissa_bits - 1
    significand = mantissa + np.where(exponent > 0, 2**mantissa_bits, 0)
    bias = 2 ** (exponent_bits - 1) - 1
    positive = np.ldexp(significand, np.maximum(exponent, 1) - bias - mantissa_bits).astype(np.float32)
    positive[list(nonfinite)] = np.nan
    return Element(name, bits, mantissa_bits, np.concatenate((positive, -positive)))


def _e5m2() -> Element:
    element = _float_element("E5M2", 5, 2, nonfinite=(0x7D, 0x7E, 0x7F))
    element.values[[0x7C, 0xFC]] = np.inf, -np.inf
    return element


def e8m0_to_float32(code: np.ndarray) -> np.ndarray:
    """2^(code - 127) for codes 0 to 254, NaN for 255; uint8 [...] -> float32 [...].

    Code 0 is 2^-127, a subnormal float32 that many decoders flush to zero. ggml and MLX read 255 as a
    power of two or infinity; the OCP text says NaN, and so do we.
    """
    value = np.ldexp(np.float32(1), np.minimum(code, 254).astype(np.int32) - 127)
    return np.where(code == 255, np.float32(np.nan), value)


BYTES = np.arange(256, dtype=np.uint8)
E2M1 = _float_element("E2M1", 2, 1)
E2M3 = _float_element("E2M3", 2, 3)
E3M2 = _float_element("E3M2", 3, 2)
E4M3 = _float_element("E4M3", 4, 3, nonfinite=(0x7F,))
E5M2 = _e5m2()
INT8 = Element("INT8", 8, 6, BYTES.view(np.int8).astype(np.float32) / 64, twos_complement=True)
E8M0 = Element("E8M0", 8, 0, e8m0_to_float32(BYTES))
# openai/gpt-oss's Metal files store E8M0 + 14, because their kernel decodes E2M1 as a half that is 2^14 too small
E8M0_METAL = Element("E8M0+14", 8, 0, e8m0_to_float32(BYTES) * np.float32(2.0**-14))
