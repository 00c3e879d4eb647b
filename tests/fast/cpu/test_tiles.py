"""Encodings without a kernel: decoded a tile at a time, with the bits of the same weights held in float32."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from assay.fast.cpu import CpuModel
from assay.fast.cpu.groups import by_expert, one_group
from assay.fast.cpu.linear import grouped_linear
from assay.fast.cpu.rows import encoded_rows, has_kernel
from assay.fast.cpu.tiles import by_rows, tiled_linear
from assay.loaders.delegated import DELEGATED
from assay.loaders.quantise import encoder_of
from assay.reference.formats import F32, F64, GGML_BLOCKS, MLX_MODES, NVFP4_BLOCKS, NVFP4_TWO_LEVEL, Q2_K
from assay.reference.weights import Tensor
from tests.fast.cpu.poison import poisoned
from tests.fast.engines import traced
from tests.fast.models import gpt_oss_config, llama_config, random_model

I = 512  # noqa: E741 - whole blocks of every format
BLOCKS = {block.name: block for block in (*GGML_BLOCKS.values(), *DELEGATED.values())}
SELDOM = sorted(
    name
    for name, block in BLOCKS.items()
    if not has_kernel(Tensor("w", (1, I), block, {"blocks": np.zeros((1, 1, block.nbytes), np.uint8)}))
)
ENCODED = ["F64", "affine2/64", "affine3/32", "affine5/64", "affine6/128", *MLX_MODES.keys() - {"mxfp4"}]


def blocks(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random bytes, but for scales that are no number: NaN and infinity have their own tests."""
    record, rng = BLOCKS[name], np.random.default_rng(0)
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // record.elements, record.nbytes), dtype=np.uint8)
    for _ in range(100):
        tensor = Tensor("w", shape, record, {"blocks": data})
        odd = ~np.isfinite(tensor.decode().reshape(*data.shape[:-1], -1)).all(-1)
        if not odd.any():
            return tensor
        data[odd] = rng.integers(0, 256, (odd.sum(), record.nbytes), dtype=np.uint8)
    raise AssertionError(name)


