"""Periods and rotation against the oracle's, for every scaling and far out; no rounding that MLX could add."""

import numpy as np
import pytest

from assay.reference.config import FrequencyFactors, Llama3Scaling, LongRopeScaling
from assay.reference.rope import apply_rope, inverse_frequencies, rope_tables
from tests.fast.models import YARN, gpt_oss_config, llama_config

pytestmark = pytest.mark.peers

SCALINGS = {
    "plain": None,
    "llama-3": Llama3Scaling(8.0, 1.0, 4.0, 64),
    "yarn": YARN,
    "factors": FrequencyFactors(tuple(np.geomspace(1, 8, 10))),
    "longrope": LongRopeScaling((1.0,) * 10, tuple(np.geomspace(2, 30, 10)), 60, 1.2),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("start", "T"), [(0, 1), (0, 40), (39, 21), (1000, 3)])
def test_rotation(name, start, T):
    """Error over norm; float32 angles are wrong by up to half a unit in the last place of themselves."""
    import mlx.core as mx

    from assay.fast.metal.rope import Rotation

    config = llama_config(rope_scaling=SCALINGS[name])
    x = np.random.default_rng(0).standard_normal((T, 6, config.head_dim))
    expected = apply_rope(x, *rope_tables(config, np.arange(start, start + T), np.dtype(np.float64)))
    x_BHTC = mx.array(np.swapaxes(x, 0, 1)[None].astype(np.float32))
    got = np.swapaxes(np.array(Rotation(config)(x_BHTC, start))[0], 0, 1)
    assert np.linalg.norm(got - expected) < 2.0**-23 * (1 + 0.2 * (start + T)) * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["plain", "llama-3", "yarn", "factors"])
def test_reciprocals_of_the_periods_are_the_frequencies(name):
    """As MLX forms them, in float32: within one rounding of a reciprocal."""
    from assay.fast.metal.rope import Rotation

    config = llama_config(rope_scaling=SCALINGS[name])
    (periods,) = Rotation(config).periods
    expected = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, 1)
    np.testing.assert_allclose(np.float32(1) / np.array(periods), expected, rtol=2.0**-24)


def test_bfloat16_is_rounded_once():
    """YaRN's factor multiplies in float32: the result is the exact one, rounded, nearly everywhere."""
    import mlx.core as mx

    from assay.fast.metal.rope import Rotation

    config = gpt_oss_config()
    x = mx.array(np.random.default_rng(1).standard_normal((1, 4, 50, config.head_dim))).astype(mx.bfloat16)
    exact = mx.array(np.array(x.astype(mx.float32)))
    got, wide = Rotation(config)(x, 0), Rotation(config)(exact, 0)
    assert got.dtype == mx.bfloat16
    np.testing.assert_array_equal(
        np.array(got.astype(mx.float32)), np.array(wide.astype(mx.bfloat16).astype(mx.float32))
    )
