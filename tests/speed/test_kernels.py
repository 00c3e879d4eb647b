"""Products with every encoding that has a kernel: one column against the memory's limit, many against arithmetic's."""

import numpy as np
import pytest

from assay.fast.cpu.rows import encoded_rows
from assay.fast.cpu.weights import Linear
from assay.fast.quantised import ENCODINGS, SUPERBLOCK_ENCODINGS
from assay.loaders.quantise import encoder_of
from assay.reference.precision import round_q8, round_q8_K
from assay.reference.weights import Tensor
from tests.fast.models import quantised_tensor
from tests.speed.conftest import Time

pytestmark = pytest.mark.speed

ENCODERS = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "MXFP4, GGUF": "GGUF MXFP4",
    "MXFP4, safetensors": "MXFP4",
    "mxfp4, MLX": "MLX mxfp4",
    "affine4, MLX": "affine4/64",
    "affine8, MLX": "affine8/64",
}
NAMES = [*ENCODERS, *SUPERBLOCK_ENCODINGS]
I = 2880 // 256 * 256  # noqa: E741 - gpt-oss's width, rounded so that blocks of 256 fit
POOL = 64  # rows that are encoded; the matrix repeats them
UNCACHED = 96 << 20  # bytes that no cache holds: a product with one column reads them from memory
MANY_ROWS = 5760


def tensor_of(name: str, rows: int) -> Tensor:
    """A matrix [rows, I] of random weights."""
    rng = np.random.default_rng(0)
    if name in SUPERBLOCK_ENCODINGS:  # which nothing here can encode
        pool = quantised_tensor(rng, name, (POOL, I), name)
        encoding, parts = pool.encoding, pool.parts
    else:
        encoder = encoder_of(ENCODERS[name])
        parts = encoder.encode(rng.normal(0, I**-0.5, (POOL, I)).astype(np.float32))
        encoding = encoder.encoding
    repeat = rows // POOL
    return Tensor(
        name, (repeat * POOL, I), encoding, {key: np.concatenate([part] * repeat) for key, part in parts.items()}
    )


def encoding_name(name: str) -> str:
    """As `ENCODINGS` has it: without the size of groups."""
    return (encoder_of(ENCODERS[name]).encoding.name if name in ENCODERS else name).partition("/")[0]


def nbytes_of(tensor: Tensor) -> int:
    return sum(part.nbytes for part in tensor.parts.values())


# 1 column: decode. 3: an expert's share of a batch of 20. 12, 64: prompts
CASES = [
    (name, mode, T)
    for name in NAMES
    for mode in ("exact", "q8")
    if mode == "exact"
    or encoding_name(name) in ENCODINGS + SUPERBLOCK_ENCODINGS  # q8 computes the others as exact does
    for T in (1, 3, 12, 64)
]


@pytest.mark.parametrize(("name", "mode", "T"), CASES, ids=[f"{n}, {m}, {T} columns" for n, m, T in CASES])
def test_product(time: Time, quick: bool, name: str, mode: str, T: int) -> None:
    """The result is compared with float64 on the decoded weights, in each mode's own rounding of the inputs."""
    small, rows = tensor_of(name, POOL), 2 * POOL
    if not quick:
        rows = POOL * max(MANY_ROWS // POOL, 0 if T > 3 else UNCACHED // nbytes_of(small))
    tensor = tensor_of(name, rows)
    linear = Linear(encoded_rows(tensor), np.zeros((1, rows), np.float32), mode == "q8")
    x_TI = np.random.default_rng(1).normal(size=(T, I)).astype(np.float32)
    got = time(
        lambda: linear(x_TI),
        nbytes=nbytes_of(tensor),
        operations=2 * T * rows * I,
        quantised=mode == "q8",
        seconds=0.5,
    )
    w_OI = small.decode().astype(np.float64)
    rounded = round_q8_K if name in SUPERBLOCK_ENCODINGS else round_q8
    x_TI = (rounded(x_TI) if mode == "q8" else x_TI).astype(np.float64)
    want = np.tile(x_TI @ w_OI.T, rows // POOL)
    np.testing.assert_array_less(np.abs(got - want), np.tile(2e-6 * (np.abs(x_TI) @ np.abs(w_OI).T), rows // POOL))
