"""Rounding to elements: ml_dtypes for ties to even, an argmin over all values for ties to zero."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.reference.formats import E2M1, E2M3, E3M2, E4M3, E5M2, INT8
from assay.reference.formats.encode_elements import ties_to_even, ties_to_zero

THEIRS = {
    E2M1: ml_dtypes.float4_e2m1fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E3M2: ml_dtypes.float6_e3m2fn,
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
}
ELEMENTS = (*THEIRS, INT8)


def name_of(element) -> str:
    return element.name


def probes(element) -> np.ndarray:
    """Every value, every midpoint and what lies just beside both, with both signs, float32."""
    exact = np.concatenate((element.magnitudes, (element.magnitudes[1:] + element.magnitudes[:-1]) / 2)).astype(
        np.float32
    )
    around = np.concatenate([exact, *(np.nextafter(exact, np.float32(side)) for side in (-np.inf, np.inf))])
    return np.concatenate((around, -around))


@pytest.mark.parametrize("element", THEIRS, ids=name_of)
def test_ties_to_even_against_ml_dtypes(element):
    rng = np.random.default_rng(4)
    values = np.concatenate((probes(element), (rng.normal(size=20000) * element.largest / 3).astype(np.float32)))
    values = values[np.abs(values) <= element.largest]  # beyond, ml_dtypes answers NaN or infinity where it can
    wanted = values.astype(THEIRS[element]).view(np.uint8)
    np.testing.assert_array_equal(ties_to_even(values, element), wanted)


@given(st.floats(-1.984375, 1.984375, width=32))
def test_int8_is_python_s_round(value):
    code = int(ties_to_even(np.array([value], np.float32), INT8).view(np.int8)[0])
    assert code == round(value * 64)


@pytest.mark.parametrize("element", ELEMENTS, ids=name_of)
def test_beyond_the_largest_saturates(element):
    values = np.array([element.largest * 1.01, element.largest * 1e6, np.finfo(np.float32).max], np.float32)
    for rounding in (ties_to_even, ties_to_zero):
        for sign in (1, -1):
            got = element.to_float32(rounding(sign * values, element))
            assert (got == sign * element.largest).all()


@pytest.mark.parametrize("element", ELEMENTS, ids=name_of)
def test_ties_to_zero_is_the_first_of_the_nearest(element):
    """As an argmin over the table, smallest magnitude first, does it."""
    values = probes(element)
    errors = np.abs(np.abs(values.astype(np.float64))[:, None] - element.magnitudes)
    nearest = element.magnitudes[errors.argmin(axis=1)]
    got = element.to_float32(ties_to_zero(values, element))
    np.testing.assert_array_equal(got, np.copysign(nearest, values))
    assert not np.signbit(got[got == 0]).any()


def test_ties_by_hand():
    """E2M1: 0.25, 0.75, 1.25, 1.75, 2.5, 3.5 and 5 lie half-way."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5, -0.0], np.float32)
    assert E2M1.to_float32(ties_to_even(ties, E2M1)).tolist() == [0, 1, 1, 2, 2, 4, 4, -0.0, -4, -0.0]
    assert E2M1.to_float32(ties_to_zero(ties, E2M1)).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 0, -4, 0]
    assert np.signbit(E2M1.to_float32(ties_to_even(ties[-3:], E2M1))).all()


@pytest.mark.parametrize("element", ELEMENTS, ids=name_of)
@pytest.mark.parametrize("rounding", [ties_to_even, ties_to_zero])
def test_values_stay(element, rounding):
    finite = element.values[np.isfinite(element.values) & (np.abs(element.values) <= element.largest)]
    np.testing.assert_array_equal(element.to_float32(rounding(finite, element)), finite)
