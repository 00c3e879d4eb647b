"""What every encoder promises: idempotence, error bounds, symmetry in sign and scale, order; refusal of the rest."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay.loaders.errors import CheckpointError
from assay.loaders.quantise import ENCODERS, encode
from assay.reference.formats import E2M1

PLAIN = ("F32", "F16", "BF16")
MX_NAMES = ("MXFP6_E2M3", "MXFP6_E3M2", "MXFP8_E4M3", "MXFP8_E5M2", "MXINT8")
MX = [*MX_NAMES, "MXINT8:ceil", *(f"MXFP4:{rule}" for rule in ("floor", "ceil", "even", "rceil", "nearest"))]
TWO_LEVEL = ("GGUF NVFP4", "MLX nvfp4", "NVFP4")
SYMMETRIC = ["Q4_0", "Q5_0", "Q8_0", "GGUF MXFP4", "MLX mxfp4", "MLX mxfp8", "FP4_F16", *TWO_LEVEL, *MX]
AFFINE = ["Q4_1", "Q5_1", "affine2/32 F32", "affine3/32 F16", "affine4/64", "affine6/128"]
BRIEFLY = settings(max_examples=25)

# multiples of 1/64 up to 64, times a power of two: plenty of ties, equal values and zeros
VALUES = hnp.arrays(np.int32, (1, 128), elements=st.integers(-4096, 4096) | st.sampled_from((0, 4096, -4096, 64)))


def values_of(integers: np.ndarray, exponent: int = 0) -> np.ndarray:
    return np.ldexp(integers.astype(np.float32), exponent - 6)


def round_trip(values: np.ndarray, name: str) -> np.ndarray:
    return ENCODERS[name].encoding.decode(encode(values, name))


def groups_of(name: str, values: np.ndarray) -> np.ndarray:
    """The values [n, elements under one scale]."""
    encoding = ENCODERS[name].encoding
    size = 16 if name in TWO_LEVEL else getattr(encoding, "group_size", 32)
    return values.reshape(-1, size)


@pytest.mark.parametrize("name", [name for name in SYMMETRIC if name != "MXFP4:nearest"])
@BRIEFLY
@given(integers=VALUES)
def test_idempotent(name, integers):
    values = values_of(integers)
    if name in TWO_LEVEL or name == "FP4_F16":  # a subnormal scale is too coarse to come back to itself
        amax = np.abs(groups_of(name, values)).max(axis=1)
        assume(((amax == 0) | (amax > 6 * 2.0**-6)).all())
    once = round_trip(values, name)
    np.testing.assert_array_equal(round_trip(once, name), once)


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
@BRIEFLY
@given(integers=VALUES)
def test_with_a_minimum_hardly_moves_again(name, integers):
    """The two ends are rounded to float16 where they are stored, so a second trip may move by that much."""
    once = round_trip(values_of(integers), name)
    moved = np.abs(round_trip(once, name) - once)
    assert (moved <= 2.0**-9 * np.abs(once).max()).all()


def test_two_encoders_are_not_idempotent():
    """MLX's old rule takes 4 for largest under a scale of 1, then sees 4/6 nearer to 1/2; its affine scale shrinks."""
    once = round_trip(np.full((1, 32), 4.5, np.float32), "MXFP4:nearest")
    assert set(once[0]) == {4}
    assert set(round_trip(once, "MXFP4:nearest")[0]) == {3}
    values = np.linspace(-0.3, 1, 32, dtype=np.float32)[None]
    once = round_trip(values, "affine3/32 F32")
    assert (round_trip(once, "affine3/32 F32") != once).any()


