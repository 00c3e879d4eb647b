"""Encodings re-ordered for MLX: by bytes against small literal blocks, by value against the oracle and against MLX."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.fast.metal.layout import AFFINE_OF, Packed, packed
from assay.golden import strategies
from assay.loaders import open_checkpoint
from assay.reference.formats import (
    BF16,
    F16,
    MXFP4,
    MXFP4_BLOCKS,
    MXFP6_E2M3,
    MXFP8_E4M3,
    NVFP4,
    Q6_K,
    Q8_0,
    AffineGroups,
    Microscaled,
)
from assay.reference.weights import Tensor
from tests.checkpoint_files import CHECKPOINTS
from tests.cli.run import run

pytestmark = pytest.mark.peers  # importing assay.fast.metal.layout imports MLX


def decoded_by_mlx(found: Packed) -> np.ndarray:
    """What MLX makes of a packed matrix, float32; bfloat16 scales are given as such."""
    import mlx.core as mx

    floats = [mx.array(part) for part in (found.scales, found.biases) if part is not None]
    if found.biases is not None:
        floats = [(f.view(mx.bfloat16) if f.dtype == mx.uint16 else f).astype(mx.float32) for f in floats]
    values = mx.dequantize(
        mx.array(found.weight), *floats, group_size=found.group_size, bits=found.bits, mode=found.mode
    )
    return np.array(values.astype(mx.float32))


def products_by_mlx(found: Packed, experts: bool = False) -> np.ndarray:
    """The same through the kernels that the model runs: the identity times the matrix."""
    import mlx.core as mx

    columns = found.weight.shape[-1] * 32 // found.bits
    floats = [mx.array(part) for part in (found.scales, found.biases) if part is not None]
    settings = {"group_size": found.group_size, "bits": found.bits, "mode": found.mode, "transpose": True}
    if experts:
        ids = mx.arange(found.weight.shape[0])
        y = mx.gather_qmm(mx.eye(columns), mx.array(found.weight), *floats, rhs_indices=ids, **settings)
    else:
        y = mx.quantized_matmul(mx.eye(columns), mx.array(found.weight), *floats, **settings)
    return np.swapaxes(np.array(y), -1, -2)


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit, zeros of either sign being one value."""
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(
        np.where(got == 0, 0, got).view("<u4"), np.where(expected == 0, 0, expected).view("<u4")
    )


def test_nibbles_by_hand():
    """ggml's byte j holds elements j (low) and j + 16 (high); MLX's holds 2j and 2j + 1."""
    split = np.array([0xF0, 0xE1, 0xD2, 0xC3] * 4, np.uint8)  # elements 0 1 2 3 and so on, then 15 14 13 12
    blocks = np.concatenate(([127], split)).astype(np.uint8)[None, None]
    found = packed(Tensor("w", (1, 32), MXFP4_BLOCKS, {"blocks": blocks}))
    assert found is not None
    np.testing.assert_array_equal(found.weight, [[0x32103210, 0x32103210, 0xCDEFCDEF, 0xCDEFCDEF]])
    np.testing.assert_array_equal(found.scales, [[127]])


def test_mxfp4_words_by_hand():
    blocks = np.arange(16, dtype=np.uint8)[None, None]
    found = packed(Tensor("w", (1, 32), MXFP4, {"blocks": blocks, "scales": np.array([[127]], np.uint8)}))
    assert found is not None
    assert (found.mode, found.bits, found.group_size, found.biases) == ("mxfp4", 4, 32, None)
    np.testing.assert_array_equal(found.weight, [[0x03020100, 0x07060504, 0x0B0A0908, 0x0F0E0D0C]])


MXFP4_BYTES = arrays(np.uint8, (2, 3, 2, 16))
SCALES = arrays(np.uint8, (2, 3, 2), elements=st.integers(0, 252))


@given(MXFP4_BYTES, SCALES)
def test_mxfp4_of_hugging_face_and_mlx(blocks, scales):
    tensor = Tensor("w", (2, 3, 64), MXFP4, {"blocks": blocks, "scales": scales})
    found = packed(tensor)
    assert found is not None
    assert_same_bits(decoded_by_mlx(found), tensor.decode())


