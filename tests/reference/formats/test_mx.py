"""MXFP4 against ml_dtypes' E2M1 and E8M0 and gguf-py: every element code under every scale."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay.golden.vectors import vectors
from assay.reference.formats import (
    FP4_F16,
    MICROSCALED,
    MXFP4,
    MXFP4_BLOCKS,
    MXFP4_METAL,
    MXFP6_E2M3,
    MXINT8,
    NVFP4,
)
from assay.reference.formats.elements import E2M1, e8m0_to_float32
from assay.reference.formats.packing import unpack_codes

CODES, SCALES = np.arange(16, dtype=np.uint8), np.arange(256, dtype=np.uint8)


def bits(array: np.ndarray) -> np.ndarray:
    """float32 codes, all NaN as one."""
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.astype(np.float32).view(np.uint32))


def test_e2m1_every_code_against_ml_dtypes():
    wanted = CODES.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(bits(E2M1.values), bits(wanted))


def test_e8m0_every_code_against_ml_dtypes():
    wanted = SCALES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(bits(e8m0_to_float32(SCALES)), bits(wanted))


def test_e8m0_ends():
    got = e8m0_to_float32(np.array([0, 1, 127, 254, 255], np.uint8))
    assert got[:4].tolist() == [2.0**-127, 2.0**-126, 1, 2.0**127]
    assert np.isnan(got[4])


def test_low_nibble_first():
    assert unpack_codes(np.array([[0x21, 0x43]], np.uint8), 4).tolist() == [[1, 2, 3, 4]]


def every_pair() -> dict[str, np.ndarray]:
    """256 blocks, one a scale, each with all 16 codes twice: ascending, then descending."""
    order = np.concatenate((CODES, CODES[::-1]))
    packed = order[0::2] | order[1::2] << 4
    return {"blocks": np.tile(packed, (256, 1, 1)), "scales": SCALES[:, None]}


def as_ggml(parts: dict[str, np.ndarray]) -> np.ndarray:
    """The same blocks in GGUF's order: scale first, then elements j and j + 16 in byte j."""
    nibbles = np.stack((parts["blocks"] & 15, parts["blocks"] >> 4), -1).reshape(*parts["blocks"].shape[:-1], 32)
    return np.concatenate((parts["scales"][..., None], nibbles[..., :16] | nibbles[..., 16:] << 4), -1)


def scalar_value(code: int, scale: int) -> float:
    """OCP MX v1.0, 5.3.3 and 5.4.1, in Python's exact floats."""
    if scale == 255:
        return float("nan")
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    element = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return sign * element * 2.0 ** (scale - 127)


def test_every_code_under_every_scale():
    order = [*range(16), *range(15, -1, -1)]
    wanted = np.array([[scalar_value(code, scale) for code in order] for scale in range(256)])
    with np.errstate(over="ignore"):  # 2^128 and more, from scale 252 on, is infinite in float32
        got, wanted32 = MXFP4.decode(every_pair()), wanted.astype(np.float32)
    np.testing.assert_array_equal(bits(got), bits(wanted32))
    assert np.isfinite(got[:252]).all()


def test_both_layouts_decode_to_the_same_bits():
    parts = every_pair()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(
            bits(MXFP4_BLOCKS.decode({"blocks": as_ggml(parts)})), bits(MXFP4.decode(parts)), strict=True
        )


def test_every_code_against_gguf_py_and_the_two_places_where_it_differs():
    """gguf-py reads scale 255 as 2^128 where OCP says NaN, and -0 as 0; nothing else differs."""
    raw = as_ggml(every_pair())
    with np.errstate(over="ignore", invalid="ignore"):
        ours = MXFP4_BLOCKS.decode({"blocks": raw})
        theirs = gguf.quants.dequantize(raw.reshape(256, 17), gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(ours[:255], theirs[:255])  # as numbers: -0 equals 0
    zero = ours[:255] == 0
    np.testing.assert_array_equal(bits(ours[:255])[~zero], bits(theirs[:255])[~zero])
    assert np.count_nonzero(np.signbit(ours[:255][zero])) == 255 * 2
    assert not np.signbit(theirs[:255][zero]).any()
    assert np.isnan(ours[255]).all()
    assert theirs[255, :4].tolist() == [0, 2.0**127, np.inf, np.inf]
    assert theirs[0, :4].tolist() == ours[0, :4].tolist() == [0, 2.0**-128, 2.0**-127, 1.5 * 2.0**-127]


@given(hnp.arrays(np.uint8, (3, 2, 16)), hnp.arrays(np.uint8, (3, 2), elements=st.integers(0, 250)))
def test_any_blocks_both_layouts_and_gguf_py(blocks, scales):
    parts = {"blocks": blocks, "scales": scales}
    got = MXFP4.decode(parts)
    np.testing.assert_array_equal(bits(MXFP4_BLOCKS.decode({"blocks": as_ggml(parts)})), bits(got))
    rows = as_ggml(parts).reshape(3, 34)
    np.testing.assert_array_equal(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.MXFP4), got)
    assert got.shape == MXFP4.shape(parts) == MXFP4_BLOCKS.shape({"blocks": as_ggml(parts)}) == (3, 64)


