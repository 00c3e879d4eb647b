"""What the environment tells Numba: one message where it is nonsense, through every command that computes with it."""

import os
import subprocess
import sys

import pytest

from tests.checkpoint_files import CHECKPOINTS
from tests.cli.run import run

LLAMA = CHECKPOINTS / "llama/hf"


def assay(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    """`assay ARGUMENTS` with these settings in the environment."""
    command = [sys.executable, "-m", "assay.cli", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)


def refusal(*arguments: object, **settings: str) -> str:
    """The message of a command that cannot be carried out with these settings."""
    done = assay(*arguments, **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("assay: ")
    assert "Traceback" not in done.stderr
    return done.stderr


NONSENSE = [
    ("NUMBA_NUM_THREADS", "0", "Number of threads specified must be > 0"),
    ("NUMBA_NUM_THREADS", "abc", "its associated value 'abc' could not be parsed"),
    ("NUMBA_NUM_THREADS", "99999", "more than 8192 threads"),
    ("NUMBA_OPT", "fast", "its associated value 'fast' could not be parsed"),
    ("NUMBA_DISABLE_JIT", "1", "there are no kernels"),
    ("NUMBA_CPU_FEATURES", "avx2", "begins with + or -"),
]


@pytest.mark.parametrize(("name", "value", "part"), NONSENSE)
def test_settings_that_are_none(name, value, part):
    message = refusal("generate", LLAMA, "--tokens", "1", "--max-tokens", 1, **{name: value})
    assert part in message
    assert f"got: {name}={value}\n  what to do: correct or unset" in message


def test_every_command_refuses_them(tmp_path):
    golden = tmp_path / "g.safetensors"
    assert run("record", LLAMA, "--tokens", "1,2", "--out", golden).status == 0
    recorded_by_cpu = ["record", LLAMA, "--tokens", "1", "--backend", "cpu", "--out", tmp_path / "h.safetensors"]
    for command in (recorded_by_cpu, ["check", golden, "--backend", "cpu"], ["warmup"]):
        assert "Number of threads" in refusal(*command, NUMBA_NUM_THREADS="0")
    assert list(tmp_path.iterdir()) == [golden]


def test_threads_that_cannot_be_had(tmp_path):
    golden = tmp_path / "g.safetensors"
    assert run("record", LLAMA, "--tokens", "1,2", "--out", golden).status == 0
    for command in (["check", golden, "--backend", "cpu"], ["generate", LLAMA, "--tokens", "1"]):
        assert "'nonsense' is unknown to Numba" in refusal(*command, NUMBA_THREADING_LAYER="nonsense")


def test_where_numba_is_not_needed_its_settings_are_not_read():
    done = assay("generate", LLAMA, "--tokens", "1", "--max-tokens", 1, "--backend", "reference", NUMBA_NUM_THREADS="0")
    assert done.returncode == 0
