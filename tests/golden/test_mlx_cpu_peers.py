"""MLX's arithmetic on a CPU, emulated: equal to what MLX computes here, bit for bit."""

import numpy as np
import pytest

from assay.golden.mlx_cpu import MlxCpuModel, round_to_bfloat16, sequential_rms_norm, unrounded
from assay.golden.rounding import to_bfloat16
from assay.reference.formats import BF16, F16, F32, MLX_MODES, AffineGroups
from assay.reference.weights import Tensor
from tests.fast.models import llama_config

pytestmark = pytest.mark.peers
ROUNDS = {"float32": unrounded, "bfloat16": round_to_bfloat16}
NAME = "model.embed_tokens.weight"
O, I, T = 40, 256, 5  # noqa: E741


@pytest.fixture(autouse=True)
def _cpu_of_x86():
    """Elsewhere MLX adds up in another order: the emulation is not used there."""
    import platform

    import mlx.core as mx

    if mx.default_device().type != mx.cpu or platform.machine() != "x86_64":
        pytest.skip("MLX on a GPU, or on another processor, computes otherwise")


def inputs(seed, *shape):
    return to_bfloat16(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def quantised_by_mlx(mode, group_size, bits, scale_format):
    """Weights of MLX's own making: its arrays in `scale_format`, and the oracle's tensor of them."""
    import mlx.core as mx

    dtype = mx.float16 if scale_format is F16 else mx.bfloat16
    w = mx.array(inputs(0, O, I)).astype(dtype)
    weight, scales, *biases = mx.quantize(w, group_size=group_size, bits=bits, mode=mode)
    if mode != "affine":
        encoding = MLX_MODES[mode]
        blocks = np.array(weight).view(np.uint8).reshape(O, -1, encoding.group_bytes)
        return weight, [scales], Tensor(NAME, (O, I), encoding, {"blocks": blocks, "scales": np.array(scales)})
    floats = [np.array(f.view(mx.uint16)).view(scale_format.stored) for f in (scales, *biases)]
    parts = {"weight": np.array(weight), "scales": floats[0], "biases": floats[1]}
    return weight, [scales, *biases], Tensor(NAME, (O, I), AffineGroups(bits, group_size, scale_format), parts)


AFFINE = ((32, 8), (32, 3), (64, 4), (64, 5), (64, 6), (64, 8), (128, 2))
CASES = [
    *(
        ("affine", group, bits, BF16)
        for group, bits in ((32, 8), (64, 4), (64, 8), (128, 2), (32, 3), (64, 5), (64, 6))
    ),
    ("affine", 64, 4, F16),
    ("mxfp4", 32, 4, BF16),
    ("mxfp8", 32, 8, BF16),
    ("nvfp4", 16, 4, BF16),
]


@pytest.mark.parametrize("dtype", ROUNDS)
@pytest.mark.parametrize(("mode", "group_size", "bits", "scale_format"), CASES)
def test_products_and_rows(mode, group_size, bits, scale_format, dtype):
    """As mlx-lm runs them: its parameters cast to the dtype of the activations."""
    import mlx.core as mx

    weight, floats, tensor = quantised_by_mlx(mode, group_size, bits, scale_format)
    if mode == "affine":
        floats = [f.astype(getattr(mx, dtype)) for f in floats]
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    x = inputs(1, T, I)
    got = mx.quantized_matmul(mx.array(x).astype(getattr(mx, dtype)), weight, *floats, transpose=True, **settings)
    model = MlxCpuModel(llama_config(), {NAME: tensor}, np.dtype(np.float32), round=ROUNDS[dtype])
    np.testing.assert_array_equal(x @ model.weight(NAME).T, np.array(got.astype(mx.float32)))
    np.testing.assert_array_equal(x @ model.weight(NAME, range(8, 24)).T, np.array(got.astype(mx.float32))[:, 8:24])
    rows = mx.dequantize(weight, *floats, **settings).astype(getattr(mx, dtype))
    embedded = model.embed(np.arange(O))
    if mode != "affine" and dtype == "bfloat16":
        embedded = to_bfloat16(embedded)  # the tap is rounded after it
    np.testing.assert_array_equal(embedded, np.array(rows.astype(mx.float32)))


@pytest.mark.parametrize("dtype", ROUNDS)
@pytest.mark.parametrize("columns", [20, 64, 2880])
def test_plain_products(columns, dtype):
    """Added up in float32 in either dtype, the bias with them."""
    import mlx.core as mx

    x, w, bias = inputs(5, T, columns), inputs(6, O, columns), inputs(7, O)
    cast = lambda array: mx.array(array).astype(getattr(mx, dtype))  # noqa: E731
    got = mx.addmm(cast(bias), cast(x), cast(w).T)
    gathered = mx.gather_mm(mx.array(x)[:, None], mx.array(w).T[None], rhs_indices=mx.zeros(T, mx.uint32))
    tensor = Tensor(NAME, w.shape, F32, {"values": w})
    model = MlxCpuModel(llama_config(), {NAME: tensor}, np.dtype(np.float32), round=ROUNDS[dtype])
    ours = x @ model.weight(NAME).T
    np.testing.assert_array_equal(ours, np.array(gathered)[:, 0])
    ours = ours + bias
    ROUNDS[dtype](ours)
    np.testing.assert_array_equal(ours, np.array(got.astype(mx.float32)))


@pytest.mark.parametrize("dtype", ROUNDS)
@pytest.mark.parametrize("mode", ["mxfp4", "affine"])
def test_products_of_experts(mode, dtype):
    import mlx.core as mx

    group_size, bits = {"mxfp4": (32, 4), "affine": (64, 8)}[mode]
    weight, floats, tensor = quantised_by_mlx(mode, group_size, bits, BF16)
    if mode == "affine":
        floats = [f.astype(getattr(mx, dtype)) for f in floats]
    stack = lambda array: array.reshape(4, O // 4, *array.shape[1:])  # noqa: E731
    x = inputs(2, 4, 1, I)
    got = mx.gather_qmm(
        mx.array(x).astype(getattr(mx, dtype)),
        stack(weight),
        *map(stack, floats),
        rhs_indices=mx.array([3, 0, 2, 1]),
        transpose=True,
        group_size=group_size,
        bits=bits,
        mode=mode,
    )
    parts = {name: stack(part) for name, part in tensor.parts.items()}
    tensor = Tensor(NAME, (4, O // 4, I), tensor.encoding, parts)
    model = MlxCpuModel(llama_config(), {NAME: tensor}, np.dtype(np.float32), round=ROUNDS[dtype])
    ours = np.stack([row @ model.weight(NAME, expert).T for row, expert in zip(x, (3, 0, 2, 1), strict=True)])
    np.testing.assert_array_equal(ours, np.array(got.astype(mx.float32)))


@pytest.mark.parametrize("dtype", ROUNDS)
@pytest.mark.parametrize("D", [64, 576, 2880])
def test_rms_norm(D, dtype):
    import mlx.core as mx

    x, weight = inputs(3, 30, D), 1 + inputs(4, D) / 8
    weight = to_bfloat16(weight)
    got = mx.fast.rms_norm(*(mx.array(a).astype(getattr(mx, dtype)) for a in (x, weight)), 1e-5)
    ours = sequential_rms_norm(ROUNDS[dtype], x, weight, 1e-5)
    ROUNDS[dtype](ours)
    np.testing.assert_array_equal(ours, np.array(got.astype(mx.float32)))