@pytest.mark.parametrize(
    ("code", "scale", "wanted"), [(0x7F, 127, [-6, 6]), (0x19, 128, [-1, 1]), (0x80, 130, [0, -0.0])]
)
def test_literal_bytes(code, scale, wanted):
    got = MXFP4.decode({"blocks": np.full((1, 16), code, np.uint8), "scales": np.array([scale], np.uint8)})
    assert got.tolist() == wanted * 16
    np.testing.assert_array_equal(np.signbit(got), np.signbit(wanted * 16))


# --- the whole family ---


def test_int8_every_code_under_every_scale():
    """Two's complement sixty-fourths times a power of two, in float64."""
    blocks, expected = vectors("MXINT8")
    scale, codes = blocks[:, :1].astype(int), np.ascontiguousarray(blocks[:, 1:]).view(np.int8)
    wanted = np.ldexp(codes / 64, scale - 127)
    with np.errstate(over="ignore"):
        wanted32 = np.where(scale == 255, np.nan, wanted).astype(np.float32)
    np.testing.assert_array_equal(bits(expected), bits(wanted32))
    assert {(int(s), int(c)) for s, row in zip(blocks[:, 0], codes, strict=True) for c in row} == {
        (s, c) for s in range(256) for c in range(-128, 128)
    }


def test_metal_packing_by_the_kernel_s_own_bit_trick():
    """openai/gpt-oss moematmul.metal: the nibble becomes a half that is E2M1 2^-14, times the byte as an exponent."""
    blocks, expected = vectors("MXFP4_METAL")
    nibbles = unpack_codes(blocks[:, 1:], 4).astype(np.uint16)
    halves = ((nibbles << 1) + 0x70 & 0x8E) << 8
    scale = (blocks[:, :1].astype(np.uint32) << 23).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = halves.view(np.float16).astype(np.float32) * scale
    kernel_agrees = (blocks[:, 0] > 0) & (blocks[:, 0] < 255)  # it reads 0 as 0 and 255 as infinity
    np.testing.assert_array_equal(bits(expected[kernel_agrees]), bits(wanted[kernel_agrees]))


def test_metal_packing_is_mxfp4_with_scales_fourteen_larger():
    blocks, scales = every_pair()["blocks"], np.arange(256, dtype=np.uint8)[:, None]
    shifted = MXFP4_METAL.decode({"blocks": blocks[14:255], "scales": scales[14:255]})
    plain = MXFP4.decode({"blocks": blocks[14:255], "scales": scales[:241]})
    np.testing.assert_array_equal(bits(shifted), bits(plain))


def test_sixteen_bit_scale_by_hand():
    """32 values of E2M1 and a float16 are 18 bytes; elements 0 and 1 are -6 and 0.5 under a scale of 0.75."""
    blocks = np.array([[0x1F, *[0] * 15]], np.uint8)
    got = FP4_F16.decode({"blocks": blocks, "scales": np.array([0.75], np.float16)})
    assert got.tolist() == [-4.5, 0.375, *[0] * 30]
    assert FP4_F16.group_bytes + FP4_F16.scale.stored.itemsize == 18


@pytest.mark.parametrize(
    ("half", "wanted"), [(np.inf, np.inf), (-np.inf, -np.inf), (np.nan, np.nan), (2.0**-24, 2.0**-24)]
)
def test_sixteen_bit_scale_edges(half, wanted):
    got = FP4_F16.decode({"blocks": np.full((1, 16), 0x02, np.uint8), "scales": np.array([half], np.float16)})
    np.testing.assert_array_equal(got[0], np.float32(half))
    if not np.isfinite(half):
        assert np.isnan(got[1])  # zero times infinity


def test_nvfp4_scale_has_a_sign_and_a_nan():
    parts = {"blocks": np.full((3, 8), 0x01, np.uint8), "scales": np.array([0xB8, 0x7F, 0xFF], np.uint8)}
    got = NVFP4.decode(parts).reshape(3, 16)
    assert got[0].tolist() == [-0.5, -0.0] * 8
    assert np.isnan(got[1:]).all()


def test_six_bit_elements_by_hand():
    """Codes 1 (0.125), 0x1F (7.5), 0x20 (-0) and 0x3F (-7.5) in three bytes, under 2^1."""
    raw = sum(code << 6 * i for i, code in enumerate((1, 0x1F, 0x20, 0x3F))).to_bytes(3, "little")
    parts = {"blocks": np.frombuffer(raw * 8, np.uint8)[None], "scales": np.array([128], np.uint8)}
    assert MXFP6_E2M3.decode(parts).tolist() == [0.25, 15, 0, -15] * 8


@pytest.mark.parametrize("format", MICROSCALED.values(), ids=lambda format: format.name)
def test_leading_axes_stay(format):
    rng = np.random.default_rng(5)
    scales = np.full((2, 3, 4), 1, format.scale.stored)
    parts = {"blocks": rng.integers(0, 256, (2, 3, 4, format.group_bytes), dtype=np.uint8), "scales": scales}
    got = format.decode(parts)
    assert got.shape == format.shape(parts) == (2, 3, 4 * format.group)
    alone = format.decode({key: part[1, 2, 3:] for key, part in parts.items()})
    np.testing.assert_array_equal(bits(got[1, 2, -format.group :]), bits(alone))


def test_int8_lowest_code():
    """-2, which the standard lets encoders leave unused, decodes all the same."""
    parts = {"blocks": np.full((1, 32), 0x80, np.uint8), "scales": np.array([127], np.uint8)}
    assert (MXINT8.decode(parts) == -2).all()
