"""Every code of every small format, against ml_dtypes and against the formats' definitions in exact fractions."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from assay.reference.formats import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, INT8, Element
from assay.reference.formats.elements import E8M0_METAL
from tests.reference.formats.compare import assert_same_bits

THEIRS = {
    E2M1: ml_dtypes.float4_e2m1fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E3M2: ml_dtypes.float6_e3m2fn,
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    E8M0: ml_dtypes.float8_e8m0fnu,
}
ELEMENTS = (E2M1, E2M3, E3M2, E4M3, E5M2, INT8)


def name_of(element: Element) -> str:
    return element.name


@pytest.mark.parametrize("element", THEIRS, ids=name_of)
def test_every_code_against_ml_dtypes(element):
    codes = np.arange(2**element.bits, dtype=np.uint8)
    assert_same_bits(element.to_float32(codes), codes.view(THEIRS[element]).astype(np.float32))


def test_int8_is_sixty_fourths():
    """OCP MX v1.0, 5.3.4: two's complement with an implied scale of 2^-6."""
    assert [Fraction(float(v)) for v in INT8.values] == [Fraction(c - 256 * (c > 127), 64) for c in range(256)]


# OCP MX v1.0, section 5.3
@pytest.mark.parametrize(
    ("element", "largest", "exponent", "smallest"),
    [
        (E2M1, 6, 2, 0.5),
        (E2M3, 7.5, 2, 0.125),
        (E3M2, 28, 4, 0.0625),
        (E4M3, 448, 8, 2.0**-9),
        (E5M2, 57344, 15, 2.0**-16),
        (INT8, 127 / 64, 0, 1 / 64),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_limits(element, largest, exponent, smallest):
    assert element.largest == largest
    assert element.largest_exponent == exponent
    assert element.magnitudes[:2].tolist() == [0, smallest]
    assert (np.diff(element.magnitudes) > 0).all()


@pytest.mark.parametrize("element", ELEMENTS, ids=name_of)
def test_signs(element):
    codes = np.arange(len(element.magnitudes), dtype=np.uint8)
    negated = element.with_sign(codes, np.ones(len(codes), bool))
    np.testing.assert_array_equal(element.to_float32(negated), -element.magnitudes)
    np.testing.assert_array_equal(element.with_sign(codes, np.zeros(len(codes), bool)), codes)


def test_metal_scale_is_fourteen_too_large():
    """OpenAI's Metal kernel multiplies 2^(byte - 127) by a half that is E2M1 times 2^-14."""
    for byte in (14, 15, 141, 254):
        assert E8M0_METAL.values[byte] == E8M0.values[byte - 14]
    assert E8M0_METAL.values[0] == 2.0**-141  # the kernel: 0
    assert np.isnan(E8M0_METAL.values[255])  # the kernel: infinity
