"""Scale rules against their definitions in exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from assay.reference.formats import E2M1, E2M3, E3M2, E4M3, E5M2, INT8
from assay.reference.formats.encode_scales import SCALE_RULES, e4m3, float16

ELEMENTS = (E2M1, E2M3, E3M2, E4M3, E5M2, INT8)


def floor_log2(x: Fraction) -> int:
    """The largest e with 2^e <= x."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def rounded_half_up(x: Fraction, mantissa_bits: int) -> Fraction:
    """x to mantissa_bits after the leading one."""
    ulp = Fraction(2) ** (floor_log2(x) - mantissa_bits)
    return (x / ulp + Fraction(1, 2)).__floor__() * ulp


def definition(rule: str, amax: Fraction, element) -> int:
    """The exponent, in the words of each rule."""
    emax, quotient = element.largest_exponent, Fraction(float(np.float32(float(amax)) / element.largest))
    if rule == "floor":
        return floor_log2(amax) - emax
    if rule == "ceil":
        return -floor_log2(1 / amax) - emax
    if rule == "even":
        return floor_log2(rounded_half_up(amax, element.mantissa_bits)) - emax
    if rule == "rceil":
        return -floor_log2(1 / quotient)
    floor = floor_log2(quotient)  # nearest: is q / 2^floor above the square root of 2?
    return floor + ((quotient / Fraction(2) ** floor) ** 2 > 2)


@pytest.mark.parametrize("rule", SCALE_RULES)
@given(amax=st.floats(2.0**-100, 2.0**120, width=32), element=st.sampled_from(ELEMENTS))
@example(amax=1.0, element=E2M1)
@example(amax=1.75, element=E2M1)
@example(amax=float(np.nextafter(np.float32(1.75), np.float32(0))), element=E2M1)
@example(amax=6.0, element=E2M1)
@example(amax=float(np.nextafter(np.float32(6), np.float32(9))), element=E2M1)
@example(amax=float(np.nextafter(np.float32(2), np.float32(0))), element=E4M3)
def test_every_rule_by_definition(rule, amax, element):
    (code,) = SCALE_RULES[rule](np.array([amax], np.float32), element)
    assert int(code) - 127 == definition(rule, Fraction(amax), element)


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_clamped_and_zero(rule, element):
    """0 for zeros and for what is too small, never the NaN 255."""
    amax = np.array([0, 2.0**-149, np.finfo(np.float32).max], np.float32)
    codes = SCALE_RULES[rule](amax, element)
    assert codes[:2].tolist() == [0, 0]
    assert 254 >= codes[2] >= 254 - element.largest_exponent - 1


@pytest.mark.parametrize(("rule", "wanted"), [("floor", 0), ("even", 1), ("ceil", 1), ("rceil", 1), ("nearest", 0)])
def test_where_the_rules_part(rule, wanted):
    """amax 7 of E2M1: 6 under 2^0 or 8 under 2^1."""
    assert int(SCALE_RULES[rule](np.array([7], np.float32), E2M1)[0]) - 127 == wanted


def test_e4m3_scale():
    amax = np.array([6, 6 * 448, 1e6, 6 * 17, 6 * 19, 6 * 2.0**-10, 0], np.float32)
    assert E4M3.to_float32(e4m3(amax, E2M1)).tolist() == [1, 448, 448, 16, 20, 0, 0]


def test_float16_scale():
    assert float16(np.array([6, 0.1], np.float32), E2M1).tolist() == [1, np.float16(np.float32(0.1) / np.float32(6))]
    with pytest.raises(ValueError, match="exceeds float16's 65504"):
        float16(np.array([6 * 65536], np.float32), E2M1)
