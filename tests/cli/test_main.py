"""The command itself: exit status, help, interruption, and bad checkpoints through every verb that opens one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import assay.reference as reference
from tests.checkpoint_files import CHECKPOINTS, copied
from tests.cli.run import refused, run
from tests.loaders.broken_checkpoints import BROKEN, path_of

LLAMA = CHECKPOINTS / "llama/hf"
COMMAND = [sys.executable, "-m", "assay.cli"]
VERBS = ["demo", "inspect", "record", "check", "generate"]


def test_help_lists_every_verb():
    result = run("--help")
    assert result.status == 0
    for verb in VERBS:
        assert verb in result.out
        assert run(verb, "--help").status == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["unknown"],
        ["inspect"],
        ["inspect", "x", "--unknown"],
        ["record", LLAMA],
        ["generate", LLAMA, "--max-tokens", "0"],
        ["generate", LLAMA, "--max-tokens", "many"],
        ["generate", LLAMA, "--temperature", "-1"],
        ["generate", LLAMA, "--tokens", "1", "--temperature", "nan"],
    ],
)
def test_bad_usage_is_status_2(arguments):
    result = run(*arguments)
    assert result.status == 2
    assert "Traceback" not in result.err
    assert result.out == ""


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_one_message_and_nothing_written(case, tmp_path):
    name, spoil, parts = BROKEN[case]
    folder, out = copied(name, tmp_path / name.split("/")[1]), tmp_path / "out"
    spoil(folder)
    out.mkdir()
    message = refused("record", path_of(folder), "--tokens", "1,2,3", "--out", out / "g.safetensors")
    assert all(part in message for part in parts)
    assert refused("inspect", path_of(folder), "--json") == message
    assert refused("generate", path_of(folder), "--tokens", "1,2,3", "--backend", "reference") == message
    assert list(out.iterdir()) == []


def test_a_path_that_is_not_there():
    assert "/nowhere/x.gguf: cannot be read" in refused("inspect", "/nowhere/x.gguf")


@pytest.mark.parametrize(
    ("error", "status", "part"), [(KeyboardInterrupt(), 130, ""), (MemoryError(), 2, "out of memory")]
)
def test_interruption_writes_nothing(tmp_path, monkeypatch, error, status, part):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(reference, "forward", fail)
    result = run("record", LLAMA, "--tokens", "1,2", "--out", tmp_path / "g.safetensors")
    assert result.status == status
    assert part in result.err
    assert list(tmp_path.iterdir()) == []


def test_as_a_program():
    """The installed entry point's module, in a process of its own."""
    good = subprocess.run([*COMMAND, "inspect", LLAMA], capture_output=True, text=True, timeout=60)
    assert (good.returncode, good.stderr) == (0, "")
    assert "Llama" in good.stdout
    bad = subprocess.run([*COMMAND, "inspect", "nothing"], capture_output=True, text=True, timeout=60)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("assay: nothing: cannot be read")


LONG = ["generate", LLAMA, "--tokens", "1,2,3", "--max-tokens", "400", "--backend", "reference"]
OUTPUTS = [LONG, ["inspect", LLAMA, "--json"], ["inspect", LLAMA], ["--help"]]  # written by print, and by rich


@pytest.mark.parametrize("arguments", OUTPUTS)
def test_nobody_reads_the_output(arguments):
    """Neither a match nor a divergence, whatever the verb: `| head` with pipefail must not say so."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert result.returncode == 141
    assert "Error" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("arguments", OUTPUTS)
def test_output_that_cannot_be_written(arguments):
    with open("/dev/full", "w") as full:
        result = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == "assay: the output cannot be written: No space left on device\n"


def test_text_that_the_output_s_encoding_lacks():
    arguments = ["generate", LLAMA, "--prompt", "The river", "--max-tokens", "12", "--temperature", "3", "--seed", "2"]
    out = [
        subprocess.run(
            [*COMMAND, *arguments, "--backend", "reference"],
            env=os.environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout.decode(encoding)
        for encoding in ("utf-8", "ascii")
    ]
    assert not out[0].isascii()
    assert out[1] == out[0].encode("ascii", "replace").decode()