def error_bound(name: str, groups: np.ndarray) -> np.ndarray:
    """The most that an element may be off, for each group [n, 1], in float64."""
    groups = groups.astype(np.float64)
    amax, spread = np.abs(groups).max(axis=1, keepdims=True), np.ptp(groups, axis=1, keepdims=True)
    half = 2.0**-11  # a scale or minimum rounded to float16
    if name == "Q8_0":
        return amax * (1 / 254 + half)
    if name in ("Q4_0", "Q5_0"):  # the last level on the other side is missing: a whole step there
        return amax * (1 / (8 if name == "Q4_0" else 16) + half)
    if name in ("Q4_1", "Q5_1"):
        return spread * (1 / (30 if name == "Q4_1" else 62) + half) + amax * half
    if name.startswith("affine"):
        bits, stored = int(name[6]), {"F32": 2.0**-24, "F16": half}.get(name.split()[-1], 2.0**-8)
        # the step stretches until zero has a code; near-constant groups keep their end and lose the rest
        return spread / (2**bits - 1) + 2 * amax * stored * 2
    if name in TWO_LEVEL:
        # E4M3 scales below 2**-6 are multiples of 2**-9: half a step off, times the largest code, 6; scale 0 included
        return amax / 6 * (1 + 1 / 8) + 6 * 2.0**-10
    format = ENCODERS[name].encoding
    element = E2M1 if name == "GGUF MXFP4" else format.element
    step = 2.0**-6 if name.startswith("MXINT8") else 2.0 ** -(element.mantissa_bits + 1)
    saturated = 1 - float(element.largest) / 2 ** (element.largest_exponent + 1)
    return amax * max(step, 1 - 2**-0.5 if name.endswith("nearest") else saturated)


@pytest.mark.parametrize("name", SYMMETRIC + AFFINE)
@BRIEFLY
@given(integers=VALUES, exponent=st.integers(-4, 4))
def test_error_is_bounded(name, integers, exponent):
    values = values_of(integers, exponent)
    error = np.abs(groups_of(name, round_trip(values, name).astype(np.float64) - values))
    assert (error <= error_bound(name, groups_of(name, values)) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", SYMMETRIC)
@BRIEFLY
@given(integers=VALUES)
def test_sign_symmetry(name, integers):
    values = values_of(integers)
    np.testing.assert_array_equal(round_trip(-values, name), -round_trip(values, name))


@pytest.mark.parametrize("name", [name for name in SYMMETRIC if name not in TWO_LEVEL] + ["Q4_1", "Q5_1"])
@BRIEFLY
@given(integers=VALUES, exponent=st.integers(-6, 6))
def test_scale_symmetry(name, integers, exponent):
    """Powers of two pass through, as long as no scale leaves its normal range."""
    assume(np.abs(groups_of(name, integers)).max(axis=1).min() > 64)
    if name in ("Q4_1", "Q5_1"):
        assume(np.ptp(groups_of(name, integers), axis=1).min() > 64)
    values = values_of(integers)
    got = round_trip(np.ldexp(values, exponent), name)
    np.testing.assert_array_equal(got, np.ldexp(round_trip(values, name), exponent))


@pytest.mark.parametrize("name", SYMMETRIC + AFFINE)
@BRIEFLY
@given(integers=VALUES)
def test_order_is_kept(name, integers):
    values = groups_of(name, values_of(integers))
    decoded = groups_of(name, round_trip(values_of(integers), name))
    order = np.argsort(values, axis=1)
    assert (np.diff(np.take_along_axis(decoded, order, axis=1)) >= 0).all()


@pytest.mark.parametrize("name", [*PLAIN, *SYMMETRIC, *AFFINE])
def test_zeros_stay_zero(name):
    assert not round_trip(np.zeros((2, 128), np.float32), name).any()


@pytest.mark.parametrize("name", [*PLAIN, *SYMMETRIC, *AFFINE])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused(name, bad):
    values = np.ones((2, 128), np.float32)
    values[1, 77] = bad
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        encode(values, name)


@pytest.mark.parametrize("name", SYMMETRIC + AFFINE)
@pytest.mark.parametrize("shape", [(2, 33), (), (3, 0)])
def test_ragged_rows_are_refused(name, shape):
    with pytest.raises(CheckpointError, match="do not divide into groups"):
        encode(np.ones(shape, np.float32), name)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "FP4_F16"])
def test_scales_beyond_float16_are_refused(name):
    values = np.linspace(-1, 1, 128, dtype=np.float32)[None] * np.float32(2e7)
    with pytest.raises(CheckpointError, match="exceeds float16's 65504; choose another"):
        encode(values, name)
