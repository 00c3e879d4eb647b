"""assay record: tokens and texts in, a golden out; and what it refuses, writing nothing."""

import io
import json
import sys

import numpy as np
import pytest

from assay.golden.store import load_golden
from tests.checkpoint_files import CHECKPOINTS, copied, opened, tokens_of
from tests.cli.run import refused, run
from tests.golden.faults import golden_of

GPT_OSS = CHECKPOINTS / "gpt_oss/hf"
IDS = ",".join(map(str, tokens_of("gpt_oss")))


def recorded(path, *arguments, model=GPT_OSS):
    result = run("record", model, "--out", path, *arguments)
    assert (result.status, result.err) == (0, ""), result
    assert str(path) in "".join(result.out.split())
    return load_golden(path)


def test_tokens(tmp_path):
    golden = recorded(tmp_path / "g.safetensors", "--tokens", IDS)
    assert golden.provenance.tokens == tokens_of("gpt_oss")
    assert list(golden.provenance.taps) == list(golden_of().taps)
    for name, array in golden_of().taps.items():
        np.testing.assert_array_equal(golden.taps[name], array)


@pytest.mark.parametrize("text", ["1,2,3", "1 2 3\n", "[1, 2, 3]", " 1,\n2,\t3,"])
def test_forms_of_tokens(tmp_path, text):
    file = tmp_path / "tokens.txt"
    file.write_text(text)
    for argument, name in ((text, "a"), (f"@{file}", "b")):
        golden = recorded(tmp_path / f"{name}.safetensors", "--tokens", argument, "--taps", "logits")
        assert golden.provenance.tokens == [1, 2, 3]


def test_prompt_is_encoded_by_the_checkpoint_s_tokenizer(tmp_path):
    prompt = "The river, caf\u00e9: 1953."
    golden = recorded(tmp_path / "g.safetensors", "--prompt", prompt, "--taps", "logits")
    assert golden.provenance.tokens == opened("gpt_oss/hf").tokenizer.encode(prompt).ids
    assert opened("gpt_oss/hf").tokenizer.decode(golden.provenance.tokens) == prompt


