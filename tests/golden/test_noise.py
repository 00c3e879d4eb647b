"""Profiles: rounding to fewer mantissa bits, against ml_dtypes and NumPy."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay.golden.errors import GoldenError
from assay.golden.noise import PROFILES, profile_named
from assay.golden.rounding import round_mantissa

PLAIN = ("float64", "float32", "float16", "bfloat16")
codes = hnp.arrays(np.uint32, 20, elements=st.integers(0, 2**32 - 1))


def bits(array: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))


@given(codes)
def test_seven_bits_are_bfloat16(code):
    """Any float32: ties, subnormals, negatives, overflow to infinity, NaN."""
    values = code.view(np.float32)
    with np.errstate(all="ignore"):
        wanted = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(bits(round_mantissa(values, 7)), bits(wanted))


@given(hnp.arrays(np.float32, 20, elements=st.floats(2.0**-14, 65000, width=32)), st.booleans())
def test_ten_bits_are_float16_within_its_range(values, negative):
    values = -values if negative else values
    np.testing.assert_array_equal(round_mantissa(values, 10), values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (1 + 2.0**-8, 1.0),  # a tie goes to the even neighbour, below
        (1 + 3 * 2.0**-8, 1 + 2.0**-6),  # or above
        (1 + 2.0**-8 + 2.0**-23, 1 + 2.0**-7),  # just over a tie
        (-(1 + 2.0**-8), -1.0),
        (2 - 2.0**-10, 2.0),  # a carry into the exponent
        (3.4e38, np.inf),
        (-3.4e38, -np.inf),
        (np.inf, np.inf),
        (-0.0, -0.0),
    ],
)
def test_rounding_to_seven_bits_literally(value, wanted):
    got = round_mantissa(np.array([value], np.float32), 7)
    assert got[0] == wanted
    assert np.signbit(got[0]) == np.signbit(wanted)


def test_profiles():
    roundoff = {name: PROFILES[name].unit_roundoff for name in PLAIN}
    assert roundoff == {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    assert all(profile.name == name for name, profile in PROFILES.items())
    for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        assert PROFILES[name].unit_roundoff == float(ml_dtypes.finfo(dtype).eps) / 2


def test_a_profile_rounds_what_is_stored_and_leaves_ids_alone():
    ids = np.array([[3, 1]])
    values = np.array([1 + 2.0**-20])
    for name in PLAIN:
        profile = PROFILES[name]
        assert profile.round("expert_ids", ids) is ids
        array = values.astype(profile.compute)
        rounded = profile.round("q", array)
        assert rounded.dtype == profile.compute
        assert (rounded == array).all() == (name in ("float64", "float32"))


def test_unknown_profile_lists_the_known_ones():
    with pytest.raises(GoldenError, match=r"unknown profile 'int4'[\s\S]*float64, float32, float16, bfloat16"):
        profile_named("int4")
    assert profile_named("float16") is PROFILES["float16"]
