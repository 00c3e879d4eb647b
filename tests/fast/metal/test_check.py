"""`assay check --backend metal` on every test checkpoint and on fresh ones: both modes, any chunks, across windows."""

from pathlib import Path

import pytest

from assay.loaders import open_checkpoint
from tests.checkpoint_files import CHECKPOINTS
from tests.golden.injection import assay, record
from tests.reference.shapes import GPT_OSS, LLAMA, make_shape

pytestmark = pytest.mark.peers

# the largest ratios measured on these, of the allowance 4, are 1.9 in float32 and 1.3 in bfloat16, of attn_heads
LARGEST_RATIO = 3.0
MODES = ["float32", "bfloat16"]
NAMES = sorted(str(p.relative_to(CHECKPOINTS)) for p in CHECKPOINTS.glob("*/*") if p.is_dir())


def tokens_for(checkpoint: Path, T: int) -> list[int]:
    import numpy as np

    return np.random.default_rng(T).integers(8, open_checkpoint(checkpoint).config.vocab_size, T).tolist()


def assert_matches(checkpoint: Path, golden: Path, mode: str) -> None:
    """By the command line: exit status 0, and every ratio well inside."""
    import json

    report = golden.with_suffix(".json")
    assert assay("check", golden, "--backend", "metal", "--mode", mode, "--json", report) == 0
    found = json.loads(report.read_text())
    assert (found["verdict"], found["not_supplied"]) == ("match", [])
    assert max(tap["ratio"] for tap in found["taps"]) < LARGEST_RATIO


def test_there_are_checkpoints_of_all_three_containers() -> None:
    assert {open_checkpoint(CHECKPOINTS / name).format for name in NAMES} == {"gguf", "safetensors", "mlx"}


@pytest.mark.parametrize("chunks", [None, "7,1,13", "1"])
@pytest.mark.parametrize("name", NAMES)
def test_test_checkpoints(name: str, chunks: str | None, tmp_path: Path) -> None:
    options = () if chunks is None else ("--chunks", chunks)
    golden = tmp_path / "g.safetensors"
    record(CHECKPOINTS / name, golden, tokens_for(CHECKPOINTS / name, 30), *options)
    for mode in MODES:
        assert_matches(CHECKPOINTS / name, golden, mode)


WINDOW = "head 64, 4 of 8 experts, window 128"
RUNS = [
    *((name, 150, None) for name in (*GPT_OSS, *LLAMA)),
    *((WINDOW, T, None) for T in (127, 128, 129, 300)),
    (WINDOW, 300, "127,1,1,64"),
    (WINDOW, 131, "126,1"),
    ("1 of 3 experts, window 5", 20, "1"),
    ("YaRN truncated, one key head, window 16", 150, "1,15,16,17,101"),
    ("mistral, window 128", 300, "127,1,1,64"),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.mark.parametrize(("name", "T", "chunks"), RUNS)
def test_fresh_checkpoints(shapes: Path, tmp_path: Path, name: str, T: int, chunks: str | None) -> None:
    """A window and a ring crossed in prefill, at a chunk's edge and in decode."""
    checkpoint, golden = shapes / name, tmp_path / "g.safetensors"
    if not checkpoint.exists():
        make_shape(name, checkpoint)
    record(checkpoint, golden, tokens_for(checkpoint, T), *(() if chunks is None else ("--chunks", chunks)))
    for mode in MODES:
        assert_matches(checkpoint, golden, mode)
