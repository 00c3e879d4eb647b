"""Starting the process: kernels compiled for the first time, loaded from the cache, and the first token."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.speed.conftest import Open, Time

pytestmark = pytest.mark.speed


def assay(*arguments: object, cache: Path | None = None) -> str:
    """Standard output of `assay ARGUMENTS` in a process of its own, compiled kernels kept in a folder."""
    environment = os.environ | ({"NUMBA_CACHE_DIR": str(cache)} if cache else {})
    command = [sys.executable, "-m", "assay.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.timed_only
def test_warmup_cold(time: Time, tmp_path: Path) -> None:
    """Everything is compiled."""
    assert "kernels ready" in time(lambda: assay("warmup", cache=tmp_path), rounds=1)


def test_warmup_from_the_cache(time: Time) -> None:
    assay("warmup")
    assert "kernels ready" in time(lambda: assay("warmup"), rounds=3)


@pytest.mark.parametrize("name", ["gpt-oss-20b, 2 layers", "smollm2-135m"])
@pytest.mark.parametrize("mode", ["exact", "q8"])
def test_first_token(time: Time, checkpoint: Open, name: str, mode: str) -> None:
    """From the start of the process: import, open, load, run 8 tokens, choose one. Kernels are cached."""
    arguments = "generate", checkpoint(name).path, "--tokens", "1,2,3,4,5,6,7,8", "--max-tokens", 1, "--mode", mode
    assay(*arguments)
    assert time(lambda: assay(*arguments), rounds=3).strip().isdigit()
