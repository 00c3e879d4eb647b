"""The scan sees exactly the numbers that decode to what is not finite; the decoders are other people's."""

from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.loaders import CheckpointError, file_bytes
from assay.loaders.file_bytes import COPIED
from assay.loaders.scan import _GGML_NUMBERS, BF16, E8M0, F16, F32, PLAIN, Numbers, Stored, _ggml_fields, scan

NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
# what gguf-py decodes; MXFP4 and NVFP4 it reads as ggml does, where no scale is NaN
BLOCKS = sorted(set(_GGML_NUMBERS) - {"MXFP4", "NVFP4", "Q8_1", "Q8_K", "Q1_0", "Q2_0"})
NONFINITE = np.array([0x7C00, 0xFC00, 0x7E01, 0xFE00, 0x7FFF], np.uint16)


def stored(file: Path, type_name: str, nbytes: int, shape: tuple[int, ...], begin: int = 0, block: int = 1) -> Stored:
    return Stored(f"at {begin}", file, begin, nbytes, shape, block, _ggml_fields(type_name, nbytes))


def scanned(*tensors: Stored) -> list[Numbers]:
    done: list[int] = []
    found = list(scan(tensors, done.append))
    assert sum(done) == sum(tensor.nbytes for tensor in tensors)
    return found


@pytest.mark.parametrize("name", PLAIN)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 3000), skip=st.integers(0, 9))
def test_plain_numbers(tmp_path_factory, name, seed, n, skip):
    """Random bits: count and first place of what NumPy and ml_dtypes call not finite, at any offset."""
    dtype, file = np.dtype(NUMPY[name]), tmp_path_factory.getbasetemp() / "numbers"
    rng = np.random.default_rng(seed)
    raw = rng.bytes(n * dtype.itemsize)
    values = np.frombuffer(raw, dtype)
    file.write_bytes(rng.bytes(skip) + raw)
    with np.errstate(over="ignore", invalid="ignore"):
        wrong = np.flatnonzero(~np.isfinite(values.astype(np.float32)))  # float32 is what we decode to
    found = scanned(stored(file, name, len(raw), (n,), skip))
    total = sum(sum(numbers.count.values()) for numbers in found)
    assert total == len(wrong)
    if len(wrong):
        (numbers,) = found
        first = min(byte for byte, _ in numbers.first.values())
        assert first == skip + wrong[0] * dtype.itemsize
        assert numbers.index(first) == [wrong[0]]


