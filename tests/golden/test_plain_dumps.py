"""Dumps without a library: folders of raw and npy files, llama.cpp's log, and the C example of the guide."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from assay.golden.backends.dump import open_dump
from assay.golden.errors import GoldenError
from tests.checkpoint_files import opened, tokens_of
from tests.golden.faults import GPT_OSS, diverging, golden_of, report_of, taps_with

PAGE = Path(__file__).parents[2] / "docs" / "your-own-engine.md"
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "dump_taps.c"


def raw_folder(folder: Path, tensors: dict[str, np.ndarray], **entries: object) -> Path:
    folder.mkdir(exist_ok=True)
    index: dict[str, object] = {}
    for i, (name, array) in enumerate(tensors.items()):
        array.tofile(folder / f"{i}.bin")
        index[name] = {"file": f"{i}.bin", "dtype": array.dtype.name, "shape": list(array.shape)}
    (folder / "index.json").write_text(json.dumps(index | entries))
    return folder


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8"])
def test_raw_values_come_back(tmp_path, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    dump = open_dump(raw_folder(tmp_path / "d", {"x": array}, tokens=[3, 1]))
    np.testing.assert_array_equal(dump.taps["x"], array.astype(np.float64))
    assert dump.tokens == [3, 1]
    assert dump.profile == (dtype if dtype in ("bfloat16", "float16") else "float32")
    assert (list(dump.taps), len(dump.taps)) == (["x"], 1)


def test_a_folder_is_checked_like_any_dump(tmp_path):
    taps = {name: array.astype(np.float64) for name, array in taps_with({}).items()}
    assert report_of(dict(open_dump(raw_folder(tmp_path / "good", taps)).taps)).verdict == "match"
    taps["layers.1.q"] = taps["layers.1.q"] * 1.01
    assert diverging(report_of(dict(open_dump(raw_folder(tmp_path / "bad", taps)).taps)))[0] == "layers.1.q"


def test_npy_files_without_an_index(tmp_path):
    np.save(tmp_path / "layers.0.q.npy", np.ones((2, 3), np.float16))
    dump = open_dump(tmp_path)
    np.testing.assert_array_equal(dump.taps["layers.0.q"], np.ones((2, 3)))
    assert dump.profile == "float16"


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        (5, "not an entry of an index"),
        ({"file": "0.bin"}, "not an entry of an index"),
        ({"file": "../0.bin", "dtype": "float32", "shape": [2]}, "lies beside the index"),
        ({"file": 5, "dtype": "float32", "shape": [2]}, "lies beside the index"),
        ({"file": "0.bin", "dtype": "float31", "shape": [2]}, "unknown dtype"),
        ({"file": "0.bin", "dtype": ["f"], "shape": [2]}, "unknown dtype"),
        ({"file": "0.bin", "dtype": "float32", "shape": [-2]}, "not a shape"),
        ({"file": "0.bin", "dtype": "float32", "shape": [2.0]}, "not a shape"),
        ({"file": "0.bin", "dtype": "float32", "shape": [3]}, "does not hold its tensor"),
        ({"file": "0.bin", "dtype": "float32", "shape": [2**62, 2**62]}, "does not hold its tensor"),
        ({"file": "1.bin", "dtype": "float32", "shape": [2]}, "no such file"),
    ],
)
def test_entries_that_are_wrong(tmp_path, entry, part):
    folder = raw_folder(tmp_path / "d", {"x": np.ones(2, np.float32)}, x=entry)
    with pytest.raises(GoldenError, match=part):
        open_dump(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"tokens": [1.5]}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(GoldenError, match=re.escape(str(tmp_path))):
        open_dump(tmp_path)


def test_an_empty_folder_and_a_damaged_npy(tmp_path):
    with pytest.raises(GoldenError, match="no dump in it"):
        open_dump(tmp_path)
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(GoldenError, match="not an npy file"):
        open_dump(tmp_path)


# --- llama.cpp's log ---


def logged(name: str, operation: str, array: np.ndarray, digits: str = "%.9g") -> str:
    """A node as the eval-callback prints it, but all of it; array [.., fastest]."""
    ne = ", ".join(str(n) for n in (*array.shape[::-1], 1, 1, 1)[:4])
    rows = "\n".join(" [" + ", ".join(digits % x for x in row) + " ]," for row in array.reshape(-1, array.shape[-1]))
    head = f"common_debug_cb_eval: {name:>24} = (f32) {operation:>10}(x{{{ne}}}, }}) = {{{ne}}}"
    return f"{head}\n [\n{rows}\n ]\n sum = {array.sum():f}\n"


def test_a_log_s_repeated_names_are_told_apart_by_operation(tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
    text = logged("Qcur-0", "MUL_MAT", x.reshape(2, 32)) + logged("Qcur-0", "RESHAPE", x)
    text += logged("Qcur-0", "ROPE", 2 * x) + logged("nothing", "ADD", x) + logged("result_output", "MUL_MAT", x[1, :1])
    text += logged("Qcur-0", "RESHAPE", x[1:]) + logged("Qcur-0", "ROPE", 3 * x[:1])
    (tmp_path / "nodes.log").write_text(text)
    dump = open_dump(tmp_path / "nodes.log")
    assert {tap: len(array) for tap, array in dump.taps.items()} == {"layers.0.q": 3, "layers.0.q_rope": 3, "logits": 1}
    assert dump.profile == "llama.cpp"
    np.testing.assert_allclose(dump.taps["layers.0.q"], np.concatenate((x, x[1:])).reshape(3, 32), 1e-8)
    np.testing.assert_allclose(dump.taps["layers.0.q_rope"], np.concatenate((2 * x, 3 * x[:1])).reshape(3, 32), 1e-8)


def test_a_log_s_llama_is_put_into_halves_and_phi3_s_fused_products_are_taken_apart(tmp_path):
    q, qkv = np.arange(2 * 4 * 16.0).reshape(2, 4, 16), np.arange(2 * 64.0).reshape(2, 64)
    (tmp_path / "nodes.log").write_text(logged("Qcur-0", "ROPE", q) + logged("wqkv-0", "MUL_MAT", qkv))
    llama = open_dump(tmp_path / "nodes.log", opened("llama/hf").config)
    assert llama.taps["layers.0.q_rope"][0, :9].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1]
    phi3 = open_dump(tmp_path / "nodes.log", opened("phi3/hf").config, is_phi3=True)
    assert set(phi3.taps) == {f"layers.0.{kind}" for kind in ("q_rope", "q", "k", "v")}
    assert phi3.taps["layers.0.q_rope"][0, :9].tolist() == list(range(9))
    np.testing.assert_array_equal(phi3.taps["layers.0.k"], qkv[:, 32:48])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("hello\n", "not a log of llama.cpp's nodes"),
        (logged("embd", "GET_ROWS", np.ones((2, 4)) / 3, "%12.4f"), "too few digits"),
        (logged("embd", "GET_ROWS", np.ones((2, 4)) / 3).replace("0.333333333,", "   ...,", 1), "only the edges"),
        (logged("embd", "GET_ROWS", np.ones((2, 4)) / 3).replace("0.333333333,", "", 1), "not the whole tensor"),
    ],
)
def test_a_log_that_cannot_be_judged(tmp_path, text, part):
    (tmp_path / "nodes.log").write_text(text)
    with pytest.raises(GoldenError, match=part):
        open_dump(tmp_path / "nodes.log")


# --- the guide's example ---


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    out = tmp_path_factory.mktemp("c") / "dump_taps"
    options = ["-std=c99", "-D_POSIX_C_SOURCE=200809L", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *options, str(EXAMPLE), "-lm", "-o", str(out)], check=True)
    return out


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_page_s_commands_as_they_stand(tmp_path):
    """In an empty folder, as somebody new would."""
    blocks = PAGE.read_text().split("```")[1::2]
    commands = [block for block in blocks if "CHECKPOINT=" in block or "cc -std=c99" in block]
    assert len(commands) == 2
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for eps, status, said in (("1e-5", 0, "match"), ("1e-6", 1, "(norm-epsilon-smaller)")):
        folder = tmp_path / eps
        folder.mkdir()
        shutil.copy(EXAMPLE, folder)
        script = "set -e\n" + "".join(commands).replace("1e-5", eps)
        ran = subprocess.run(
            ["bash", "-c", script], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert (ran.returncode, ran.stderr) == (status, "")
        assert said in ran.stdout


@pytest.mark.parametrize(("eps", "first"), [("1e-5", None), ("1e-2", "layers.0.attn_norm")])
def test_the_example_in_c(program, tmp_path, eps, first):
    tensors = opened(GPT_OSS).tensors
    for file, name in (("e.bin", "model.embed_tokens.weight"), ("n.bin", "model.layers.0.input_layernorm.weight")):
        tensors[name].decode().tofile(tmp_path / file)
    V, D = tensors["model.embed_tokens.weight"].shape
    tokens = tokens_of("gpt_oss")
    arguments = [tmp_path / "e.bin", tmp_path / "n.bin", V, D, eps, tmp_path / "dump", *tokens]
    subprocess.run([str(program), *map(str, arguments)], check=True)
    dump = open_dump(tmp_path / "dump", opened(GPT_OSS).config)
    assert (dump.tokens, dump.profile) == (tokens, "float32")
    report = report_of(dict(dump.taps), dump.profile, golden_of())
    assert (diverging(report) or [None])[0] == first
    assert [result.tap for result in report.taps] == ["embed", "layers.0.attn_norm"]
