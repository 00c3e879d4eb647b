"""The programs of docs/vectors.md: they compile, pass on the vectors, and fail on a wrong value."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from assay.golden.vectors import vectors

PAGE = (Path(__file__).parents[2] / "docs/vectors.md").read_text("utf-8")
COMPILERS = {
    "rust": ("rs", ["rustc", "--edition", "2021", "-O"]),
    "cpp": ("cpp", ["g++", "-std=c++17", "-O2"]),
}  # no Swift here: its program was not run


@pytest.mark.parametrize("language", COMPILERS)
def test_the_documented_program_checks_its_kernel(language, tmp_path):
    suffix, command = COMPILERS[language]
    # a rustc without a toolchain is on the path of some machines, and cannot even say its version
    if not shutil.which(command[0]) or subprocess.run([command[0], "--version"], capture_output=True).returncode:
        pytest.skip(f"no {command[0]} that runs")
    source = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert source is not None
    (tmp_path / f"main.{suffix}").write_text(source[1], "utf-8")
    subprocess.run([*command, f"main.{suffix}", "-o", "main"], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "vectors").mkdir()
    blocks, expected = vectors("MXFP4")
    wrong = expected.copy()
    wrong.view(np.uint32)[900, 3] ^= 1  # the last bit of one value
    for values, passes in ((expected, True), (wrong, False)):
        save_file({"blocks": blocks, "expected": values}, tmp_path / "vectors/MXFP4.safetensors")
        done = subprocess.run([str(tmp_path / "main")], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) == passes
    assert "block 900, element 3" in done.stdout + done.stderr