@pytest.mark.parametrize("name", ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_every_code(tmp_path, name):
    dtype = np.dtype(NUMPY[name])
    codes = np.arange(256**dtype.itemsize, dtype=f"u{dtype.itemsize}")
    (tmp_path / "codes").write_bytes(codes.tobytes())
    (numbers,) = scanned(stored(tmp_path / "codes", name, codes.nbytes, codes.shape))
    assert numbers.count == {False: int(np.sum(~np.isfinite(codes.view(dtype).astype(np.float32)))), True: 0}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(tmp_path, name):
    """One tensor a block: those found are those that gguf-py decodes to something not finite."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    n, file, rng = 200, tmp_path / "blocks", np.random.default_rng(7)
    blocks = rng.integers(0, 256, (n, nbytes), np.uint8)
    for field in _ggml_fields(name, nbytes):  # random halves are seldom not finite: make a third of them so
        halves = np.where(rng.random(n) < 0.3, rng.choice(NONFINITE, n), rng.integers(0, 0x7BFF, n, np.uint16))
        blocks[:, field.offset : field.offset + 2] = halves.astype("<u2").view(np.uint8).reshape(n, 2)
    file.write_bytes(blocks.tobytes())
    with np.errstate(invalid="ignore", over="ignore"):
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    wrong = set(np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist())
    assert 20 < len(wrong) < 180
    tensors = [
        Stored(str(i), file, i * nbytes, nbytes, (elements,), elements, _ggml_fields(name, nbytes)) for i in range(n)
    ]
    assert {int(numbers.stored.name) for numbers in scanned(*tensors)} == wrong


def test_every_block_size_is_that_of_the_file_format():
    from assay.loaders.gguf_file import GGML_TYPES

    sizes = {block.name: block.nbytes for block in GGML_TYPES.values()}
    unseen = {"IQ1_M", "I8", "I16", "I32", "I64", "F32", "F16", "F64", "BF16"}
    assert set(_GGML_NUMBERS) == set(sizes) - unseen
    for name in _GGML_NUMBERS:
        for field in _ggml_fields(name, sizes[name]):
            assert field.offset + np.dtype(field.code.dtype).itemsize <= sizes[name]


@pytest.mark.parametrize("name", ["F32", "Q4_1", "Q6_K"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_long_tensors_are_scanned_to_the_end(tmp_path, monkeypatch, name, where):
    """Several arrays; one bad number anywhere in them is found at its place."""
    monkeypatch.setattr(file_bytes, "IN_PLACE", COPIED)
    nbytes = 4 if name == "F32" else gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    n = 2 * COPIED // nbytes + 1000
    raw = np.zeros((n, nbytes), np.uint8)
    bad = round(where * (n - 1))
    field = _ggml_fields(name, nbytes)[-1]
    raw[bad, field.offset : field.offset + 4] = 255
    (tmp_path / "long").write_bytes(raw.tobytes())
    fields = _ggml_fields(name, nbytes)
    found = scanned(Stored("long", tmp_path / "long", 0, raw.size, (n,), 1, fields))
    assert [numbers.first[False][0] for numbers in found if numbers.first] == [bad * nbytes + field.offset]


@pytest.mark.parametrize(
    ("code", "headroom", "largest"),
    [(E8M0, 2, 2.0**125), (E8M0, 8, 2.0**119), (BF16, 4, 2.0**124 * (1 - 2**-8)), (F16, 4, 65504.0), (F32, 0, 3.4e38)],
)
def test_scales_that_overflow(code, headroom, largest):
    """The largest scale that passes times an element just below 2^headroom is a float32, the next is not."""
    from assay.loaders.scan import Field

    limit = Field("scale", code, 1, 0, headroom).limit
    dtype = {
        "E8M0": ml_dtypes.float8_e8m0fnu,
        "bfloat16": ml_dtypes.bfloat16,
        "float16": np.float16,
        "float32": np.float32,
    }
    passes = np.array([limit - 1], f"u{np.dtype(code.dtype).itemsize}").view(dtype[code.name]).astype(np.float64)
    assert passes[0] >= largest * 0.99
    if code is not F16:
        assert passes[0] * 2.0**headroom <= 2.0**128
        assert 2 * passes[0] * 2.0**headroom > 2.0**127


def test_a_matrix_of_zeros_is_noticed_and_a_vector_or_a_bias_is_not(tmp_path):
    (tmp_path / "zeros").write_bytes(bytes(4096))

    def found(shape: tuple[int, ...], name: str) -> bool:
        tensor = Stored(name, tmp_path / "zeros", 0, 4096, shape, 1, _ggml_fields("F32", 4))
        return [numbers.is_zero for numbers in scanned(tensor)] == [True]

    assert found((32, 32), "q_proj.weight")
    assert not found((1024,), "norm.weight")
    assert not found((32, 32), "experts.gate_up_proj_bias")


def test_a_file_that_shrinks_is_an_error(tmp_path):
    (tmp_path / "short").write_bytes(bytes(10))
    with pytest.raises(CheckpointError, match="ended inside tensor 'at 0' while it was read"):
        scanned(stored(tmp_path / "short", "F32", 40, (10,)))
    with pytest.raises(CheckpointError, match="no such file"):
        scanned(stored(tmp_path / "gone", "F32", 40, (10,)))