@given(MXFP4_BYTES, SCALES)
def test_mxfp4_of_gguf_is_the_same_bytes(codes, scales):
    """The two containers' forms of one tensor become one."""
    parts = {"blocks": np.concatenate((scales[..., None], codes), axis=-1)}
    ggml = Tensor("w", (2, 3, 64), MXFP4_BLOCKS, parts)
    elements = np.concatenate((codes & 15, codes >> 4), axis=-1)
    blocks = elements[..., 0::2] | elements[..., 1::2] << 4
    neighbours = Tensor("w", (2, 3, 64), MXFP4, {"blocks": blocks, "scales": scales})
    one, other = packed(ggml), packed(neighbours)
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(one.weight, other.weight)
    np.testing.assert_array_equal(one.scales, other.scales)
    assert_same_bits(decoded_by_mlx(one), ggml.decode())


def test_every_mxfp4_code_under_every_finite_scale_through_the_kernels():
    import mlx.core as mx

    # an Apple GPU takes float32 below 2^-126 for zero
    scales = np.arange(253, dtype=np.uint8)[:, None]
    if mx.default_device().type != mx.cpu:
        scales = np.maximum(scales, 3)
    blocks = np.broadcast_to(np.arange(16, dtype=np.uint8) * 0x11, (253, 1, 16))
    tensor = Tensor("w", (253, 32), MXFP4, {"blocks": blocks, "scales": scales})
    found = packed(tensor)
    assert found is not None
    assert_same_bits(products_by_mlx(found), tensor.decode())
    stack = Tensor(
        "w", (11, 23, 32), MXFP4, {"blocks": blocks.reshape(11, 23, 1, 16), "scales": scales.reshape(11, 23, 1)}
    )
    found = packed(stack)
    assert found is not None
    assert_same_bits(products_by_mlx(found, experts=True), stack.decode())


FINITE_F16 = np.arange(1 << 16, dtype=np.uint16).view("<f2")
FINITE_F16 = FINITE_F16[np.isfinite(FINITE_F16)]


def q8_0(scales: np.ndarray, codes: np.ndarray) -> Tensor:
    """Blocks of scales float16 [O,n] and codes int8 [O,n,32]."""
    blocks = np.concatenate((scales[..., None].view(np.uint8), codes.view(np.uint8)), axis=-1)
    return Tensor("w", (scales.shape[0], 32 * scales.shape[1]), Q8_0, {"blocks": blocks})


def test_q8_0_every_scale_with_every_code():
    """All 63,488 finite scales times all 256 codes."""
    scales = np.repeat(FINITE_F16[:, None], 8, axis=1)
    codes = np.broadcast_to(np.arange(-128, 128, dtype=np.int8).reshape(8, 32), (*scales.shape, 32))
    tensor = q8_0(scales, codes)
    found = packed(tensor)
    assert found is not None
    assert_same_bits(decoded_by_mlx(found), tensor.decode())


def test_q8_0_through_the_kernel():
    rng = np.random.default_rng(0)
    tensor = q8_0(rng.choice(FINITE_F16, (40, 3)), rng.integers(-128, 128, (40, 3, 32), np.int8))
    found = packed(tensor)
    assert found is not None
    assert (found.mode, found.bits, found.group_size) == ("affine", 8, 32)
    assert_same_bits(products_by_mlx(found), tensor.decode())


@pytest.mark.parametrize("form", AFFINE_OF, ids=lambda form: form.name)
@given(data=st.data())
def test_integers_of_ggml(form, data):
    """Random blocks of every one of them, decoded and through the kernel: the oracle's values."""
    drawn = np.stack([data.draw(strategies.blocks(form.name)) for _ in range(2)])
    tensor = Tensor("w", (1, form.elements * 2), form, {"blocks": drawn[None]})
    found = packed(tensor)
    assert found is not None
    assert (found.mode, found.group_size, found.scales.dtype) == ("affine", 32, np.float32)
    assert_same_bits(decoded_by_mlx(found), tensor.decode())
    assert_same_bits(products_by_mlx(found), tensor.decode())


@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
def test_q8_0_with_a_scale_that_is_not_finite_is_left_to_decoding(scale):
    assert packed(q8_0(np.full((1, 1), scale, "<f2"), np.ones((1, 1, 32), np.int8))) is None


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("group_size", "scale_format"), [(32, F16), (64, BF16), (128, BF16)])
def test_affine_groups_of_mlx_itself(bits, group_size, scale_format):
    """Written by MLX; the oracle's own decoding is equal to MLX's in float32."""
    import mlx.core as mx

    dtype = mx.float16 if scale_format is F16 else mx.bfloat16
    w = mx.array(np.random.default_rng(bits).standard_normal((6, 256))).astype(dtype)
    weight, *floats = mx.quantize(w, group_size=group_size, bits=bits)
    scales, biases = (np.array(f.view(mx.uint16)).view(scale_format.stored) for f in floats)
    encoding = AffineGroups(bits, group_size, scale_format)
    tensor = Tensor("w", (6, 256), encoding, {"weight": np.array(weight), "scales": scales, "biases": biases})
    found = packed(tensor)
    assert found is not None
    np.testing.assert_array_equal(decoded_by_mlx(found), tensor.decode())


