"""Packed codes against a plain reading of the bytes as one long little-endian integer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.reference.formats.packing import as_bytes, pack_codes, pack_split_half, split_half_nibbles, unpack_codes

BITS = (1, 2, 3, 4, 5, 6, 8)


@given(st.sampled_from(BITS), st.integers(1, 5), st.data())
def test_unpack_reads_one_long_integer(bits, eights, data):
    raw = data.draw(st.binary(min_size=bits * eights, max_size=bits * eights))
    number = int.from_bytes(raw, "little")
    wanted = [number >> bits * i & 2**bits - 1 for i in range(8 * eights)]
    codes = unpack_codes(np.frombuffer(raw, np.uint8), bits)
    assert codes.tolist() == wanted
    assert codes.dtype == np.uint8
    assert pack_codes(codes, bits).tobytes() == raw


@pytest.mark.parametrize("bits", BITS)
def test_leading_axes_stay(bits):
    raw = np.random.default_rng(bits).integers(0, 256, (2, 3, 2 * bits), dtype=np.uint8)
    codes = unpack_codes(raw, bits)
    assert codes.shape == (2, 3, 16)
    np.testing.assert_array_equal(codes[1, 2], unpack_codes(raw[1, 2], bits))
    np.testing.assert_array_equal(pack_codes(codes, bits), raw)


def test_six_bits_cross_bytes():
    """Codes 1, 2, 3, 63 as bits, least significant first: 100000 010000 110000 111111."""
    assert pack_codes(np.array([1, 2, 3, 63, 0, 0, 0, 0], np.uint8), 6).tolist() == [0x81, 0x30, 0xFC, 0, 0, 0]


def test_split_half_and_back():
    assert pack_split_half(np.array([1, 3, 2, 4], np.uint8)).tolist() == [0x21, 0x43]
    codes = np.arange(32, dtype=np.uint8).reshape(1, 32) % 16
    np.testing.assert_array_equal(split_half_nibbles(pack_split_half(codes)), codes)


def test_bytes_of_a_permuted_view():
    words = np.arange(12, dtype="<u4").reshape(2, 3, 2).swapaxes(0, 1)
    assert as_bytes(words)[1, 1].tolist() == [8, 0, 0, 0, 9, 0, 0, 0]
