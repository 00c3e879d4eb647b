"""The vectors cover what they say, decode as outside decoders do, and are the same bytes every time."""

import hashlib
import json

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from assay.cli.app import app
from assay.golden.block_forms import BLOCK_FORMS
from assay.golden.vectors import vectors, write_vectors
from assay.reference.formats.kquants import six_bit_pairs, six_bit_scales
from assay.reference.formats.packing import split_half_nibbles, unpack_codes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("vectors")
    write_vectors(out)
    return out


def index(folder) -> dict[str, dict]:
    return {entry["name"]: entry for entry in json.loads((folder / "index.json").read_text())["encodings"]}


def test_index_matches_the_files(folder):
    entries = index(folder)
    assert set(entries) == set(BLOCK_FORMS)
    for entry in entries.values():
        path = folder / entry["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        arrays = load_file(path)
        assert arrays["blocks"].dtype == np.uint8
        assert arrays["blocks"].shape == (entry["blocks"], entry["block_bytes"])
        assert arrays["expected"].dtype == np.float32
        assert arrays["expected"].shape == (entry["blocks"], entry["block_elements"])
        assert sum(int(line.split()[0]) for line in entry["built"]) == entry["blocks"]


def test_small_enough(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 40e6


def test_same_bytes_again(folder, tmp_path):
    result = CliRunner().invoke(app, ["vectors", "--out", str(tmp_path / "new" / "folder")])
    assert result.exit_code == 0
    assert f"{len(BLOCK_FORMS)} encodings" in result.output
    again = tmp_path / "new" / "folder"
    assert (again / "index.json").read_bytes() == (folder / "index.json").read_bytes()
    assert (again / "Q4_K.safetensors").read_bytes() == (folder / "Q4_K.safetensors").read_bytes()


def test_pinned_bytes():
    """The stream that random blocks come from is PCG64's raw one; NumPy does not change it."""
    blocks, _ = vectors("Q4_0")
    assert blocks[-1].tobytes().hex() == "c69da87c251bd94570350791d48af833c020"


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_expected_is_what_gguf_py_says(folder, name):
    arrays = load_file(folder / f"{name}.safetensors")
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(arrays["blocks"], gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(arrays["expected"], wanted)


@pytest.mark.parametrize("name", BLOCK_FORMS)
def test_nan_is_one_pattern(name):
    _, expected = vectors(name)
    codes = expected.view(np.uint32)[np.isnan(expected)]
    assert set(codes.tolist()) <= {0x7FC00000}


def test_mxfp4_is_exhaustive():
    """16 codes under 256 scales, each in both halves of a byte."""
    blocks, _ = vectors("MXFP4")
    low = {(s, c) for s, *codes in blocks[:256].tolist() for c in (b & 15 for b in codes)}
    high = {(s, c) for s, *codes in blocks[:256].tolist() for c in (b >> 4 for b in codes)}
    assert len(low) == len(high) == 16 * 256
    ggml = vectors("MXFP4_GGUF")[0]
    halves = split_half_nibbles(ggml[:256, 1:])
    assert {(int(s), int(c)) for s, row in zip(ggml[:256, 0], halves, strict=True) for c in row[:16]} == low


@pytest.mark.parametrize(
    ("name", "bits"), [("MXFP6_E2M3", 6), ("MXFP6_E3M2", 6), ("MXFP8_E4M3", 8), ("MXFP8_E5M2", 8), ("NVFP4", 4)]
)
def test_elements_are_exhaustive(name, bits):
    blocks, _ = vectors(name)
    codes = unpack_codes(blocks[:, 1:], bits).astype(int)
    assert len(np.unique(blocks[:, :1].astype(int) << bits | codes)) == 256 << bits


def test_nvfp4_gguf_has_every_scale_at_every_place():
    blocks, _ = vectors("NVFP4_GGUF")
    codes = split_half_nibbles(blocks[:256, 4:].reshape(256, 4, 8))
    for place in range(4):
        pairs = blocks[:256, place, None].astype(int) << 4 | codes[:, place]
        assert len(np.unique(pairs)) == 16 * 256


def test_q8_0_has_every_half():
    blocks, _ = vectors("Q8_0")
    assert len(np.unique(np.ascontiguousarray(blocks[:, :2]).view("<u2"))) == 2**16


@pytest.mark.parametrize("name", ["F16", "BF16", "I16"])
def test_sixteen_bits_are_exhaustive(name):
    blocks, _ = vectors(name)
    assert len(np.unique(blocks.view("<u2"))) == 2**16


@pytest.mark.parametrize(("name", "offset"), [("Q4_K", 4), ("Q5_K", 4)])
def test_each_six_bit_field_alone(name, offset):
    fields = np.concatenate(six_bit_pairs(vectors(name)[0][:, offset : offset + 12]), axis=1)
    alone = fields[np.count_nonzero(fields, axis=1) == 1]
    assert {(int(i), int(row[i])) for row in alone for i in np.flatnonzero(row)} == {
        (i, v) for i in range(16) for v in range(1, 64)
    }


def test_each_q3_k_scale_alone():
    fields = six_bit_scales(vectors("Q3_K")[0][:, 96:108])
    alone = fields[np.count_nonzero(fields, axis=1) == 1]
    assert len({(int(i), int(row[i])) for row in alone for i in np.flatnonzero(row)}) == 16 * 63


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["vectors", "--out", str(tmp_path / "file")])
    assert result.exit_code != 0
    assert "cannot be written" in str(result.exception)


def test_an_empty_folder_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["vectors", "--out", ""])
    assert result.exit_code == 2
    assert "the folder's name is empty" in result.output
    assert not list(tmp_path.iterdir())
