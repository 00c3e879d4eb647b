"""Each decode kernel against its reference twin, bit for bit, on any bytes at all."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.fast.cpu.decode import decode_rows, float_to_half
from assay.fast.cpu.jit import CHECKED
from assay.fast.cpu.rows import encoded_rows
from assay.reference.formats import (
    BF16,
    F16,
    F32,
    MXFP4,
    MXFP4_BLOCKS,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    AffineGroups,
)
from assay.reference.weights import Tensor
from tests.fast.cpu.poison import poisoned

BLOCKS = [Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, MXFP4_BLOCKS]


def raw(shape, dtype=np.uint8):
    """Arrays of any bits."""
    nbytes = np.dtype(dtype).itemsize
    return arrays(np.uint8, (*shape[:-1], shape[-1] * nbytes)).map(lambda a: a.view(dtype))


def assert_same_bits(tensor: Tensor) -> None:
    """Rows decoded by the kernels equal the reference's in every bit; NaN equals NaN."""
    with np.errstate(all="ignore"):
        want = tensor.decode().reshape(-1, tensor.shape[-1])
        got = poisoned(decode_rows, encoded_rows(tensor), np.arange(len(want)))
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), ~numbers)
    np.testing.assert_array_equal(got.view(np.uint32)[numbers], want.view(np.uint32)[numbers])


@pytest.mark.parametrize("record", [F32, F16, BF16], ids=lambda r: r.name)
@settings(deadline=None)  # the first example compiles
@given(data=st.data())
def test_plain(record, data):
    values = data.draw(raw((3, 5), record.stored))
    assert_same_bits(Tensor("w", (3, 5), record, {"values": values}))


@pytest.mark.parametrize("record", BLOCKS, ids=lambda r: r.name)
@settings(deadline=None)  # the first example compiles
@given(data=st.data())
def test_blocks(record, data):
    blocks = data.draw(raw((3, 2, record.nbytes)))
    assert_same_bits(Tensor("w", (3, 2 * record.elements), record, {"blocks": blocks}))


@settings(deadline=None)
@given(blocks=raw((3, 2, 16)), scales=raw((3, 2)))
def test_mxfp4_adjacent(blocks, scales):
    assert_same_bits(Tensor("w", (3, 64), MXFP4, {"blocks": blocks, "scales": scales}))


@pytest.mark.parametrize("side", [F32, F16, BF16], ids=lambda r: r.name)
@pytest.mark.parametrize("bits", [4, 8])
@settings(deadline=None)  # the first example compiles
@given(data=st.data())
def test_affine(bits, side, data):
    parts = {
        "weight": data.draw(raw((2, 64 * bits // 32), np.uint32)),
        "scales": data.draw(raw((2, 2), side.stored)),
        "biases": data.draw(raw((2, 2), side.stored)),
    }
    assert_same_bits(Tensor("w", (2, 64), AffineGroups(bits, 32, side), parts))


def test_every_float16():
    """All 65536 codes, subnormals, infinities and NaN among them."""
    codes = np.arange(65536, dtype=np.uint16).view("<f2").reshape(256, 256)
    assert_same_bits(Tensor("w", (256, 256), F16, {"values": codes}))


@pytest.mark.parametrize("adjacent", [True, False])
def test_every_mxfp4_scale(adjacent):
    """All scale bytes with all nibbles: 0 (subnormal), 254 (overflows from 2 on), 255 (NaN), negative zero."""
    scales = np.arange(256, dtype=np.uint8).reshape(256, 1)
    nibbles = np.tile(np.arange(16, dtype=np.uint8) * 17, (256, 1))
    if adjacent:
        assert_same_bits(Tensor("w", (256, 32), MXFP4, {"blocks": nibbles[:, None], "scales": scales}))
    else:
        blocks = np.concatenate((scales, nibbles), 1)[:, None]
        assert_same_bits(Tensor("w", (256, 32), MXFP4_BLOCKS, {"blocks": blocks}))


def test_mxfp4_literal_block():
    """2^(128-127) times E2M1 by hand: nibble order and signs, written out."""
    blocks = np.zeros((1, 1, 17), np.uint8)
    blocks[0, 0, :4] = 128, 0x71, 0x8F, 0x20
    got = decode_rows(encoded_rows(Tensor("w", (1, 32), MXFP4_BLOCKS, {"blocks": blocks})), np.arange(1))[0]
    np.testing.assert_array_equal(got[:3], [1, -12, 0])
    np.testing.assert_array_equal(got[16:19], [12, -0.0, 2])
    assert np.signbit(got[17])


@pytest.mark.parametrize("d", [0x0001, 0x03FF, 0x8001, 0x8000, 0x7BFF])
def test_subnormal_and_extreme_scales(d):
    """Half scales that are subnormal, negative zero or the largest."""
    for record in BLOCKS[:3]:
        blocks = np.random.default_rng(0).integers(0, 256, (4, 1, record.nbytes), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.uint16(d).tobytes(), np.uint8)
        assert_same_bits(Tensor("w", (4, 32), record, {"blocks": blocks}))


@pytest.mark.parametrize("record", BLOCKS, ids=lambda r: r.name)
def test_gguf_decodes_the_same(record):
    """ggml's own Python decoder, on ordinary scales."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 2, record.nbytes), dtype=np.uint8)
    first = 208 if record is Q6_K else 0
    scales = 4 if record in (Q4_1, Q5_1, Q4_K, Q5_K) else 2
    blocks[..., first : first + scales] = rng.normal(size=(3, 2, scales // 2)).astype("<f2").view(np.uint8)
    if record is MXFP4_BLOCKS:
        blocks[..., 0] = rng.integers(0, 255, (3, 2))
    want = dequantize(blocks.reshape(3, -1), GGMLQuantizationType[record.name])
    got = decode_rows(encoded_rows(Tensor("w", (3, 2 * record.elements), record, {"blocks": blocks})), np.arange(3))
    np.testing.assert_array_equal(got, want)  # not bits: its integer table has no negative zero for MXFP4


@settings(max_examples=20, deadline=None)
@given(ids=st.lists(st.integers(0, 4), min_size=1, max_size=7))
def test_rows_are_chosen_by_id(ids):
    values = np.arange(15, dtype=np.float32).reshape(5, 3)
    rows = encoded_rows(Tensor("w", (5, 3), F32, {"values": values}))
    np.testing.assert_array_equal(decode_rows(rows, np.array(ids)), values[ids])


@given(bits=st.integers(0, 2**32 - 1))
@settings(max_examples=2000, deadline=None)
def test_float_to_half(bits):
    assert_rounds_to_half(bits)


def test_float_to_half_at_every_boundary():
    """Each float16, the point halfway to the next, and what lies beside the two."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (halves + np.append(halves[1:], np.float32(65536))) / np.float32(2)  # exact
    for number in np.concatenate((halves, middle)).view(np.uint32)[:: 7 if CHECKED else 1]:
        for bits in range(max(0, int(number) - 1), int(number) + 2):
            assert_rounds_to_half(bits)
            assert_rounds_to_half(bits | 0x80000000)


def assert_rounds_to_half(bits):
    """As NumPy rounds the float32 with these bits."""
    x = np.uint32(bits).view(np.float32)
    with np.errstate(all="ignore"):
        want = x.astype(np.float16)
    got = np.uint16(float_to_half(x))
    assert got == want.view(np.uint16) or (np.isnan(want) and np.isnan(got.view(np.float16))), hex(bits)
