"""Quantised inputs against `reference.precision`, and that against ggml's rule spelled out in integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.fast.cpu.groups import Groups, one_group
from assay.fast.cpu.layouts import ADJACENT, OFFSET, UNIT
from assay.fast.cpu.quantise import BLOCK, GRAINS, panel_width, quantise, round_to_half
from assay.fast.cpu.rows import AFFINE4, MXFP4_ADJACENT, MXFP4_SPLIT, Q4_0, Q4_K, Q6_K, Q8_0
from assay.reference.precision import round_q8, round_q8_K
from tests.fast.cpu.poison import poisoned

KINDS = [MXFP4_SPLIT, MXFP4_ADJACENT, Q8_0, Q4_0, AFFINE4, Q4_K, Q6_K]


def in_order(panels, kind, P, I):  # noqa: E741
    """The integers [P,I], and scales, corrections and sums [P,scales], in the order of the inputs."""
    blocks, grains = I // BLOCK, GRAINS[kind]
    codes, sides = np.empty((P, blocks, 8, 4), np.int8), [np.empty((P, blocks * grains)) for _ in range(3)]
    bytes_ = panels.codes.view(np.int8)
    for first, end, at in zip(panels.column[:-1], panels.column[1:], panels.at, strict=True):
        C = panel_width(end - first)
        for p in range(first, end):
            if C == 1 and grains == 1:
                filled = -(-blocks // 4) * 4
                groups = bytes_[32 * at : 32 * (at + filled)].reshape(-1, 8, 4, 4).transpose(0, 2, 1, 3)
                whole = groups.reshape(filled, 8, 4)
                assert not whole[blocks:].any()
                assert not any(side[at + blocks : at + filled].any() for side in panels[1:4])
                codes[p] = whole[:blocks]
            else:
                codes[p] = bytes_[32 * at : 32 * (at + blocks * C)].reshape(blocks, 8, C, 4)[:, :, p - first]
            for side, values in zip(sides, panels[1:4], strict=True):
                begin = at * grains
                side[p] = values[begin : begin + blocks * grains * C].reshape(-1, C)[:, p - first]
    codes = codes.reshape(P, blocks, BLOCK)
    if kind in ADJACENT:
        codes = np.stack((codes[..., :16], codes[..., 16:]), -1)
    return codes.reshape(P, I), *sides


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("P", "blocks"), [(1, 1), (2, 5), (3, 5), (7, 9), (11, 90), (29, 4)])
def test_against_the_twin(kind, P, blocks):
    """Bit for bit, in every order, with blocks of zeros; the corrections and sums are those of the integers."""
    superblocks = kind in (Q4_K, Q6_K)
    I = -(-blocks // 8) * 256 if superblocks else blocks * BLOCK  # noqa: E741
    rng = np.random.default_rng(P)
    x = (rng.normal(size=(P + 2, I)) * 10.0 ** rng.integers(-6, 4, (P + 2, 1))).astype(np.float32)
    x[0, : 256 if superblocks else BLOCK] = 0
    x_row = rng.integers(0, P + 2, P)
    start = np.array([0, P // 3, P])  # two groups
    groups = Groups(np.arange(2), start, x_row, x_row)
    codes, scale, correction, sums = in_order(poisoned(quantise, x, groups, kind), kind, P, I)
    scale = (scale / UNIT.get(kind, 1.0)).astype(np.float32)
    size = BLOCK // GRAINS[kind]
    expected = (round_q8_K if superblocks else round_q8)(x[x_row])
    np.testing.assert_array_equal(codes * np.repeat(scale, size, axis=1), expected)
    totals = codes.reshape(P, -1, size).astype(np.int32).sum(axis=-1)
    np.testing.assert_array_equal(correction, -OFFSET.get(kind, 0) * totals)
    np.testing.assert_array_equal(sums, scale * totals.astype(np.float32))


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, BLOCK, elements=st.floats(width=32)))
def test_any_block(x):
    """Subnormals, overflow of the scale, NaN and infinity."""
    codes, scale, _, _ = in_order(quantise(x[None], one_group(1), Q8_0), Q8_0, 1, BLOCK)
    with np.errstate(invalid="ignore", over="ignore"):
        np.testing.assert_array_equal((codes * scale).astype(np.float32), round_q8(x[None]))


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, 256, elements=st.floats(width=32)))
def test_any_superblock(x):
    """The same, and ties of the largest magnitude: the first one's sign decides."""
    codes, scale, _, _ = in_order(quantise(x[None], one_group(1), Q6_K), Q6_K, 1, 256)
    with np.errstate(invalid="ignore", over="ignore"):
        np.testing.assert_array_equal(codes * np.repeat(scale, 16, axis=1).astype(np.float32), round_q8_K(x[None]))


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
