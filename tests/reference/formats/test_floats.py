"""Plain floats: every code of the 16-bit formats, against ml_dtypes, gguf-py and struct."""

import ctypes
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.reference.formats import BF16, F16, F32, F64, I8, I16, I32, I64

ALL_CODES = np.arange(2**16, dtype="<u2")


def test_bfloat16_every_code_against_ml_dtypes():
    got = BF16.decode({"values": ALL_CODES})
    wanted = ALL_CODES.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


def test_bfloat16_every_code_against_gguf_py():
    wanted = gguf.quants.dequantize(ALL_CODES.view(np.uint8), gguf.GGMLQuantizationType.BF16)
    np.testing.assert_array_equal(BF16.decode({"values": ALL_CODES}).view(np.uint32), wanted.view(np.uint32))


def test_float16_every_code_against_struct():
    got = F16.decode({"values": ALL_CODES.view("<f2")})
    wanted = np.array([struct.unpack("<e", struct.pack("<H", code))[0] for code in range(2**16)], np.float32)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(wanted[~np.isnan(got)]))


def test_float32_is_itself():
    values = np.array([[1.5, -0.0], [np.inf, 1e-45]], "<f4")
    got = F32.decode({"values": values})
    assert got.tobytes() == values.tobytes()
    assert F32.shape({"values": values}) == (2, 2)


@given(st.floats(width=64))
def test_float64_rounds_as_c_does(value):
    got = F64.decode({"values": np.array([value], "<f8")})
    np.testing.assert_array_equal(got, np.float32(ctypes.c_float(value).value))


@pytest.mark.parametrize(
    ("format", "bits"), [(I8, 8), (I16, 16), (I32, 32), (I64, 64)], ids=["I8", "I16", "I32", "I64"]
)
@given(data=st.data())
def test_integers_round_as_c_does(format, bits, data):
    value = data.draw(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    got = format.decode({"values": np.array([value], format.stored)})
    assert got.dtype == np.float32
    # through float64 alone, 64-bit integers would be rounded twice
    scale = max(0, value.bit_length() - 53)
    sticky = (value >> scale) | bool(value & (1 << scale) - 1)
    assert got.tolist() == [ctypes.c_float(float(sticky)).value * 2.0**scale]
