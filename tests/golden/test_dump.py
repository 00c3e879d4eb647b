"""Dumps of other engines: their names, their layouts, their file formats; and what cannot be one."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from assay.golden.backends.dump import NAME_MAPS, open_dump
from assay.golden.errors import GoldenError
from assay.golden.store import save_golden
from assay.loaders.errors import CheckpointError
from assay.reference.taps import tap_table
from tests.checkpoint_files import opened, tokens_of
from tests.golden.faults import GPT_OSS, golden_of, report_of, taps_with


def written(
    tmp_path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None, npz: bool = False
) -> Path:
    path = tmp_path / ("dump.npz" if npz else "dump.safetensors")
    if npz:
        np.savez(path, **arrays)
    else:
        save_file({name: np.array(array, order="C") for name, array in arrays.items()}, path, metadata)
    return path


# --- names ---


def test_our_own_names_need_no_map(tmp_path):
    taps = taps_with({})
    dump = open_dump(written(tmp_path, taps))
    assert set(dump.taps) == set(taps)
    np.testing.assert_array_equal(dump.taps["layers.1.q"], taps["layers.1.q"], strict=True)
    assert dump.tokens is None


@pytest.mark.parametrize("npz", [False, True])
def test_a_map_of_one_s_own(tmp_path, npz):
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({"blk{i}/query": "layers.{i}.q", "out(all)": "logits", "nothing": "embed"}))
    arrays = {
        "blk0/query": np.ones((2, 3)),
        "blk10/query": np.zeros((1, 3)),
        "out(all)": np.ones(1),
        "blkx/query": np.ones(1),
    }
    dump = open_dump(written(tmp_path, arrays, npz=npz), None, str(mapping))
    assert set(dump.taps) == {"layers.0.q", "layers.10.q", "logits"}
    assert len(dump.taps) == 3
    np.testing.assert_array_equal(dump.taps["layers.10.q"], np.zeros((1, 3)))


@pytest.mark.parametrize("names", NAME_MAPS)
def test_built_in_maps_name_taps_that_exist(names):
    known = {name for model in (GPT_OSS, "llama/hf") for name in tap_table(opened(model).config)}
    fused = {"layers.0.q+k+v", "layers.0.gate+up"}
    assert {tap.replace("{i}", "0") for tap in NAME_MAPS[names].values()} <= known | fused


def test_hugging_face_module_names(tmp_path):
    taps = taps_with({})
    arrays = {
        "model.embed_tokens": taps["embed"],
        "model.layers.1.self_attn.q_proj": taps["layers.1.q"].reshape(1, 40, 128),
        "model.layers.1.mlp": taps["layers.1.mlp_out"],
        "model.layers.1": taps["layers.1.block_out"],
        "lm_head": taps["logits"],
    }
    dump = open_dump(written(tmp_path, arrays), opened(GPT_OSS).config, "hf")
    assert set(dump.taps) == {"embed", "layers.1.q", "layers.1.mlp_out", "layers.1.block_out", "logits"}
    assert report_of(dict(dump.taps)).verdict == "match"


def test_llama_cpp_s_gpt_oss_is_in_halves_already(tmp_path):
    taps = taps_with({})
    arrays = {"Qcur-0": taps["layers.0.q_rope"].reshape(40, 128), "Kcur-2": taps["layers.2.k_rope"].reshape(40, 64)}
    dump = open_dump(written(tmp_path, arrays), opened(GPT_OSS).config, "llama.cpp")
    assert set(dump.taps) == {"layers.0.q_rope", "layers.2.k_rope"}
    np.testing.assert_array_equal(dump.taps["layers.0.q_rope"], arrays["Qcur-0"])


def test_llama_cpp_s_llama_is_put_from_neighbour_pairs_into_halves(tmp_path):
    """Channels 2j and 2j + 1 of a head of 16 are pair j: they go to j and j + 8."""
    q = np.arange(2 * 4 * 16.0).reshape(2, 64)
    dump = open_dump(written(tmp_path, {"Qcur-0": q, "Vcur-0": q}), opened("llama/hf").config, "llama.cpp")
    got = dump.taps["layers.0.q_rope"].reshape(2, 4, 16)
    assert got[0, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
    assert got[1, 3, 8] == q[1, 3 * 16 + 1]
    np.testing.assert_array_equal(dump.taps["layers.0.v"], q)
    by_heads = open_dump(written(tmp_path, {"Qcur-0": q.reshape(1, 2, 4, 16)}), opened("llama/hf").config, "llama.cpp")
    np.testing.assert_array_equal(by_heads.taps["layers.0.q_rope"], got[None])


PHI3 = {"q": np.s_[:, :32], "k": np.s_[:, 32:48], "v": np.s_[:, 48:]}  # 2 query heads and 1 key head of 16 channels


@pytest.mark.parametrize("names", ["hf", "mlx", "llama.cpp"])
def test_phi3_s_fused_products_are_taken_apart(tmp_path, names):
    qkv, gate_up = np.arange(3 * 64.0).reshape(3, 64), np.arange(3 * 128.0).reshape(3, 128)
    ours = names == "llama.cpp"
    arrays = {
        "wqkv-1" if ours else "model.layers.1.self_attn.qkv_proj": qkv,
        "ffn_up-1" if ours else "model.layers.1.mlp.gate_up_proj": gate_up,
    }
    dump = open_dump(written(tmp_path, arrays), opened("phi3/hf").config, names, is_phi3=True)
    assert set(dump.taps) == {f"layers.1.{kind}" for kind in ("q", "k", "v", "gate", "up")}
    for kind, columns in PHI3.items():
        np.testing.assert_array_equal(dump.taps[f"layers.1.{kind}"], qkv[columns])
    np.testing.assert_array_equal(dump.taps["layers.1.gate"], gate_up[:, :64])
    np.testing.assert_array_equal(dump.taps["layers.1.up"], gate_up[:, 64:])
    with pytest.raises(GoldenError, match="fits none"):  # without the model nobody knows where q ends
        open_dump(written(tmp_path, {name: a for name, a in arrays.items() if "up" not in name}), None, names)


def test_a_map_of_one_s_own_may_name_a_fused_product(tmp_path):
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({"qkv.{i}": "layers.{i}.q+k+v"}))
    qkv = np.arange(3 * 64.0).reshape(3, 64)
    dump = open_dump(written(tmp_path, {"qkv.0": qkv}), opened("phi3/hf").config, str(mapping))
    assert set(dump.taps) == {"layers.0.q", "layers.0.k", "layers.0.v"}


def test_llama_cpp_s_phi3_is_in_halves_and_its_last_queries_are_scaled(tmp_path):
    q = np.arange(2 * 32.0, dtype=np.float32).reshape(2, 32)
    arrays = {"Qcur-0": q, "Kcur-0": q[:, :16]}
    dump = open_dump(written(tmp_path, arrays), opened("phi3/hf").config, "llama.cpp", is_phi3=True)
    np.testing.assert_array_equal(dump.taps["layers.0.q_rope"], 4 * q)  # sqrt(16)
    np.testing.assert_array_equal(dump.taps["layers.0.k_rope"], q[:, :16])


# --- what it says of itself ---


@pytest.mark.parametrize(
    ("dtypes", "profile"),
    [
        ([np.float64, np.float32], "float32"),
        ([np.float32, np.float16], "float16"),
        ([np.float32, ml_dtypes.bfloat16], "bfloat16"),
        ([np.float32, np.int64], "float32"),
    ],
)
def test_profile_follows_the_dtypes(tmp_path, dtypes, profile):
    arrays = {f"x{i}": np.ones(3, dtype) for i, dtype in enumerate(dtypes)}
    assert open_dump(written(tmp_path, arrays)).profile == profile


def test_npz_with_half_floats(tmp_path):
    assert open_dump(written(tmp_path, {"x": np.ones(3, np.float16)}, npz=True)).profile == "float16"
    assert open_dump(written(tmp_path, {"x": np.ones(3)}, npz=True)).profile == "float32"


def test_tokens_from_the_header(tmp_path):
    dump = open_dump(written(tmp_path, {"x": np.ones(1)}, {"tokens": "5, 6,7"}))
    assert dump.tokens == [5, 6, 7]


def test_a_golden_is_a_dump_too(tmp_path):
    dump = open_dump(save_golden(golden_of(), tmp_path / "g.safetensors"))
    assert (dump.tokens, dump.profile) == (tokens_of("gpt_oss"), "float64")


# --- what is wrong ---


@pytest.mark.parametrize(
    "metadata",
    [
        *({"tokens": text} for text in ("1,x", "", "1.5")),
        *({"assay": text} for text in ("{}", "[]", "{", "5", '{"tokens": 5, "chunks": []}', "[" * 100_000)),
    ],
)
def test_tokens_that_cannot_be_read(tmp_path, metadata):
    path = written(tmp_path, {"x": np.ones(1)}, metadata)
    with pytest.raises(GoldenError, match=re.escape(str(path))):
        open_dump(path)


def test_a_map_that_fits_nothing_shows_some_names(tmp_path):
    with pytest.raises(GoldenError, match=r"'hf' fits none of the tensors[\s\S]*mystery"):
        open_dump(written(tmp_path, {"mystery": np.ones(1)}), None, "hf")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no such name map"),
        ("{", "not JSON"),
        ("[]", "not a name map"),
        ('{"a": 5}', "not a name map"),
        ('{"a{i}b{i}": "layers.{i}.q"}', "not a name map"),
        ('{"x": "layers.{i}.q"}', "not a name map"),
        ('{"x{i}": "logits"}', "not a name map"),
        ('{"x": "layers.0.query"}', "'layers.0.query'"),
    ],
)
def test_a_map_that_is_none(tmp_path, content, part):
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(GoldenError, match=re.escape(part)):
        open_dump(written(tmp_path, {"x": np.ones(1), "x1": np.ones(1)}), opened(GPT_OSS).config, str(path))


def test_a_map_that_is_not_text(tmp_path):
    path = tmp_path / "map.json"
    path.write_bytes(b'{"\xff": "q"}')
    with pytest.raises(GoldenError, match="not JSON"):
        open_dump(written(tmp_path, {"x": np.ones(1)}), None, str(path))
    with pytest.raises(GoldenError, match="no such name map"):
        open_dump(written(tmp_path, {"x": np.ones(1)}), None, str(tmp_path))


@pytest.mark.parametrize("raw", [b"", b"PK\3\4", b"\x93NUMPY", b"x" * 50])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_of_something_else(tmp_path, suffix, raw):
    path = tmp_path / f"dump{suffix}"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        open_dump(path)


def test_an_npz_that_is_cut(tmp_path):
    path = written(tmp_path, {"x": np.ones(1000)}, npz=True)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(GoldenError, match="not an npz file"):
        open_dump(path)


def test_an_npz_whose_member_is_damaged(tmp_path):
    path = written(tmp_path, {"x": np.ones(1000)}, npz=True)
    raw = bytearray(path.read_bytes())
    raw[500] ^= 255
    path.write_bytes(raw)
    with pytest.raises(GoldenError, match="not an npz file"):
        open_dump(path)


def test_a_dump_of_nothing(tmp_path):
    np.savez(tmp_path / "d.npz")
    with pytest.raises(GoldenError, match=r"d\.npz: a dump without a tensor in it"):
        open_dump(tmp_path / "d.npz")


def test_objects_in_an_npz_are_never_unpickled(tmp_path):
    path = written(tmp_path, {"x": np.array([{"a": 1}], object)}, npz=True)
    with pytest.raises(GoldenError, match="not an npz file of plain arrays"):
        open_dump(path)


def test_a_single_npy_under_the_name_of_an_npz(tmp_path):
    path = tmp_path / "dump.npz"
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(GoldenError, match="not an npz file"):
        open_dump(path)


@pytest.mark.parametrize("array", [np.array(1.0), np.ones(5), np.ones((2, 15))])
def test_arrays_that_cannot_be_paired_heads(tmp_path, array):
    """They come as they are, and the check refuses their shape."""
    dump = open_dump(written(tmp_path, {"Qcur-0": array}), opened("llama/hf").config, "llama.cpp")
    assert dump.taps["layers.0.q_rope"].shape == array.shape
