"""Compiler options: one module only, caching that survives what it must, threads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numba
import pytest

import assay.fast.cpu
from assay.fast.cpu import jit

FOLDER = Path(assay.fast.cpu.__file__).parent


def test_few_modules_import_numba():
    """A raw njit would bring its own options."""
    few = [*(FOLDER / f"{name}.py" for name in ("jit", "simd", "phases")), FOLDER.parent / "numba_support.py"]
    for path in FOLDER.parent.rglob("*.py"):
        if path not in few:
            assert not re.search(r"\bnumba\.|import numba|from numba|\bn?jit\(", path.read_text()), path


def test_numba_is_imported_by_the_cpu_path_only():
    """Command line help and loaders must not wait for it."""
    packages = "assay.fast, assay.fast.engine, assay.loaders, assay.golden, assay.cli"
    code = f"import sys, {packages}; print('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


USE_KERNEL = """
import numpy as np
from assay.fast.cpu.ops import top_k
from assay.fast.cpu import ops
ids = top_k(np.float32([[1, 3, 2]]), 2)
assert ids.tolist() == [[1, 2]]
print(sum(ops._top_k.stats.cache_hits.values()))
"""


def run_copy(tmp_path, cache_home):
    """The kernels from a copy of the sources whose __pycache__ cannot be written: the cache hits seen."""
    copy = tmp_path / "cpu"
    if not copy.exists():
        copy.mkdir()
        for path in FOLDER.glob("*.py"):
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / "__pycache__").write_text("a file, not a folder")
    code = f"import assay.fast; assay.fast.__path__.insert(0, {str(tmp_path)!r})\n{USE_KERNEL}"
    env = os.environ | {"XDG_CACHE_HOME": str(cache_home), "HOME": str(cache_home), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the user's cache folder is found by XDG_CACHE_HOME on Linux")
def test_cache_where_the_package_is_read_only(tmp_path):
    """Kernels go to the user's cache folder and come from there, until any module beside theirs changes."""
    home = tmp_path / "home"
    home.mkdir()
    assert run_copy(tmp_path, home) == 0
    assert run_copy(tmp_path, home) == 1
    with (tmp_path / "cpu" / "rows.py").open("a") as file:
        file.write("# another constant\n")
    assert run_copy(tmp_path, home) == 0


def test_no_cache_folder_at_all(tmp_path):
    """Kernels still compile and run."""
    nowhere = tmp_path / "nowhere"
    nowhere.write_text("a file, not a folder")
    assert run_copy(tmp_path, nowhere) == 0
    assert run_copy(tmp_path, nowhere) == 0


def test_threads_are_set_and_restored():
    before = numba.get_num_threads()
    with jit.threads(1):
        assert numba.get_num_threads() == 1
    assert numba.get_num_threads() == before
    with pytest.raises(ValueError, match="threads"), jit.threads(10**6):
        pass
    assert numba.get_num_threads() == before


def test_thread_count_is_restored_after_an_error():
    before = numba.get_num_threads()
    with pytest.raises(KeyError), jit.threads(1):
        raise KeyError
    assert numba.get_num_threads() == before


@jit.piece
def twice(x):
    return 2 * x


def test_a_piece_has_no_code_of_its_own():
    """Python may call it all the same; an address would be one of nothing."""
    assert twice(21) == 42
    with pytest.raises(TypeError, match="is a piece of kernels"):
        jit.address_of(twice, (21,))