def test_a_prompt_from_standard_input(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The river\n")))
    golden = recorded(tmp_path / "g.safetensors", "--prompt", "-", "--taps", "logits")
    assert golden.provenance.tokens == opened("gpt_oss/hf").tokenizer.encode("The river").ids


@pytest.mark.parametrize("argument", ["@", "@folder"])
def test_tokens_from_a_folder(tmp_path, monkeypatch, argument):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    message = refused("record", GPT_OSS, "--tokens", argument, "--out", "g.safetensors")
    assert message == f"assay: {argument[1:] or '@'}: cannot be read: Is a directory\n"


@pytest.mark.parametrize(("chunks", "wanted"), [("7", [7] * 5 + [5]), ("30,1", [30] + [1] * 10), ("8,...", [8] * 5)])
def test_chunks(tmp_path, chunks, wanted):
    golden = recorded(tmp_path / "g.safetensors", "--tokens", IDS, "--chunks", chunks)
    assert golden.provenance.chunks == wanted
    np.testing.assert_allclose(golden.taps["logits"], golden_of().taps["logits"], rtol=0, atol=1e-10)


def test_taps(tmp_path):
    golden = recorded(
        tmp_path / "g.safetensors", "--tokens", "1,2,3", "--taps", "layers.1.attn_weights,*.q_rope,logits"
    )
    names = ["layers.0.q_rope", "layers.1.q_rope", "layers.1.attn_weights", "layers.2.q_rope", "logits"]
    assert golden.provenance.taps == names
    assert golden.taps["layers.1.attn_weights"].shape == (4, 3, 3)


def test_mode(tmp_path):
    golden = recorded(tmp_path / "g.safetensors", "--tokens", "1,2,3", "--mode", "float32")
    assert golden.provenance.profile == "float32"
    assert golden.taps["embed"].dtype == np.float32


def test_coverage_is_printed(tmp_path):
    result = run("record", GPT_OSS, "--tokens", IDS, "--out", tmp_path / "g.safetensors")
    for part in (
        "longest position: 39",
        "keys excluded by window: 812",
        "clamped gates:",
        "smallest router margin: 0.0459",
    ):
        assert part in result.text


def test_force_replaces_and_nothing_else_does(tmp_path):
    path = tmp_path / "g.safetensors"
    recorded(path, "--tokens", "1,2,3")
    before = path.read_bytes()
    assert "exists already" in refused("record", GPT_OSS, "--tokens", "4", "--out", path)
    assert path.read_bytes() == before
    assert recorded(path, "--tokens", "4", "--force").provenance.tokens == [4]


def test_a_sharded_golden_is_not_replaced_unasked(tmp_path):
    (tmp_path / "g.safetensors.index.json").write_text("{}")
    assert "exists already" in refused("record", GPT_OSS, "--tokens", "4", "--out", tmp_path / "g.safetensors")


WRONG = {
    "neither prompt nor tokens": ([], "either --prompt or --tokens"),
    "both": (["--prompt", "a", "--tokens", "1"], "either --prompt or --tokens"),
    "tokens of text": (["--tokens", "1,two"], "must be integers"),
    "no tokens": (["--tokens", ""], "no tokens to run"),
    "empty prompt": (["--prompt", ""], "no tokens to run"),
    "no such file": (["--tokens", "@/nowhere"], "/nowhere: cannot be read"),
    "a folder for a file": (["--tokens", "@/"], "cannot be read"),
    "outside the vocabulary": (["--tokens", "1,320"], "token outside the vocabulary\n  expected: 0 to 319\n  got: 320"),
    "below zero": (["--tokens", "-1"], "got: -1"),
    "beyond any integer": (["--tokens", "9" * 5000], "must be integers"),
    "too many": (["--tokens", "1," * 1537], "at most 1536"),
    "unknown backend": (["--tokens", "1", "--backend", "vllm"], "unknown backend 'vllm'"),
    "unknown mode": (["--tokens", "1", "--mode", "int4"], "no mode 'int4'"),
    "unknown tap": (["--tokens", "1", "--taps", "layers.9.q"], "no tap is named 'layers.9.q'"),
    "chunks of text": (["--tokens", "1", "--chunks", "a"], "--chunks must be integers"),
    "chunks of none": (["--tokens", "1", "--chunks", "0"], "chunk lengths must be positive"),
    "no chunks": (["--tokens", "1", "--chunks", ""], "chunk lengths must be positive"),
    "half a character": (["--prompt", "\udcff"], "not UTF-8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_recorded(tmp_path, case):
    arguments, part = WRONG[case]
    assert part in refused("record", GPT_OSS, "--out", tmp_path / "g.safetensors", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "part"), [("g.json", "a golden is a .safetensors file"), ("a/b/g.safetensors", "no such folder")]
)
def test_where_it_cannot_be_written(tmp_path, out, part):
    assert part in refused("record", GPT_OSS, "--tokens", "1", "--out", tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_text_without_a_tokenizer(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    message = refused("record", folder, "--prompt", "a text", "--out", tmp_path / "g.safetensors")
    assert "tokenizer.json" in message
    assert "token ids" in message
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refused("record", folder, "--prompt", "a text", "--out", tmp_path / "g.safetensors")
    assert recorded(tmp_path / "g.safetensors", "--tokens", "1,2", model=folder).provenance.tokens == [1, 2]


def test_the_header_is_plain_json(tmp_path):
    from safetensors import safe_open

    recorded(tmp_path / "g.safetensors", "--tokens", "1,2,3", "--taps", "logits")
    with safe_open(tmp_path / "g.safetensors", "np") as file:
        header = json.loads(file.metadata()["assay"])
    assert header["tokens"] == [1, 2, 3]
    assert header["coverage"]["longest_position"] == 2
