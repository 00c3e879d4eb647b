"""assay verify: what it prints, its JSON, its exit status."""

import json
import os
from pathlib import Path

import pytest

from assay.cli.main import main
from tests.checkpoint_files import CHECKPOINTS, copied, edit_tensors
from tests.loaders.planters import K_PROJ, ONE, begin, poke


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as exit:
        main(["verify", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(exit.value.code or 0), captured.out, captured.err


@pytest.fixture
def spoilt(tmp_path: Path) -> tuple[Path, int]:
    """A checkpoint with one infinity, and the byte where that is."""
    folder = copied("llama/hf", tmp_path / "spoilt")
    byte = begin(folder / ONE, K_PROJ) + 2 * 5
    poke(folder / ONE, byte, b"\x80\x7f")
    return folder, byte


def test_good(capsys):
    status, out, err = run(capsys, CHECKPOINTS / "llama/gguf/model.gguf")
    assert status == 0
    assert ": good (21 tensors, 0.2 MB in 1 file; every value, " in out
    assert not err


def test_a_fault_is_printed_with_its_place(capsys, spoilt, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder, byte = spoilt
    status, out, _ = run(capsys, folder)
    assert status == 1
    assert "1 fault (20 tensors" in out
    for part in ("error", K_PROJ, f"{ONE}, byte {byte}", "a value is not finite at element [0, 5]", "got: infinity"):
        assert part in out


def test_quick_sees_no_value(capsys, spoilt):
    status, out, _ = run(capsys, spoilt[0], "--quick")
    assert status == 0
    assert "headers and settings only" in out


def test_json(capsys, spoilt):
    folder, byte = spoilt
    status, out, _ = run(capsys, folder, "--json")
    report = json.loads(out)
    assert status == 1
    assert report["verdict"] == "invalid"
    assert report["findings"] == [
        {
            "severity": "error",
            "check": "values",
            "what": "a value is not finite at element [0, 5]",
            "tensor": K_PROJ,
            "file": str(folder / ONE),
            "byte": byte,
            "expected": None,
            "got": "infinity (bfloat16 code 0x7F80)",
        }
    ]
    status, out, _ = run(capsys, CHECKPOINTS / "llama/hf", "--json")
    assert (status, json.loads(out)["verdict"], json.loads(out)["findings"]) == (0, "good", [])


def test_hostile_names_do_not_reach_the_terminal(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = copied("llama/hf", tmp_path / "hostile")
    edit_tensors(folder / ONE, lambda t: t.__setitem__("[red]\x1b[2J\u202e", ("F32", [1], b"\x01\x01\x01\x01")))
    status, out, _ = run(capsys, folder)
    assert status == 1
    assert "[red]\\x1b[2J\\u202e" in out
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_what_cannot_be_carried_out(capsys, tmp_path):
    status, _, err = run(capsys, tmp_path / "nowhere")
    assert status == 2
    assert "no such file or directory" in err
    assert run(capsys, CHECKPOINTS / "llama/hf", "--same-as", tmp_path / "nowhere")[0] == 2


def test_same_as(capsys):
    status, out, _ = run(capsys, CHECKPOINTS / "gpt_oss/hf", "--same-as", CHECKPOINTS / "gpt_oss/gguf")
    assert status == 0
    assert "the same: 60 tensors" in out
    status, out, _ = run(capsys, CHECKPOINTS / "gpt_oss/hf", "--same-as", CHECKPOINTS / "gpt_oss/gguf", "--json")
    assert status == 0
    report = json.loads(out)
    assert (report["verdict"], report["differences"], report["config"]) == ("same", [], {})
    assert len(report["sha256"]["model.norm.weight"]) == 64


def test_different(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run(capsys, CHECKPOINTS / "llama/hf", "--same-as", CHECKPOINTS / "llama/gguf-q8_0")
    assert status == 1
    assert "different: 15 of 20 tensors, 0 config fields" in out
    assert ": BF16 in A, Q8_0 in B" in out
    status, out, _ = run(capsys, CHECKPOINTS / "llama/hf", "--same-as", CHECKPOINTS / "mistral/hf", "--json")
    report = json.loads(out)
    assert (status, report["verdict"]) == (1, "different")
    assert set(report["config"]) == {"rope_scaling", "tie_word_embeddings", "sliding_window"}


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_pipe_is_refused_and_not_waited_for(capsys, tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    assert run(capsys, tmp_path / "model.gguf")[0] == 1


def test_quick_cannot_prove_that_weights_are_the_same(capsys):
    status, out, err = run(capsys, CHECKPOINTS / "llama/hf", "--same-as", CHECKPOINTS / "llama/gguf", "--quick")
    assert (status, out) == (2, "")
    assert "--quick and --same-as exclude each other" in err
