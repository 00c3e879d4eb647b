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
PROGRAM = [sys.executable, "-m", "assay.cli"]
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
    command = [sys.executable, "-m", "assay.cli"]
    good = subprocess.run([*command, "inspect", LLAMA], capture_output=True, text=True, timeout=60)
    assert (good.returncode, good.stderr) == (0, "")
    assert "Llama" in good.stdout
    bad = subprocess.run([*command, "inspect", "nothing"], capture_output=True, text=True, timeout=60)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("assay: nothing: cannot be read")


@pytest.mark.parametrize("verb", [["inspect"], ["inspect", "--json"], ["verify"], ["verify", "--json"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full disk to try")
def test_output_that_cannot_be_written_is_one_message(verb):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, *verb, LLAMA], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "assay: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("verb", [["inspect"], ["inspect", "--json"], ["verify"], ["verify", "--json"]])
def test_a_reader_that_left_is_no_verdict(verb):
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([*PROGRAM, *verb, LLAMA], stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (2, "")
