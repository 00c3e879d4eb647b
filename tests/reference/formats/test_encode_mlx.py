"""MLX's quantisers by hand; mx.quantize itself judges them in test_encode_peers.py."""

import numpy as np
import pytest

from assay.reference.formats import BF16, F16, F32, MXFP4, MXFP8_E4M3, NVFP4, AffineGroups
from assay.reference.formats.encode_elements import ties_to_even
from assay.reference.formats.encode_mlx import encode_affine, encode_mxfp4, encode_mxfp8, encode_nvfp4, round_to


def row(*values: float, size: int = 32) -> np.ndarray:
    return np.array([[*values, *[0] * (size - len(values))]], np.float32)


def test_affine_starts_at_the_end_of_larger_magnitude():
    """-7 to 8 at 4 bits: from 8 down in steps of -1."""
    values = np.arange(-7, 9, dtype=np.float32).repeat(2)[None]
    parts = encode_affine(values, AffineGroups(4, 32, F32))
    assert parts["scales"].tolist() == [[-1]]
    assert parts["biases"].tolist() == [[8]]
    np.testing.assert_array_equal(AffineGroups(4, 32, F32).decode(parts), values)


def test_affine_gives_zero_a_code():
    """-1 to 0.3 in three steps: 1.3/3 is stretched to 1/2, so that two steps lead from -1 to 0."""
    parts = encode_affine(row(-1, 0.3, -0.2), AffineGroups(2, 32, F32))
    assert parts["scales"].tolist() == [[0.5]]
    assert AffineGroups(2, 32, F32).decode(parts)[0, :4].tolist() == [-1, 0.5, 0, 0]


def test_affine_of_zeros_has_the_least_scale():
    parts = encode_affine(row(0), AffineGroups(4, 32, F32))
    assert parts["scales"].tolist() == [[-np.float32(1e-7)]]
    assert not parts["weight"].any()


def test_mxfp4_rounds_its_scale_up():
    parts = encode_mxfp4(row(6.1, 6))
    assert parts["scales"].tolist() == [[128]]
    assert MXFP4.decode(parts)[0, :2].tolist() == [6, 6]


def test_mxfp4_ties_on_a_cpu_and_on_a_gpu():
    values = row(6, 0.75, -3.5)
    assert MXFP4.decode(encode_mxfp4(values))[0, :3].tolist() == [6, 0.5, -3]
    assert MXFP4.decode(encode_mxfp4(values, ties_to_even))[0, :3].tolist() == [6, 1, -4]


def test_mxfp8_and_nvfp4():
    assert MXFP8_E4M3.decode(encode_mxfp8(row(449, 19, -1e-9)))[0, :2].tolist() == [448, 20]
    assert encode_mxfp8(row(449))["scales"].tolist() == [[128]]
    parts = encode_nvfp4(row(6, -0.75, size=16))
    assert parts["scales"].tolist() == [[0x38]]
    assert NVFP4.decode(parts)[0, :2].tolist() == [6, -0.5]


def test_zeros_have_the_scale_one():
    assert encode_mxfp4(row(0))["scales"].tolist() == [[127]]
    assert encode_mxfp8(row(0))["scales"].tolist() == [[127]]
    assert encode_nvfp4(row(0))["scales"].tolist() == [[0, 0]]


def test_rounding_to_the_scale_s_format():
    values = np.array([1.00390625, 1.01171875, -3e38], np.float32)  # two ties of bfloat16
    assert BF16.to_float32(round_to(values, BF16)).tolist()[:2] == [1, 1.015625]
    with pytest.raises(ValueError, match="exceeds F16; choose BF16 or F32"):
        round_to(values, F16)
