"""Rotary frequencies against published facts and formulas; the rotation against its defining properties."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.reference.config import FrequencyFactors, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling
from assay.reference.rope import apply_rope, inverse_frequencies, rope_tables
from tests.fast.models import llama_config

GPT_OSS_FACTOR = 0.1 * math.log(32) + 1


def gpt_oss_yarn(truncate: bool) -> YarnScaling:
    """The released gpt-oss: head size 64, theta 150000."""
    return YarnScaling(32.0, 32.0, 1.0, 4096, truncate, GPT_OSS_FACTOR)


PLAIN = inverse_frequencies(64, 150000.0, None)
EXACT = inverse_frequencies(64, 150000.0, gpt_oss_yarn(truncate=False))
ROUNDED = inverse_frequencies(64, 150000.0, gpt_oss_yarn(truncate=True))


def test_plain_frequencies():
    np.testing.assert_allclose(inverse_frequencies(8, 10000.0, None), [1, 0.1, 0.01, 0.001], rtol=1e-15)


# --- YaRN: the facts of gpt-oss-20b ---


def ramp_ends(scaled: np.ndarray) -> tuple[float, float]:
    """Where the straight line through the ramp of gpt-oss (pairs 9 to 17) reaches 0 and 1."""
    interpolated = (1 - scaled / PLAIN) / (1 - 1 / 32)
    slope, offset = np.polyfit(np.arange(9, 18), interpolated[9:18], 1)
    return -offset / slope, (1 - offset) / slope


def test_exact_ramp_ends():
    assert ramp_ends(EXACT) == pytest.approx((8.092779, 17.398025), abs=5e-7)


def test_rounded_ramp_ends():
    assert ramp_ends(ROUNDED) == pytest.approx((8, 18), abs=1e-9)


def test_fast_pairs_are_kept_and_slow_ones_divided():
    np.testing.assert_array_equal(EXACT[:9], PLAIN[:9])
    np.testing.assert_allclose(EXACT[18:], PLAIN[18:] / 32, rtol=1e-15)


def test_rounding_the_ramp_changes_pairs_9_to_17_only():
    changed = ROUNDED / EXACT - 1
    assert np.flatnonzero(changed).tolist() == list(range(9, 18))
    assert changed[9] == pytest.approx(-0.0027, abs=5e-5)
    assert changed[17] == pytest.approx(0.76, abs=5e-3)
    assert np.all(np.diff(changed[9:18]) > 0)


def test_phase_error_of_the_rounded_ramp_at_position_1000():
    phase = 1000 * np.abs(ROUNDED - EXACT)[9:18]
    assert (phase.min(), phase.max()) == pytest.approx((0.085, 0.221), abs=5e-4)


def test_ramp_is_clipped_to_the_head_and_never_of_no_width():
    """A tiny original context puts both ends below pair 0: everything is interpolated, nothing is NaN."""
    scaling = YarnScaling(4.0, 32.0, 1.0, 2, True, 1.0)
    np.testing.assert_allclose(inverse_frequencies(8, 10000.0, scaling)[1:], [0.025, 0.0025, 0.00025])


def test_yarn_factor_multiplies_cos_and_sin():
    config = llama_config(rope_scaling=gpt_oss_yarn(truncate=False))
    cos, sin = rope_tables(config, np.array([0, 5]), np.dtype(np.float64))
    np.testing.assert_allclose(np.hypot(cos, sin), 1.3465735902799727, rtol=1e-15)
    assert not sin[0].any()


# --- Llama 3 ---


def test_llama3_scaling_against_its_formula():
    """Meta's three cases by wavelength, pair by pair, for Llama 3.1's own numbers (head size 128)."""
    factor, low, high, old = 8.0, 1.0, 4.0, 8192
    got = inverse_frequencies(128, 500000.0, Llama3Scaling(factor, low, high, old))
    cases = set()
    for j, value in enumerate(got):
        f = 500000.0 ** (-2 * j / 128)
        wavelength = 2 * math.pi / f
        if wavelength < old / high:
            case, wanted = "kept", f
        elif wavelength > old / low:
            case, wanted = "divided", f / factor
        else:
            smooth = (old / wavelength - low) / (high - low)
            case, wanted = "between", (1 - smooth) * f / factor + smooth * f
        cases.add(case)
        assert value == pytest.approx(wanted, rel=1e-14), (j, case)
    assert cases == {"kept", "divided", "between"}


def test_frequency_factors_divide():
    got = inverse_frequencies(8, 10000.0, FrequencyFactors((1.0, 2.0, 4.0, 8.0)))
    np.testing.assert_allclose(got, [1, 0.05, 0.0025, 0.000125], rtol=1e-15)


# --- LongRoPE ---

LONGROPE = LongRopeScaling((1.0, 2.0, 4.0, 8.0), (10.0, 20.0, 50.0, 100.0), 16, 1.25)
WITHIN, BEYOND = [1, 0.05, 0.0025, 0.000125], [0.1, 0.005, 0.0002, 0.00001]  # of head size 8, theta 10000


@pytest.mark.parametrize(("length", "wanted"), [(1, WITHIN), (16, WITHIN), (17, BEYOND), (1000, BEYOND)])
def test_longrope_divides_by_the_long_factors_beyond_the_original_context(length, wanted):
    np.testing.assert_allclose(inverse_frequencies(8, 10000.0, LONGROPE, length), wanted, rtol=1e-14)


@pytest.mark.parametrize(
    ("positions", "angle"),
    [
        (range(16), 3 * 0.05),  # the sixteenth position is the last of the original context
        (range(17), 3 * 0.005),  # one more, and every position of the call is turned by the long factors
        (range(3, 16), 3 * 0.05),
        (range(3, 17), 3 * 0.005),
    ],
)
def test_the_last_position_of_a_call_decides_for_all_of_it(positions, angle):
    """Pair 1 at position 3: transformers' convention."""
    config = replace(llama_config(rope_scaling=LONGROPE), head_dim=8)
    cos, sin = rope_tables(config, np.array(positions), np.dtype(np.float64))
    row = list(positions).index(3)
    assert (cos[row, 1], sin[row, 1]) == pytest.approx((1.25 * math.cos(angle), 1.25 * math.sin(angle)), rel=1e-14)
    np.testing.assert_allclose(np.hypot(cos, sin), 1.25, rtol=1e-15)


