"""Strategies draw what they promise, and the kernel check finds every fault with its operands."""

import re

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from assay.golden.block_forms import BLOCK_FORMS
from assay.golden.strategies import block_arrays, blocks, check_dequantise

Q4_K = BLOCK_FORMS["Q4_K"]
UNSHRUNK = settings(max_examples=2000, phases=[Phase.generate], database=None)


@pytest.mark.parametrize("name", BLOCK_FORMS)
@settings(max_examples=20)
@given(data=st.data())
def test_ordinary_blocks(name, data):
    form = BLOCK_FORMS[name]
    drawn = data.draw(block_arrays(name, max_blocks=3))
    assert drawn.dtype == np.uint8
    assert drawn.shape[1:] == (form.nbytes,)
    assert 1 <= len(drawn) <= 3
    assert form.is_ordinary(drawn).all()


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4", "NVFP4_GGUF", "AFFINE4_BF16", "Q8_K"])
def test_special_scales_on_request(name):
    form = BLOCK_FORMS[name]
    found = find(blocks(name, special=True), lambda block: not form.is_ordinary(block[None])[0], settings=UNSHRUNK)
    assert not form.is_ordinary(found[None])[0]


@pytest.mark.parametrize("edge", [0, 1, 0x8001, 0x7BFF, 0xFBFF])
def test_edges_are_drawn(edge):
    field = BLOCK_FORMS["Q4_0"].fields[0]
    find(
        blocks("Q4_0"),
        lambda block: field.codes(block[None]).view(np.uint16)[0] == edge,
        settings=settings(max_examples=5000),
    )


@pytest.mark.parametrize("name", BLOCK_FORMS)
def test_our_own_decoders_pass(name):
    check_dequantise(name, BLOCK_FORMS[name].decode, special=True, signed_zeros=True, examples=5)


def swapped_nibbles(drawn: np.ndarray) -> np.ndarray:
    return BLOCK_FORMS["MXFP4_GGUF"].decode(
        np.concatenate((drawn[:, :1], drawn[:, 1:] >> 4 | drawn[:, 1:] << 4), axis=1)
    )


def scale_zero_flushed(drawn: np.ndarray) -> np.ndarray:
    values = BLOCK_FORMS["MXFP4"].decode(drawn)
    return np.where(drawn[:, :1] == 0, np.float32(0), values)


def no_upper_scale_bits(drawn: np.ndarray) -> np.ndarray:
    spoilt = drawn.copy()
    spoilt[:, 4:12] &= 63
    return Q4_K.decode(spoilt)


def minimum_added(drawn: np.ndarray) -> np.ndarray:
    spoilt = drawn.copy()
    spoilt[:, 3] ^= 0x80
    return Q4_K.decode(spoilt)


def half_subnormals_flushed(drawn: np.ndarray) -> np.ndarray:
    d = np.ascontiguousarray(drawn[:, :2]).view("<f2").astype(np.float32)
    return np.where(np.abs(d) < 2.0**-14, np.float32(0), BLOCK_FORMS["Q8_0"].decode(drawn))


def one_bit_off(drawn: np.ndarray) -> np.ndarray:
    values = BLOCK_FORMS["Q6_K"].decode(drawn)
    values[:, 200] = np.nextafter(values[:, 200], np.float32(np.inf))
    return values


def one_scale_of_all_wrong(drawn: np.ndarray) -> np.ndarray:
    """Which random blocks would hardly ever show: the vectors have every half."""
    values = BLOCK_FORMS["Q8_0"].decode(drawn)
    values[np.ascontiguousarray(drawn[:, :2]).view("<u2")[:, 0] == 0x1234] += 1
    return values


FAULTS = [
    ("Q8_0", one_scale_of_all_wrong),
    ("MXFP4_GGUF", swapped_nibbles),
    ("MXFP4", scale_zero_flushed),
    ("Q4_K", no_upper_scale_bits),
    ("Q4_K", minimum_added),
    ("Q8_0", half_subnormals_flushed),
    ("Q6_K", one_bit_off),
]


@pytest.mark.parametrize(("name", "kernel"), FAULTS)
def test_faults_are_found(name, kernel):
    with pytest.raises(AssertionError, match=rf"^{name}: \d+ of \d+ elements differ, first in block \d+, element \d+"):
        check_dequantise(name, kernel)


def test_random_blocks_come_after_the_vectors():
    sizes: list[int] = []

    def kernel(drawn: np.ndarray) -> np.ndarray:
        sizes.append(len(drawn))
        return Q4_K.decode(drawn)

    check_dequantise("Q4_K", kernel, examples=30)
    assert sizes[0] > 1000
    assert len(sizes) == 31
    assert max(sizes[1:]) <= 4


def test_the_report_names_operands():
    with pytest.raises(AssertionError) as error:
        check_dequantise("Q4_K", minimum_added)
    lines = str(error.value).splitlines()
    assert re.fullmatch(r"  expected: \S+ \(0x[0-9a-f]{8}\)", lines[1])
    assert re.fullmatch(r"  got: \S+ \(0x[0-9a-f]{8}\)", lines[2])
    assert re.fullmatch(r"  scales: d = \S+ \(F16 at byte 0\), dmin = \S+ \(F16 at byte 2\)", lines[3])
    assert len(bytes.fromhex(lines[4].removeprefix("  block: "))) == 144


def test_a_kernel_of_the_wrong_shape_or_dtype():
    with pytest.raises(AssertionError, match=r"Q4_0: expected float32 \(\d+, 32\), got float64 \(\d+, 32\)"):
        check_dequantise("Q4_0", lambda drawn: BLOCK_FORMS["Q4_0"].decode(drawn).astype(np.float64))


def test_ggml_s_unsigned_zero_passes_unless_asked():
    def without_negative_zero(drawn: np.ndarray) -> np.ndarray:
        return BLOCK_FORMS["MXFP4_GGUF"].decode(drawn) + np.float32(0)

    check_dequantise("MXFP4_GGUF", without_negative_zero)
    with pytest.raises(AssertionError, match=r"expected: -0 \(0x80000000\)"):
        check_dequantise("MXFP4_GGUF", without_negative_zero, signed_zeros=True)


def test_a_disputed_scale_is_left_out_unless_asked():
    def infinite_at_255(drawn: np.ndarray) -> np.ndarray:
        return np.where(drawn[:, :1] == 255, np.float32(np.inf), BLOCK_FORMS["MXFP4"].decode(drawn))

    check_dequantise("MXFP4", infinite_at_255)
    with pytest.raises(AssertionError, match="scale = nan"):
        check_dequantise("MXFP4", infinite_at_255, special=True)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "MXFP4_GGUF", "NVFP4_GGUF"])
def test_ggml_s_own_kernels_pass(name):
    from tests.reference.formats import libggml

    check_dequantise(name, lambda drawn: libggml.dequantize(name.removesuffix("_GGUF"), drawn))


@pytest.mark.parametrize(
    ("name", "code", "ordinary"),
    [
        ("NVFP4_GGUF", 0xB8, False),  # a sign that ggml ignores
        ("NVFP4_GGUF", 0x7F, False),
        ("NVFP4", 0xB8, True),
        ("MXFP4", 0, True),
        ("MXFP4", 255, False),
    ],
)
def test_which_scales_are_disputed(name, code, ordinary):
    block = np.zeros((1, BLOCK_FORMS[name].nbytes), np.uint8)
    block[0, 0] = code
    assert BLOCK_FORMS[name].is_ordinary(block).tolist() == [ordinary]
