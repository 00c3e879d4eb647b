"""ggml's quantisers: by hand, against gguf-py, and in the peers lane against the C library, exceptions included."""

import struct

import gguf
import numpy as np
import pytest

from assay.reference.formats import MXFP4_BLOCKS, NVFP4_BLOCKS, Q4_0, Q5_0
from assay.reference.formats.encode_ggml import GGML_ENCODERS, e4m3_as_ggml
from tests.reference.formats.encoding_witnesses import samples


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_against_gguf_py(name):
    """Without zeros of either sign alone in a group: of scales that are zero, gguf-py has other signs than C."""
    values = samples(800) + np.float32(0)
    values = values[np.abs(values).reshape(len(values), -1, 32).max(axis=2).all(axis=1)]
    with np.errstate(all="ignore"):
        theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    ours = GGML_ENCODERS[name](values)
    np.testing.assert_array_equal(ours, theirs.reshape(ours.shape))
    assert len(values) > 200


def test_q4_0_by_hand():
    """The value of largest magnitude, -4, gets code 0 and d = 0.5; 3.9 would be 15.8, and 15 is the last."""
    values = np.array([[-4, 3.9, 0, 0.25, *[0] * 28]], np.float32)
    block = GGML_ENCODERS["Q4_0"](values)[0, 0]
    assert block[:2].tobytes() == struct.pack("<e", 0.5)
    assert [q & 15 for q in block[2:6]] == [0, 15, 8, 9]


def test_q8_0_rounds_halves_away_from_zero():
    values = np.array([[127, 0.5, 1.5, -0.5, -2.5, np.nextafter(np.float32(0.5), 0), *[0] * 26]], np.float32)
    block = GGML_ENCODERS["Q8_0"](values)[0, 0]
    assert block[:2].tobytes() == struct.pack("<e", 1)
    assert block[2:8].view(np.int8).tolist() == [127, 1, 2, -1, -3, 0]


def test_mxfp4_ties_go_to_zero_and_large_ones_saturate():
    values = np.array([[7.9, 0.25, 0.75, -0.25, -0.75, 5, -5, -0.0, *[0] * 24]], np.float32)
    block = GGML_ENCODERS["MXFP4"](values)[0, 0]
    assert block[0] == 127
    assert MXFP4_BLOCKS.decode({"blocks": block[None]})[:8].tolist() == [6, 0, 0.5, 0, -0.5, 4, -4, 0]


def test_mxfp4_scale_is_the_floor_of_a_rounded_logarithm():
    """log2f just below 2^20 is 20 in float32."""
    below = np.nextafter(np.float32(2.0**20), np.float32(0))
    scales = GGML_ENCODERS["MXFP4"](np.array([[below] * 32, [2.0**20 * 0.999] * 32], np.float32))[:, 0, 0]
    assert (scales.astype(int) - 125).tolist() == [20, 19]


def test_nvfp4_scale_quirks():
    """Halves up; 7.5 eighths of the least normal stay 7; 248 and more are 448, although 256 to 416 have codes."""
    x = np.array([1, 1.0625, 1.1875, 17, 7.6 * 2.0**-9, 2.0**-6, 247, 248, 256, 300, 500, 2.0**-10, 1e-9], np.float32)
    codes = e4m3_as_ggml(x)
    assert codes.tolist() == [0x38, 0x39, 0x3A, 0x59, 7, 8, 0x77, 0x7E, 0x7E, 0x7E, 0x7E, 1, 0]


def test_nvfp4_by_hand():
    values = np.zeros((1, 64), np.float32)
    values[0, [0, 8, 16, 63]] = 6, -3, 12, 0.75
    block = GGML_ENCODERS["NVFP4"](values)[0, 0]
    assert block[:4].tolist() == [0x38, 0x40, 0, 0x20]
    np.testing.assert_array_equal(NVFP4_BLOCKS.decode({"blocks": block[None]}), values[0])


@pytest.mark.parametrize("name", GGML_ENCODERS)
def test_leading_axes_stay(name):
    values = samples(6).reshape(2, 3, 256)
    blocks = GGML_ENCODERS[name](values)
    assert blocks.shape[:2] == (2, 3)
    np.testing.assert_array_equal(blocks[1, 2], GGML_ENCODERS[name](values[1, 2]))


# --- docs/encodings.md, "Encoders' exceptions": where C does otherwise ---


def tiny() -> np.ndarray:
    """Groups of subnormal numbers, [1, 256]."""
    return np.linspace(-(2.0**-127), 2.0**-128, 256, dtype=np.float32)[None]


@pytest.mark.peers
@pytest.mark.parametrize(("name", "format"), [("Q4_0", Q4_0), ("Q5_0", Q5_0)])
def test_exception_reciprocals_that_overflow(name, format):
    """C multiplies by an infinite 1/d and casts infinity or NaN to int8; the scale is zero on both sides."""
    from tests.reference.formats import libggml

    ours, theirs = GGML_ENCODERS[name](tiny()), libggml.quantize(name, tiny())
    assert (ours != theirs).any()
    assert not format.decode({"blocks": ours}).any()
    assert not format.decode({"blocks": theirs}).any()


@pytest.mark.peers
def test_exception_mxfp4_exponents_below_zero():
    """C casts a negative float to uint8; ours is clamped to 0."""
    from tests.reference.formats import libggml

    ours, theirs = GGML_ENCODERS["MXFP4"](tiny()), libggml.quantize("MXFP4", tiny())
    assert (ours[..., 0] == 0).all()
    assert (theirs[..., 0] > 100).any()
    error = np.abs(MXFP4_BLOCKS.decode({"blocks": ours}) - tiny())
    assert (error <= 2.0**-129).all()  # half of the least element, 2^-128


@pytest.mark.peers
def test_exception_nvfp4_far_beyond_its_range():
    """From about 2^34 on |4 s - x| and |6 s - x| are one float32, and the first of equals is not the largest."""
    from tests.reference.formats import libggml

    values = np.full((1, 64), 1.5 * 2.0**36, np.float32)
    ours = NVFP4_BLOCKS.decode({"blocks": GGML_ENCODERS["NVFP4"](values)})
    theirs = NVFP4_BLOCKS.decode({"blocks": libggml.quantize("NVFP4", values)})
    assert set(ours[0]) == {6 * 448}
    assert theirs.max() < 6 * 448


@pytest.mark.peers
def test_exception_scales_beyond_float16():
    """C stores infinity, and the block decodes to NaN; ours refuses."""
    from tests.reference.formats import libggml

    values = np.full((1, 32), 1e7, np.float32)
    assert not np.isfinite(Q4_0.decode({"blocks": libggml.quantize("Q4_0", values)})).any()
    with pytest.raises(ValueError, match="exceeds float16's 65504"):
        GGML_ENCODERS["Q4_0"](values)
