"""assay inspect: the figures of the small checkpoints, as JSON and as tables."""

import json

import pytest

from assay.reference.weights import weight_shapes
from tests.checkpoint_files import CHECKPOINTS, copied, edit_tensors, opened
from tests.cli.run import run


def inspected(name: str) -> dict:
    result = run("inspect", CHECKPOINTS / name, "--json")
    assert (result.status, result.err) == (0, "")
    return json.loads(result.out)


@pytest.mark.parametrize(
    ("name", "format", "architecture"),
    [
        ("gpt_oss/hf", "safetensors", "GptOss"),
        ("gpt_oss/gguf/model.gguf", "gguf", "GptOss"),
        ("gpt_oss/mlx-q8", "mlx", "GptOss"),
        ("llama/gguf-q4_0", "gguf", "Llama"),
        ("mistral/hf", "safetensors", "Llama"),
    ],
)
def test_json(name, format, architecture):
    summary, config = inspected(name), opened(name).config
    assert (summary["format"], summary["architecture"]) == (format, architecture)
    assert summary["config"]["num_hidden_layers"] == config.num_hidden_layers
    shapes = {name: list(shape) for name, shape in weight_shapes(config).items()}
    assert {tensor["name"]: tensor["shape"] for tensor in summary["tensors"]} == shapes
    assert summary["bytes"] == sum(tensor["bytes"] for tensor in summary["tensors"])
    assert summary["unused"] == {}


def test_parameters_and_bytes_are_those_of_the_file():
    summary = inspected("llama/gguf-q8_0")
    # embedding 384 x 64; two layers of q, k, v, o, three matrices 96 x 64 and two norms; the last norm
    matrices = 384 * 64 + 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64)
    vectors = 5 * 64
    assert summary["parameters"] == matrices + vectors
    assert summary["bytes"] == matrices // 32 * 34 + vectors * 4


def test_provenance_of_a_tensor():
    tensors = {tensor["name"]: tensor for tensor in inspected("gpt_oss/hf")["tensors"]}
    experts = "model.layers.1.mlp.experts"
    assert tensors[f"{experts}.up_proj.weight"] == {
        "name": f"{experts}.up_proj.weight",
        "shape": [4, 96, 64],
        "encoding": "MXFP4",
        "bytes": 4 * 96 * 64 // 32 * 17,
        "stored_as": [f"{experts}.gate_up_proj_blocks", f"{experts}.gate_up_proj_scales"],
        "layout": ["odd rows of gate_up"],
    }


def test_tables():
    result = run("inspect", CHECKPOINTS / "gpt_oss/gguf")
    assert (result.status, result.err) == (0, "")
    for part in (
        "gguf, GptOss",
        "rope_theta 150000.0",
        "MXFP4",
        "model.layers.*.self_attn.sinks (x3)",
        "truncate False",
    ):
        assert part in result.text


def test_tables_are_readable_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip() for line in run("inspect", CHECKPOINTS / "llama/gguf").out.splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith("model.layers.*.self_attn.q_proj.weight (x2)"))
    assert lines[at].split() == ["model.layers.*.self_attn.q_proj.weight", "(x2)", "[64,", "64]", "BF16"]
    assert lines[at + 1 : at + 3] == ["blk.*.attn_q.weight", "RoPE rows from neighbour pairs to halves"]


def test_hostile_names_do_not_reach_the_terminal(tmp_path):
    folder = copied("llama/hf", tmp_path / "hostile")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder / "model.safetensors", lambda t: t.__setitem__(name, ("F32", [1], b"\x01\x01\x01\x01")))
    assert f"not used: {name}" in run("inspect", folder).text
    target = tmp_path / "[/bold]\x1b[2J"
    target.parent.mkdir(parents=True)
    folder.rename(target)
    result = run("inspect", target)
    assert result.status == 0
    assert "\x1b" not in result.out
