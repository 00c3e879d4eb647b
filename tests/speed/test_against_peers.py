"""The paired commands run, and what they print and save is whole. Nobody looks at the times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint_files import CHECKPOINTS

pytestmark = pytest.mark.peers

SMALL = ["--prompt", "5", "--decode", "2", "--batch", "3", "--steps", "2", "--rounds", "1", "--error-tokens", "6"]
WORK = {"prefill 5", "decode 2", "decode 2, batch of 3"}


def compared(module: str, path: str, folder: Path, *options: str) -> tuple[str, dict]:
    """What a command prints and what it saves."""
    saved = folder / "found.json"
    command = [sys.executable, "-m", f"tests.speed.{module}", str(CHECKPOINTS / path), *SMALL, "--json", str(saved)]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(saved.read_text())


def test_llama_cpp(tmp_path: Path) -> None:
    out, found = compared("against_llama_cpp", "llama/gguf-q8_0/model.gguf", tmp_path, "--check", "6")
    engines = {"llama.cpp", "cpu:q8"}
    assert {work: set(times) for work, times in found["seconds"].items()} == dict.fromkeys(WORK, engines)
    assert "| prefill 5 | cpu:q8 |" in out
    assert found["info"]["llama.cpp"]["system"] in out
    # both round activations to 8 bits: the same noise, and not none
    errors = [found["errors"][engine]["nmse"] for engine in sorted(engines)]
    assert min(errors) > 1e-7
    assert max(errors) < 1e-2
    assert found["checks"]["cpu:q8"]["verdict"] == "match"
    assert found["memory"]["cpu:q8"]["peak"] >= found["memory"]["cpu:q8"]["private"] > 0


def test_mlx_lm(tmp_path: Path) -> None:
    out, found = compared("against_mlx_lm", "llama/mlx-4bit", tmp_path, "--mode", "float32")
    assert set(found["seconds"]) == WORK
    assert "| decode 2 | metal:float32 |" in out
    assert found["errors"]["metal:float32"]["nmse"] == 0  # it is the exact mode itself
    assert 0 < found["errors"]["mlx-lm:float32"]["nmse"] < 1e-9
