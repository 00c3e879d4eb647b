"""Who may import whom (architecture), what importing the command costs, and calls that may not appear at all."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ["reference", "loaders", "fast", "golden", "bench", "cli"]
BELOW = {
    "reference": set(),
    "loaders": {"reference"},
    "fast": {"reference", "loaders"},
    "golden": {"reference", "loaders", "fast"},
    "bench": {"reference", "loaders", "fast", "golden"},
    "cli": {"reference", "loaders", "fast", "golden", "bench"},
}
# what fast may know of the oracle: records and tables, never its mathematics
RECORDS = ("assay.reference.config", "assay.reference.weights", "assay.reference.taps", "assay.reference.formats")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in it: `from a import b` gives a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_sources():
    assert {folder for folder in FOLDERS if len(sources(folder)) >= 4} >= set(FOLDERS) - {"bench"}


@pytest.mark.parametrize("path", sources(*FOLDERS), ids=where)
def test_who_may_import_whom(path):
    folder = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "assay":
            assert rest[0] in BELOW[folder] | {folder}, name
            if folder == "fast" and rest[0] == "reference":
                assert name.startswith(RECORDS), f"{name} is the oracle's mathematics"
        elif folder == "reference":
            assert top == "numpy" or top in sys.stdlib_module_names, name
        assert top != "tests", name


@pytest.mark.parametrize("path", sources(*FOLDERS, "tests", "docs"), ids=where)
def test_folders_are_imported_under_their_own_name(path):
    """`import reference` from the root would load a second copy of the package."""
    assert not {name.split(".")[0] for name in imported(path)} & set(FOLDERS)


@pytest.mark.parametrize("path", sources(*FOLDERS, "tests", "docs"), ids=where)
def test_nothing_unpickles_or_evaluates(path):
    assert not {name.split(".")[0] for name in imported(path)} & {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "shelve",
        "marshal",
    }
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "__import__", "os.system"), f"line {node.lineno}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}"
        assert keywords.get("shell", "False") == "False", f"line {node.lineno}"
        if called in ("np.load", "numpy.load"):
            assert "allow_pickle" in keywords, f"line {node.lineno}: say allow_pickle=False"
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {node.lineno}"


@pytest.mark.parametrize(
    ("source", "seen"),
    [("import reference", True), ("from golden.check import check", True), ("from assay.golden import check", False)],
)
def test_the_test_of_names_can_fail(tmp_path, source, seen):
    path = tmp_path / "x.py"
    path.write_text(source)
    assert bool({name.split(".")[0] for name in imported(path)} & set(FOLDERS)) is seen


HEAVY = ["numba", "torch", "transformers", "mlx", "gguf", "tokenizers", "llama_cpp", "jinja2", "hypothesis"]


@pytest.mark.parametrize("module", ["assay.cli.main", "assay.loaders", "assay.reference", "assay.golden.check"])
def test_importing_costs_nothing_heavy(module):
    program = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def test_the_oracle_needs_numpy_only():
    """Run from outside the checkout, where only what the package itself imports can be found."""
    program = (
        "import sys; before = set(sys.modules); import assay.reference\n"
        "import assay.reference.generate, assay.reference.formats\n"
        "tops = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(tops - set(sys.stdlib_module_names) - {'assay', 'numpy'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, cwd="/"
    )
    assert [name for name in ast.literal_eval(result.stdout) if not name.startswith("_")] == []