# --- the rotation ---


def test_quarter_turn_pairs_a_channel_with_the_one_half_a_head_away():
    x = np.array([[[1.0, 2.0, 3.0, 4.0]]])
    turned = apply_rope(x, np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]))
    assert turned.tolist() == [[[-3, 2, 1, 4]]]


def test_the_angle_is_position_times_frequency():
    cos, sin = rope_tables(llama_config(), np.array([0, 1, 7]), np.dtype(np.float64))
    frequency = 10000.0 ** (-2 / 20)  # pair 1 of head size 20
    np.testing.assert_allclose(cos[:, 1], [1, math.cos(frequency), math.cos(7 * frequency)], rtol=1e-14)
    np.testing.assert_allclose(sin[:, 1], [0, math.sin(frequency), math.sin(7 * frequency)], rtol=1e-14)


def rotated(x_C: np.ndarray, position: int, scaling: RopeScaling) -> np.ndarray:
    cos, sin = rope_tables(llama_config(rope_scaling=scaling), np.array([position]), np.dtype(np.float64))
    return apply_rope(x_C[None, None], cos, sin)[0, 0]


scalings = st.sampled_from([None, Llama3Scaling(8.0, 1.0, 4.0, 64), FrequencyFactors(tuple(range(1, 11)))])
positions = st.integers(0, 4000)


@given(st.integers(0, 2**32), positions, scalings)
def test_rotation_keeps_norms(seed, position, scaling):
    x = np.random.default_rng(seed).normal(size=20)
    assert np.linalg.norm(rotated(x, position, scaling)) == pytest.approx(np.linalg.norm(x), rel=1e-14)


@given(st.integers(0, 2**32), positions, positions, st.integers(0, 4000), scalings)
def test_scores_depend_on_the_distance_only(seed, m, n, shift, scaling):
    q, k = np.random.default_rng(seed).normal(size=(2, 20))
    here = rotated(q, m, scaling) @ rotated(k, n, scaling)
    there = rotated(q, m + shift, scaling) @ rotated(k, n + shift, scaling)
    assert there == pytest.approx(here, abs=1e-10)


@given(st.integers(0, 2**32), st.integers(1, 4000))
def test_scores_do_depend_on_the_distance(seed, distance):
    q, k = np.random.default_rng(seed).normal(size=(2, 20))
    assert abs(rotated(q, distance, None) @ rotated(k, 0, None) - q @ k) > 1e-6


def test_neighbour_pairs_are_the_same_mathematics_on_permuted_channels():
    """llama.cpp's Llama pairs channels 2j and 2j + 1: permute, rotate in neighbours, permute back."""
    x, position = np.random.default_rng(3).normal(size=20), 11
    angle = position * inverse_frequencies(20, 10000.0, None)
    neighbours = x.reshape(2, 10).T.copy()  # [pair, half]
    turned = np.array(
        [
            (a * math.cos(p) - b * math.sin(p), b * math.cos(p) + a * math.sin(p))
            for (a, b), p in zip(neighbours, angle, strict=True)
        ]
    )
    np.testing.assert_allclose(rotated(x, position, None), turned.T.ravel(), rtol=1e-13)