def encoded(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers in an encoding."""
    values = np.random.default_rng(0).normal(0, shape[-1] ** -0.5, shape)
    if name == "F64":
        return Tensor("w", shape, F64, {"values": values})
    encoder = encoder_of(MLX_MODES.get(name, name))
    return Tensor("w", shape, encoder.encoding, encoder.encode(values.astype(np.float32)))


def tensor_of(name: str, shape: tuple[int, ...]) -> Tensor:
    return encoded(name, shape) if name in ENCODED else blocks(name, shape)


def in_float32(tensor: Tensor) -> Tensor:
    return Tensor(tensor.name, tensor.shape, F32, {"values": tensor.decode()})


def assert_as_in_float32(tensor: Tensor, groups, x: np.ndarray) -> None:
    bias = np.random.default_rng(2).normal(size=(tensor.size // I // tensor.shape[-2], tensor.shape[-2]))
    bias = bias.astype(np.float32)
    want = grouped_linear(encoded_rows(in_float32(tensor)), groups, x, bias)
    np.testing.assert_array_equal(poisoned(tiled_linear, by_rows(tensor), groups, x, bias), want)


@pytest.mark.parametrize("tile", [1, 3 * I, 1 << 20])
@pytest.mark.parametrize("name", [*SELDOM, *ENCODED])
def test_bits_of_float32(name, tile, monkeypatch):
    """Tiles of one row, of some that do not divide the matrix, and of all."""
    monkeypatch.setattr("assay.fast.cpu.tiles.TILE", tile)
    assert SELDOM
    for T in (1, 5):
        x = np.random.default_rng(T).normal(size=(T, I)).astype(np.float32)
        assert_as_in_float32(tensor_of(name, (19, I)), one_group(T), x)


@pytest.mark.parametrize("name", ["Q3_K", "affine6/128"])
def test_experts(name, monkeypatch):
    """Each pair by its own matrix and bias; some experts have no token."""
    monkeypatch.setattr("assay.fast.cpu.tiles.TILE", 4 * I)
    ids_TA = np.array([[4, 1], [1, 0], [4, 0], [1, 4]])
    x = np.random.default_rng(1).normal(size=(4, I)).astype(np.float32)
    assert_as_in_float32(tensor_of(name, (5, 11, I)), by_expert(ids_TA), x)


def test_rows_of_a_permuted_tensor():
    """Heads whose rows a layout change turned, as a view of the file: these are copied, as they are encoded."""
    tensor = tensor_of("Q2_K", (24, I))
    turned = tensor.parts["blocks"].reshape(2, 6, 2, -1, 84).swapaxes(1, 2)
    permuted = replace(tensor, parts={"blocks": turned})
    assert not permuted.has_rows
    np.testing.assert_array_equal(by_rows(permuted).decode(), permuted.decode())
    assert np.shares_memory(by_rows(tensor).parts["blocks"], tensor.parts["blocks"])


def test_every_second_row_is_used_where_it_lies():
    """Gate and up interleaved in a file."""
    tensor = tensor_of("Q2_K", (5, 6, I))
    gate = replace(tensor, shape=(5, 3, I), parts={"blocks": tensor.parts["blocks"][:, ::2]})
    assert np.shares_memory(by_rows(gate).parts["blocks"], tensor.parts["blocks"])
    np.testing.assert_array_equal(by_rows(gate)[4].decode(), tensor.decode()[1, 2])


def test_nvfp4_with_a_scale_of_its_own():
    """One scale an expert, which stands for each of its rows."""
    plain = blocks("NVFP4", (3, 7, I))
    scale = np.broadcast_to(np.float32([[0.5], [2], [3]]), (3, 7))
    tensor = Tensor("w", (3, 7, I), NVFP4_TWO_LEVEL, {"blocks": plain.parts["blocks"], "scale": scale})
    assert plain.encoding is NVFP4_BLOCKS
    x = np.random.default_rng(1).normal(size=(2, I)).astype(np.float32)
    assert_as_in_float32(tensor, by_expert(np.array([[0, 2], [2, 1]])), x)


def model_in(name: str, config) -> dict[str, Tensor]:
    """A model with every matrix in an encoding, and the rest in float32."""
    tensors = random_model(config, 1, "F32", "BF16")
    for key, tensor in tensors.items():
        if len(tensor.shape) > 1 and "bias" not in key:
            tensors[key] = replace(tensor_of(name, tensor.shape), name=key)
    return tensors


CONFIGS = {
    "llama": replace(llama_config(sliding_window=5), hidden_size=I, intermediate_size=I, head_dim=256),
    "gpt-oss": replace(gpt_oss_config(), hidden_size=I, intermediate_size=I, head_dim=128),
}


@pytest.mark.parametrize("mode", ["exact", "q8", "exact-f16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model(family, mode):
    """Any chunks, one token too: the bits of the same weights in float32. And it is said once for all tensors."""
    config = CONFIGS[family]
    tensors, tokens = model_in("affine6/128", config), np.arange(3, 20)
    model = CpuModel(config, tensors, mode=mode)
    plain = CpuModel(config, {name: in_float32(tensor) for name, tensor in tensors.items()}, mode=mode)
    want, taps = traced(plain, tokens, [len(tokens)])
    for chunks in ([17], [1] * 17, [9, 1, 7]):
        got, mine = traced(model, tokens, chunks)
        np.testing.assert_array_equal(got, want)
        assert list(mine) == list(taps)
        for name, tap in taps.items():
            np.testing.assert_array_equal(mine[name], tap, err_msg=name)
    matrices = sum(len(tensor.shape) > 1 and "bias" not in name for name, tensor in tensors.items())
    assert model.notices == (
        f"no kernel for affine6/128: {matrices} tensors are decoded piece by piece, each time anew: slow",
    )
    assert plain.notices == ()


def test_memory_of_a_product():
    """A matrix of 2^24 elements, of which float32 would take 64 MB, in 12 MB: the tile and what decoding makes."""
    x, bias = np.ones((2, 4096), np.float32), np.zeros((1, 4096), np.float32)
    tensor = Tensor("w", (4096, 4096), Q2_K, {"blocks": np.zeros((4096, 16, 84), np.uint8)})
    tiled_linear(by_rows(tensor)[:1], one_group(2), x, bias[:, :1])
    tracemalloc.start()
    tiled_linear(by_rows(tensor), one_group(2), x, bias)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 12e6
