"""assay convert and assay synth on the command line: options, tables, JSON, exit status."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from assay.cli.convert import encoder_name, size_from
from assay.cli.main import main
from assay.loaders.checkpoint import open_checkpoint
from assay.loaders.convert import convert
from assay.loaders.errors import CheckpointError
from assay.loaders.quantise import encoder_of
from tests.checkpoint_files import CHECKPOINTS, Entry, copied, edit_tensors


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_convert_says_what_became_of_each_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", CHECKPOINTS / "gpt_oss" / "hf", tmp_path / "a.gguf", "--to", "gguf") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "layers.*.mlp.experts.down_proj.weight (x3) MXFP4 same bits" in shown
    assert "layers.*.input_layernorm.weight (x3) BF16 -> F32 same bits" in shown
    assert "layout of 3 tensors: adjacent nibbles -> split-half nibbles" in shown
    assert "60 tensors" in shown
    assert "every value kept" in shown


def test_convert_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = CHECKPOINTS / "llama" / "hf", tmp_path / "mlx"
    assert run("convert", source, target, "--to", "mlx", "--quant", "affine4/32", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["path"] == str(target)
    by_name = {change["name"]: change for change in done["changes"]}
    assert by_name["model.norm.weight"]["kept"] == "bits"
    embedding = by_name["model.embed_tokens.weight"]
    assert (embedding["before"], embedding["after"], embedding["kept"]) == ("BF16", "affine4/32", "rounded")
    exact, rounded = bfloat16(source / "model.safetensors", "weight"), affine4(target / "model.safetensors")
    assert np.all(exact != 0)
    relative = np.abs(rounded - exact) / np.abs(exact)
    np.testing.assert_allclose(
        embedding["sqnr_db"], 10 * np.log10(np.sum(exact**2) / np.sum((rounded - exact) ** 2)), rtol=1e-9
    )
    # from a histogram of float32 codes without their last 12 bits of 23
    np.testing.assert_allclose(embedding["median_relative_error"], np.median(relative), rtol=2.0**-11)
    np.testing.assert_allclose(embedding["worst_relative_error"], relative.max(), rtol=1e-6)
    assert embedding["worst_index"] == list(np.unravel_index(relative.argmax(), relative.shape))


def bfloat16(file: Path, part: str) -> np.ndarray:
    """A part of the embedding of a safetensors file, read here: the upper halves of float32, as float64."""
    return (words(file, part, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)


def affine4(file: Path) -> np.ndarray:
    """An embedding of MLX, in groups of 32: eight codes a word, the lowest bits first, times a scale, plus a bias."""
    codes = words(file, "weight", "<u4")[..., None] >> np.arange(0, 32, 4, dtype="<u4") & 15
    grouped = codes.reshape(len(codes), -1, 32)
    scale, bias = (bfloat16(file, part)[..., None] for part in ("scales", "biases"))
    return (grouped * scale + bias).reshape(len(codes), -1)


def words(file: Path, part: str, dtype: str) -> np.ndarray:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[f"model.embed_tokens.{part}"]
    low, high = entry["data_offsets"]
    return np.frombuffer(data[start + low : start + high], dtype).reshape(entry["shape"])


def test_the_terminal_says_how_much_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = CHECKPOINTS / "llama" / "hf"
    assert run("convert", source, tmp_path / "a.gguf", "--to", "gguf", "--quant", "Q8_0") == 0
    shown = " ".join(capsys.readouterr().out.split())
    done = convert(open_checkpoint(source), tmp_path / "b.gguf", "gguf", quant=encoder_of("Q8_0"))
    (embedding,) = [change for change in done.changes if change.name == "model.embed_tokens.weight"]
    figures = f"{embedding.median_relative_error:.1e}, {embedding.worst_relative_error:.1e}"
    assert f"BF16 -> Q8_0 SQNR {embedding.sqnr_db:.1f} dB {figures}" in shown
    assert "median, worst error" in shown


def test_a_zero_that_became_a_number_is_infinitely_wrong_in_words_and_in_valid_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copied("llama/hf", tmp_path / "hf")
    edit_tensors(source / "model.safetensors", zero_beside_numbers)
    command = ("convert", source, tmp_path / "a", "--to", "mlx", "--quant", "affine2/32", "--force")
    assert run(*command, "--json") == 0
    done = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    (embedding,) = [change for change in done["changes"] if change["name"] == "model.embed_tokens.weight"]
    assert (embedding["worst_relative_error"], embedding["worst_index"]) == (None, [0, 1])
    assert run(*command) == 0
    assert ", infinite" in capsys.readouterr().out


def zero_beside_numbers(entries: dict[str, Entry]) -> None:
    """A row 1, 0, 2, 2, ...: two bits have no code for its zero."""
    dtype, shape, data = entries["model.embed_tokens.weight"]
    row = np.full(shape[1], 0x4000, "<u2")
    row[:2] = 0x3F80, 0
    entries["model.embed_tokens.weight"] = (dtype, shape, row.tobytes() + data[row.nbytes :])


def test_convert_says_aloud_what_had_to_grow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GGUF has no groups of 64 with a bias: exact only as float32, unless rounding is asked for."""
    source = CHECKPOINTS / "gpt_oss" / "mlx-q8"
    assert run("convert", source, tmp_path / "a.gguf", "--to", "gguf") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "note: gguf has no place for the values of affine8/64:" in shown
    assert "--quant Q8_0 keeps them small" in shown
    assert run("convert", source, tmp_path / "b.gguf", "--to", "gguf", "--quant", "Q8_0", "--json") == 0
    assert not any("has no place" in note for note in json.loads(capsys.readouterr().out)["notes"])


