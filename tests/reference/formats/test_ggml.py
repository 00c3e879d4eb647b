"""ggml's blocks against gguf-py, bit for bit, whatever the bytes; and each format once by hand."""

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay.loaders.gguf_file import GGML_TYPES
from assay.reference.formats import (
    GGML_BLOCKS,
    GGML_PLAIN,
    NVFP4_BLOCKS,
    NVFP4_TWO_LEVEL,
    Q1_0,
    Q2_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
)
from assay.reference.formats.packing import split_half_nibbles

FORMATS = {format.name: format for format in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0)}
TYPE = gguf.GGMLQuantizationType


def bits(array: np.ndarray) -> np.ndarray:
    """float32 codes, all NaN as one."""
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))


def assert_same_as_gguf_py(name: str, raw: np.ndarray) -> None:
    """raw uint8 [rows, n, nbytes]."""
    with np.errstate(invalid="ignore"):  # a scale may be infinite or NaN
        ours = FORMATS[name].decode({"blocks": raw})
        theirs = gguf.quants.dequantize(raw.reshape(len(raw), -1), TYPE[name])
    np.testing.assert_array_equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("name", FORMATS)
def test_random_bytes(name):
    raw = np.random.default_rng(1).integers(0, 256, (50, 40, FORMATS[name].nbytes), dtype=np.uint8)
    assert_same_as_gguf_py(name, raw)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_any_bytes(name, data):
    n = data.draw(st.integers(1, 4))
    raw = data.draw(hnp.arrays(np.uint8, (2, n, FORMATS[name].nbytes)))
    assert_same_as_gguf_py(name, raw)