@pytest.mark.parametrize(("encoding", "mode"), [(MXFP8_E4M3, "mxfp8"), (NVFP4, "nvfp4")])
def test_other_microscaling_modes_of_mlx(encoding: Microscaled, mode: str):
    import mlx.core as mx

    w = mx.array(np.random.default_rng(1).standard_normal((6, 128)).astype(np.float32))
    weight, scales = mx.quantize(w, mode=mode)
    blocks = np.array(weight).view(np.uint8).reshape(6, -1, encoding.group_bytes)
    tensor = Tensor("w", (6, 128), encoding, {"blocks": blocks, "scales": np.array(scales)})
    found = packed(tensor)
    assert found is not None
    assert (found.mode, found.bits) == (mode, encoding.element.bits)
    np.testing.assert_array_equal(decoded_by_mlx(found), tensor.decode())


def test_rows_split_by_a_layout_change():
    """Un-permuted RoPE rows come as a strided view with more axes."""
    rng = np.random.default_rng(2)
    stored = q8_0(rng.choice(FINITE_F16, (8, 1)), rng.integers(-128, 128, (8, 1, 32), np.int8))
    view = np.swapaxes(stored.parts["blocks"].reshape(2, 2, 2, 1, 34), 1, 2)
    tensor = Tensor("w", (8, 32), Q8_0, {"blocks": view})
    found = packed(tensor)
    assert found is not None
    assert_same_bits(decoded_by_mlx(found), tensor.decode())


@pytest.mark.parametrize("encoding", [Q6_K, MXFP6_E2M3, AffineGroups(4, 16, F16), BF16])
def test_encodings_that_mlx_has_no_layout_for(encoding):
    parts = {name: np.zeros((1, 1, 1), np.uint8) for name in ("blocks", "scales", "values")}
    assert packed(Tensor("w", (1, 32), encoding, parts)) is None


def test_files_that_assay_converts_are_the_same_words(tmp_path: Path) -> None:
    """gpt-oss from Hugging Face to GGUF to MLX and back: one model's words, the oracle's bits, `verify` agrees."""
    files = [CHECKPOINTS / "gpt_oss/hf", tmp_path / "a.gguf", tmp_path / "mlx", tmp_path / "b.gguf"]
    for source, target, container in zip(files, files[1:], ("gguf", "mlx", "gguf"), strict=False):
        assert run("convert", source, target, "--to", container).status == 0
        same = run("verify", source, "--same-as", target)
        assert same.status == 0, same
        assert "the same: 60 tensors, every bit of every decoded value" in same.text
    first, *others = [open_checkpoint(path).tensors for path in files]
    names = [name for name, tensor in first.items() if tensor.encoding is MXFP4]
    assert len(names) == 9
    assert [tensors[names[0]].encoding for tensors in others] == [MXFP4_BLOCKS, MXFP4, MXFP4_BLOCKS]
    for name in names:
        words = packed(first[name])
        assert words is not None
        assert_same_bits(decoded_by_mlx(words), first[name].decode())
        for tensors in others:
            found = packed(tensors[name])
            assert found is not None
            np.testing.assert_array_equal(found.weight, words.weight)
            np.testing.assert_array_equal(found.scales, words.scales)


def test_q8_0_of_a_file_is_what_assay_converts_it_to(tmp_path: Path) -> None:
    source, target = CHECKPOINTS / "llama/gguf-q8_0", tmp_path / "mlx"
    assert run("convert", source, target, "--to", "mlx").status == 0
    assert run("verify", source, "--same-as", target).status == 0
    ggml, mlx = open_checkpoint(source).tensors, open_checkpoint(target).tensors
    names = [name for name, tensor in ggml.items() if tensor.encoding is Q8_0]
    assert len(names) > 10
    for name in names:
        one, other = packed(ggml[name]), packed(mlx[name])
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.weight, other.weight)
        assert_same_bits(decoded_by_mlx(one), ggml[name].decode())
        assert_same_bits(decoded_by_mlx(other), ggml[name].decode())