def test_convert_over_an_existing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("convert", CHECKPOINTS / "llama" / "hf", tmp_path / "a.gguf", "--to", "gguf")
    assert run(*command) == 0
    assert run(*command) == 2
    assert "exists already\n  what to do: give --force to replace it" in capsys.readouterr().err
    assert run(*command, "--force") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "onnx"), "unknown --to 'onnx'"),
        (("--to", "gguf", "--quant", "Q9_9"), "no --quant 'Q9_9' for gguf"),
        (("--to", "safetensors", "--quant", "Q8_0"), "no --quant 'Q8_0' for safetensors"),
        (("--to", "mlx", "--shard-size", "big"), "'big' is no size"),
        (("--to", "gguf", "--shard-size", "1GB"), "split the file with llama.cpp's llama-gguf-split"),
        (("--to", "gguf", "--quant", "q4_k"), "then: llama-quantize MODEL.gguf MODEL-Q4_K.gguf Q4_K"),
        (("--to", "gguf", "--quant", "Q5_K_M"), "then: llama-quantize MODEL.gguf MODEL-Q5_K_M.gguf Q5_K_M"),
        (("--to", "gguf", "--quant", "iq4_nl"), "no --quant 'iq4_nl' for gguf"),
        (("--to", "gguf", "--quant", ""), "no --quant '' for gguf"),
        (("--to", "mlx", "--shard-size", "9" * 400), "is no size"),
        (("--to", "mlx", "--pre", "llama-bpe"), "--pre is for a GGUF made of"),
    ],
)
def test_convert_refuses(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", CHECKPOINTS / "llama" / "hf", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pre_says_nothing_of_a_gguf_that_has_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = CHECKPOINTS / "llama" / "gguf" / "model.gguf"
    assert run("convert", source, tmp_path / "a.gguf", "--to", "gguf", "--pre", "llama-bpe") == 2
    assert "--pre is for a GGUF made of" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(ending: signal.Signals, tmp_path: Path) -> None:
    # a job that a shell runs in the background is born deaf to SIGINT, and under nohup to SIGHUP
    script = f"""
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from assay.cli.main import main
import assay.loaders.write_gguf as writer
writer._data = lambda *_: os.kill(os.getpid(), {int(ending)})
main(["convert", {str(CHECKPOINTS / "llama" / "hf")!r}, {str(tmp_path / "a.gguf")!r}, "--to", "gguf"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (130, False)
    assert not list(tmp_path.iterdir())


def test_a_closed_terminal_does_not_end_what_runs_under_nohup(tmp_path: Path) -> None:
    script = f"""
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from assay.cli.main import main
import assay.loaders.write_gguf as writer
data = writer._data
writer._data = lambda *arguments: os.kill(os.getpid(), signal.SIGHUP) or data(*arguments)
main(["convert", {str(CHECKPOINTS / "llama" / "hf")!r}, {str(tmp_path / "a.gguf")!r}, "--to", "gguf"])
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
    assert (
        open_checkpoint(tmp_path / "a.gguf").weights_sha256 == open_checkpoint(CHECKPOINTS / "llama/hf").weights_sha256
    )


@pytest.mark.parametrize("name", ["a[/b].gguf", "[bold]a.gguf", "a" * 100 + ".gguf"])
def test_names_of_files_are_shown_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    assert run("synth", "smollm2-135m", "--to", "gguf", "--layers", "1", "--out", name) == 0
    assert f"{name}: gguf, the shape of" in capsys.readouterr().out
    for verb in ("inspect", "verify"):
        assert run(verb, name) == 0
        assert capsys.readouterr().out.startswith(name)
    assert run("convert", name, f"{name}.2", "--to", "gguf") == 0
    assert f"{name}.2: gguf, 11 tensors" in capsys.readouterr().out


def test_interrupted_convert_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("assay.loaders.write_gguf._data", interrupted)
    assert run("convert", CHECKPOINTS / "llama" / "hf", tmp_path / "a.gguf", "--to", "gguf") == 130
    assert not list(tmp_path.iterdir())


def test_synth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "random.gguf"
    assert run("synth", "smollm2-135m", "--to", "gguf", "--layers", "1", "--quant", "q4_0", "--out", target) == 0
    assert "the shape of HuggingFaceTB/SmolLM2-135M-Instruct, 1 layer," in " ".join(capsys.readouterr().out.split())
    assert open_checkpoint(target).tensors["model.embed_tokens.weight"].encoding.name == "Q4_0"
    assert run("synth", "smollm2-135m", "--to", "gguf", "--layers", "1", "--out", target) == 2
    assert run("synth", "gpt-5", "--to", "gguf", "--out", tmp_path / "b.gguf") == 2


@pytest.mark.parametrize(
    ("text", "nbytes"), [("5GB", 5_000_000_000), ("1.5 mb", 1_500_000), ("700", 700), ("2K", 2000), ("1TB", 10**12)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert size_from(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5 GiB", "GB", "0.0001"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(CheckpointError, match="is no size"):
        size_from(text)


@pytest.mark.parametrize(
    ("quant", "to", "name"),
    [
        ("mxfp4", "gguf", "GGUF MXFP4"),
        ("mxfp4", "mlx", "MLX mxfp4"),
        ("MXFP4", "safetensors", "MXFP4"),
        ("q8_0", "gguf", "Q8_0"),
        ("affine4/64", "mlx", "affine4/64"),
        ("bf16", "safetensors", "BF16"),
        ("tq2_0", "gguf", "TQ2_0 (by gguf-py)"),
    ],
)
def test_names_of_encodings(quant: str, to: str, name: str) -> None:
    assert encoder_name(quant, to) == name