@pytest.mark.parametrize("name", FORMATS)
def test_every_scale(name):
    """All 65,536 float16 scales: subnormal, negative zero, infinite, NaN."""
    raw = np.random.default_rng(2).integers(0, 256, (2**16, 1, FORMATS[name].nbytes), dtype=np.uint8)
    raw[:, 0, :2] = np.arange(2**16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    if name in ("Q4_1", "Q5_1"):
        raw[:, 0, 2:4] = raw[::-1, 0, :2]
    assert_same_as_gguf_py(name, raw)


def test_split_halves():
    assert split_half_nibbles(np.array([0x21, 0x43], np.uint8)).tolist() == [1, 3, 2, 4]


NIBBLES = bytes(j | (15 - j) << 4 for j in range(16))  # elements 0 to 15, then 15 to 0


def test_q4_0_by_hand():
    block = np.frombuffer(struct.pack("<e", -0.5) + NIBBLES, np.uint8)
    wanted = [-0.5 * (q - 8) for q in (*range(16), *range(15, -1, -1))]
    assert Q4_0.decode({"blocks": block[None]}).tolist() == wanted


def test_q4_1_by_hand():
    block = np.frombuffer(struct.pack("<ee", 0.25, -2.0) + NIBBLES, np.uint8)
    wanted = [0.25 * q - 2 for q in (*range(16), *range(15, -1, -1))]
    assert Q4_1.decode({"blocks": block[None]}).tolist() == wanted


def test_q8_0_by_hand():
    block = np.frombuffer(struct.pack("<e32b", 0.125, *range(-128, -96)), np.uint8)
    assert Q8_0.decode({"blocks": block[None]}).tolist() == [0.125 * q for q in range(-128, -96)]


FIFTHS = 0b1010_0101_1111_0000_0000_1111_1100_0011  # bit j is element j's


def five_bit_codes() -> list[int]:
    return [(j if j < 16 else 31 - j) | (FIFTHS >> j & 1) << 4 for j in range(32)]


def test_q5_0_by_hand():
    block = np.frombuffer(struct.pack("<eI", 0.5, FIFTHS) + NIBBLES, np.uint8)
    assert Q5_0.decode({"blocks": block[None]}).tolist() == [0.5 * (q - 16) for q in five_bit_codes()]


def test_q5_1_by_hand():
    block = np.frombuffer(struct.pack("<eeI", 0.5, -3.0, FIFTHS) + NIBBLES, np.uint8)
    assert Q5_1.decode({"blocks": block[None]}).tolist() == [0.5 * q - 3 for q in five_bit_codes()]


def test_q8_1_ignores_its_sum():
    block = np.frombuffer(struct.pack("<ee32b", 0.25, float("nan"), *range(-16, 16)), np.uint8)
    assert Q8_1.decode({"blocks": block[None]}).tolist() == [0.25 * q for q in range(-16, 16)]


def test_q1_0_by_hand():
    block = np.frombuffer(struct.pack("<eQQ", 1.5, 0b101, 1 << 63), np.uint8)
    wanted = [1.5 if j in (0, 2, 127) else -1.5 for j in range(128)]
    assert Q1_0.decode({"blocks": block[None]}).tolist() == wanted


def test_q2_0_by_hand():
    block = np.frombuffer(struct.pack("<e", 2.0) + bytes([0b11100100] * 16), np.uint8)
    assert Q2_0.decode({"blocks": block[None]}).tolist() == [-2, 0, 2, 4] * 16


def nvfp4_block(scales: bytes) -> np.ndarray:
    return np.frombuffer(scales + bytes([0x91, *[0] * 7] * 4), np.uint8)[None]


def test_nvfp4_by_hand():
    """E4M3 0x38 is 1, 0x40 is 2, 0x01 the subnormal 2^-9; elements 0 and 8 of each sub-block are 0.5 and -0.5."""
    got = NVFP4_BLOCKS.decode({"blocks": nvfp4_block(bytes([0x38, 0x40, 0x01, 0x7E]))})
    for i, scale in enumerate((1, 2, 2.0**-9, 448)):
        assert got[16 * i : 16 * i + 16].tolist() == [0.5 * scale, *[0] * 7, -0.5 * scale, *[0] * 7]


def test_nvfp4_scale_has_no_sign_and_7f_is_nan():
    """ggml: bit 7 is ignored too; 0x7F is 0 and 0xFF is 480 there."""
    signed, plain = nvfp4_block(bytes([0xB8, 0x80, 0xC0, 0x81])), nvfp4_block(bytes([0x38, 0x00, 0x40, 0x01]))
    np.testing.assert_array_equal(NVFP4_BLOCKS.decode({"blocks": signed}), NVFP4_BLOCKS.decode({"blocks": plain}))
    for code in (0x7F, 0xFF):
        assert np.isnan(NVFP4_BLOCKS.decode({"blocks": nvfp4_block(bytes([code] * 4))})).all()


def test_second_scale_multiplies_the_rows():
    blocks = np.concatenate([nvfp4_block(bytes([0x38] * 4))[None]] * 3)  # [3, 1, 36]
    parts = {"blocks": blocks, "scale": np.array([1, 0.1, -2], np.float32)}
    got = NVFP4_TWO_LEVEL.decode(parts)
    assert NVFP4_TWO_LEVEL.shape(parts) == got.shape == (3, 64)
    assert got[:, 0].tolist() == [0.5, np.float32(0.1) * np.float32(0.5), -1]


def test_sizes_are_ggml_s():
    """gguf-py's table gives Q8_1 the 40 bytes that it had before its floats became halves, and lacks Q2_0."""
    for number, format in (GGML_BLOCKS | GGML_PLAIN).items():
        ours = GGML_TYPES[number]
        assert format.name == ours.name
        sizes = (format.elements, format.nbytes) if number in GGML_BLOCKS else (1, format.stored.itemsize)
        assert sizes == ours[1:]
        if ours.name not in ("Q8_1", "Q1_0", "Q2_0"):
            assert sizes == gguf.GGML_QUANT_SIZES[TYPE[ours.name]]


def test_leading_axes_stay():
    raw = np.random.default_rng(3).integers(0, 255, (2, 3, 4, 34), dtype=np.uint8)
    raw[..., :2] = np.array([1.0], "<f2").view(np.uint8)
    got = Q8_0.decode({"blocks": raw})
    assert got.shape == Q8_0.shape({"blocks": raw}) == (2, 3, 128)
    np.testing.assert_array_equal(got[1, 2, 32:64], raw[1, 2, 1, 2:].view(np.int8))
