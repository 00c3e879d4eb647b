"""MLX's affine groups against a scalar twin that unpacks one code at a time."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.reference.formats import BF16, F16, F32, MLX_BITS, AffineGroups
from tests.checkpoint_files import opened

FORMATS = {"F16": F16, "BF16": BF16, "F32": F32}


def scalar_twin(words: list[int], scales: list[float], biases: list[float], bits: int, group_size: int) -> list[float]:
    """w = s q + b, the product and the sum in exact arithmetic, one rounding to float32 at the end."""
    number = sum(word << 32 * k for k, word in enumerate(words))  # codes may cross words
    values = []
    for i in range(group_size * len(scales)):
        at = i * bits
        q = number >> at & (2**bits - 1)
        s, b = Fraction(scales[i // group_size]), Fraction(biases[i // group_size])
        values.append(s * q + b)
    return [float(np.float32(float(value))) for value in values]


def random_parts(
    rng: np.random.Generator, rows: int, n: int, bits: int, group_size: int, kind: str
) -> dict[str, np.ndarray]:
    stored = FORMATS[kind].stored
    parts = {"weight": rng.integers(0, 2**32, (rows, n * group_size * bits // 32), dtype=np.uint32)}
    for name in ("scales", "biases"):
        values = rng.normal(size=(rows, n)) * 2.0 ** rng.integers(-12, 3, (rows, n))
        code = values.astype(np.float32)
        parts[name] = (code.view(np.uint32) >> 16).astype(stored) if kind == "BF16" else code.astype(stored)
    return parts


@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from(MLX_BITS),
    group_size=st.sampled_from([32, 64, 128]),
    n=st.integers(1, 3),
    kind=st.sampled_from(["F16", "BF16"]),
)
def test_against_the_scalar_twin(seed, bits, group_size, n, kind):
    """16-bit scales: the product of 11 by 8 bits is exact in float32, so the one rounding is that of the sum."""
    parts = random_parts(np.random.default_rng(seed), 2, n, bits, group_size, kind)
    encoding = AffineGroups(bits, group_size, FORMATS[kind])
    got = encoding.decode(parts)
    assert got.dtype == np.float32
    assert got.shape == encoding.shape(parts) == (2, n * group_size)
    for row in range(2):
        scales, biases = (FORMATS[kind].to_float32(parts[name][row]).tolist() for name in ("scales", "biases"))
        assert got[row].tolist() == scalar_twin(parts["weight"][row].tolist(), scales, biases, bits, group_size)


def test_codes_least_significant_bits_first():
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    four = AffineGroups(4, 8, F32).decode(
        {"weight": np.array([[0x87654321]], np.uint32), "scales": one, "biases": zero}
    )
    assert four.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    eight = AffineGroups(8, 4, F32).decode(
        {"weight": np.array([[0xFF800201]], np.uint32), "scales": one, "biases": zero}
    )
    assert eight.tolist() == [[1, 2, 128, 255]]  # unsigned


def test_each_group_has_its_own_scale_and_bias():
    weight = np.array([[0x01010101, 0x02020202]], np.uint32)
    parts = {
        "weight": weight,
        "scales": np.array([[10.0, 100.0]], np.float32),
        "biases": np.array([[1.0, -1.0]], np.float32),
    }
    assert AffineGroups(8, 4, F32).decode(parts).tolist() == [[11, 11, 11, 11, 199, 199, 199, 199]]


@pytest.mark.parametrize(("bits", "group_size", "name"), [(4, 32, "affine4/32"), (8, 64, "affine8/64")])
def test_name(bits, group_size, name):
    assert AffineGroups(bits, group_size, F16).name == name


@pytest.mark.parametrize(
    ("checkpoint", "tensor"),
    [
        ("llama/mlx-4bit", "model.layers.1.mlp.down_proj.weight"),
        ("llama/mlx-4bit", "model.embed_tokens.weight"),
        ("gpt_oss/mlx-q8", "model.layers.0.self_attn.q_proj.weight"),
        ("gpt_oss/mlx-q8", "model.layers.2.mlp.router.weight"),
    ],
)
def test_what_mlx_wrote_decodes_like_the_scalar_twin(checkpoint, tensor):
    stored = opened(checkpoint).tensors[tensor]
    encoding, got = stored.encoding, stored.decode()
    for row in (0, len(got) - 1):
        scales, biases = (
            encoding.scale_format.to_float32(stored.parts[name][row]).tolist() for name in ("scales", "biases")
        )
        words = stored.parts["weight"][row].tolist()
        assert got[row].tolist() == scalar_twin(words, scales, biases, encoding.bits, encoding.group_size)
