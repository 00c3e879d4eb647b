"""K-quants against gguf-py: random bytes, every field alone, and each layout once from a scalar twin."""

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay.golden.vectors import pack_six_bit_pairs, pack_six_bit_scales
from assay.reference.formats import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K
from assay.reference.formats.kquants import six_bit_pairs, six_bit_scales
from tests.reference.formats.compare import assert_same_bits

FORMATS = {format.name: format for format in (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)}
# where each format's float16 fields lie
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def assert_same_as_gguf_py(name: str, blocks: np.ndarray) -> None:
    """blocks uint8 [n, nbytes]."""
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert_same_bits(FORMATS[name].decode({"blocks": blocks[:, None]}), theirs)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_any_bytes(name, data):
    assert_same_as_gguf_py(name, data.draw(hnp.arrays(np.uint8, (2, FORMATS[name].nbytes))))


@pytest.mark.parametrize("name", FORMATS)
def test_every_bit_alone(name):
    """Each bit of the block set by itself under scales of 1, so that no field can hide behind another."""
    nbytes = FORMATS[name].nbytes
    blocks = np.zeros((8 * nbytes, nbytes), np.uint8)
    blocks[np.arange(8 * nbytes), np.arange(8 * nbytes) // 8] = 1 << np.arange(8 * nbytes) % 8
    for offset in HALVES[name]:
        blocks[:, offset + 1] |= 0x3C
    assert_same_as_gguf_py(name, blocks)


@given(hnp.arrays(np.uint8, 16, elements=st.integers(0, 63)))
def test_six_bit_packings_invert(values):
    scales, minima = six_bit_pairs(pack_six_bit_pairs(values[:8], values[8:]))
    assert [*scales, *minima] == values.tolist()
    assert six_bit_scales(pack_six_bit_scales(values)).tolist() == values.tolist()


@given(st.binary(min_size=12, max_size=12), st.integers(0, 7))
def test_six_bit_pairs_as_ggml_reads_them(packed, j):
    """get_scale_min_k4, one pair at a time."""
    if j < 4:
        wanted = packed[j] & 63, packed[j + 4] & 63
    else:
        wanted = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4
    scales, minima = six_bit_pairs(np.frombuffer(packed, np.uint8))
    assert (scales[j], minima[j]) == wanted


def test_q4_k_by_hand():
    """Sub-block 5 has scale 33 and minimum 10, all else is zero; d is 0.5 and dmin 2."""
    fields = np.zeros(16, np.uint8)
    fields[5], fields[13] = 33, 10
    codes = bytes(64) + bytes(q << 4 for q in range(16)) * 2 + bytes(32)
    packed = pack_six_bit_pairs(fields[:8], fields[8:]).tobytes()
    block = np.frombuffer(struct.pack("<ee", 0.5, 2) + packed + codes, np.uint8)
    got = Q4_K.decode({"blocks": block[None]}).reshape(8, 32)
    assert got[5].tolist() == [16.5 * (q % 16) - 20 for q in range(32)]
    assert not got[[0, 1, 2, 3, 4, 6, 7]].any()


def test_q8_k_ignores_its_sums():
    """The one product is rounded: 0.1 as float32 times 3."""
    block = np.frombuffer(struct.pack("<f256b16h", 0.1, *range(-128, 128), *[7] * 16), np.uint8)
    wanted = [np.float32(0.1) * np.float32(q) for q in range(-128, 128)]
    assert Q8_K.decode({"blocks": block[None]}).tolist() == wanted
