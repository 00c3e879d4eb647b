"""Quantised inputs against `reference.precision`, and that against ggml's rule spelled out in integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.fast.cpu.quantise import ADJACENT, BLOCK, CODE_OFFSET, UNIT, quantise, round_to_half
from assay.fast.cpu.rows import AFFINE4, MXFP4_ADJACENT, MXFP4_SPLIT, Q8_0
from assay.reference.precision import round_q8
from tests.fast.cpu.poison import poisoned


def in_order(inputs, kind, P, I):  # noqa: E741
    """The integers [P,I], scales, corrections and sums [P,I/32] of inputs, in the order of the elements."""
    blocks = inputs.groups * 4
    codes = inputs.codes.view(np.int8).reshape(-1, inputs.groups, 2, 4, 16).transpose(0, 1, 3, 2, 4)
    codes = codes.reshape(-1, blocks, 2, 16)  # halves that meet low and high nibbles
    codes = np.stack((codes[:, :, 0], codes[:, :, 1]), -1) if kind in ADJACENT else codes
    codes = codes.reshape(-1, blocks * BLOCK)
    assert not codes[:, I:].any()
    sides = [part.reshape(-1, blocks) for part in inputs[1:4]]
    assert not any(side[:, I // BLOCK :].any() for side in sides)
    return codes[:P, :I], *(side[:P, : I // BLOCK] for side in sides)


@pytest.mark.parametrize("kind", [MXFP4_SPLIT, MXFP4_ADJACENT, Q8_0, AFFINE4])
@pytest.mark.parametrize(("P", "I"), [(1, 32), (3, 160), (11, 2880)])
def test_against_the_twin(kind, P, I):  # noqa: E741
    """Bit for bit, in every order, with blocks of zeros; the corrections and sums are those of the integers."""
    rng = np.random.default_rng(P)
    x = (rng.normal(size=(P + 2, I)) * 10.0 ** rng.integers(-6, 4, (P + 2, 1))).astype(np.float32)
    x[0, :BLOCK] = 0
    x_row = rng.integers(0, P + 2, P)
    codes, scale, correction, sums = in_order(poisoned(quantise, x, x_row, kind), kind, P, I)
    scale = scale / np.float32(UNIT.get(kind, 1.0))
    np.testing.assert_array_equal(codes * np.repeat(scale, BLOCK, axis=1), round_q8(x[x_row]))
    totals = codes.reshape(P, -1, BLOCK).astype(np.int32).sum(axis=-1)
    np.testing.assert_array_equal(correction, -CODE_OFFSET[kind] * totals)
    np.testing.assert_array_equal(sums, scale * totals)


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, BLOCK, elements=st.floats(width=32)))
def test_any_block(x):
    """Subnormals, overflow of the scale, NaN and infinity."""
    codes, scale, _, _ = in_order(quantise(x[None], np.zeros(1, np.int64), Q8_0), Q8_0, 1, BLOCK)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(codes * scale, round_q8(x[None]))


def test_ggmls_rule():
    """127 at the largest; halves to even; scale in float16."""
    x = np.zeros((1, BLOCK), np.float32)
    x[0, :5] = [127, 0.5, 1.5, -2.5, 126.4]
    assert round_q8(x)[0, :5].tolist() == [127, 0, 2, -2, 126]
    assert round_q8(np.float32([[1.0] * BLOCK]))[0, 0] == 127 * np.float64(np.float16(1 / 127))
    x[0, 7] = np.inf
    assert np.isnan(round_q8(x)).all()
    assert round_q8(x.astype(np.float64)).dtype == np.float64


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 2.0**17, width=32))
def test_round_to_half(x):
    with np.errstate(over="ignore"):
        assert round_to_half(np.float32(x)) == np.float32(np.float16(x))
