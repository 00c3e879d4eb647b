"""Faultless transformers models: `assay check` exits 0 in float32 and bfloat16, in one pass, chunks, token by token.

Together with test_injected_mistakes_peers.py this brackets the allowance: clean models stay below LARGEST_RATIO,
and no mistake there shows with less than eleven times the noise.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden.injection import assay, check, random_tokens, record
from tests.reference.shapes import GPT_OSS, LLAMA, make_shape

pytestmark = pytest.mark.peers

# measured: up to 2.5 in float32, and 1.00 in bfloat16, where the profile rounds wherever transformers does
LARGEST_RATIO = {"float32": 3.0, "bfloat16": 1.5}

# checkpoint, tokens, chunks: windows are crossed in prefill, at a chunk's edge, and in decode
RUNS = [
    *((name, 300, None) for name in (*GPT_OSS, *LLAMA)),
    ("1 of 3 experts, window 5", 40, "1"),
    ("head 64, 4 of 8 experts, window 128", 300, "127,1,1,64"),
    ("YaRN truncated, one key head, window 16", 150, "1,15,16,17,101"),
    ("head 64, no groups, 3 of 5 experts, limit 3", 30, "1"),
    ("all 4 experts, window 127, layers in another order", 300, "150,7"),
    ("YaRN of gpt-oss-20b", 1000, "500"),
    ("tied, Llama-3 RoPE, grouped", 60, "1"),
    ("biases, one key head of 24", 200, "64,1,33"),
    ("mistral, window 12", 60, "1"),
    ("mistral, window 128", 300, "127,1,1,64"),
]

Goldens = Callable[[str, int, str | None], Path]


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> Goldens:
    """Answers the golden of a run, its checkpoint and itself written once."""
    root = tmp_path_factory.mktemp("clean")

    def golden(name: str, T: int, chunks: str | None) -> Path:
        checkpoint, path = root / name, root / f"{name} {T} {chunks}.safetensors"
        if not checkpoint.exists():
            make_shape(name, checkpoint)
        if path.exists():
            return path
        return record(checkpoint, path, random_tokens(T, seed=T), *(() if chunks is None else ("--chunks", chunks)))

    return golden


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "T", "chunks"), RUNS)
def test_a_faultless_model_matches(goldens: Goldens, name: str, T: int, chunks: str | None, mode: str) -> None:
    status, report = check(goldens(name, T, chunks), mode)
    assert (status, report["verdict"], report["first_divergence"]) == (0, "match", None)
    assert len(report["taps"]) > 30
    assert {tap["nonfinite"] for tap in report["taps"]} == {0}
    assert max(tap["ratio"] for tap in report["taps"]) < LARGEST_RATIO[mode] < report["allowance"]


def test_attention_weights_of_chunks_lie_at_their_keys(tmp_path: Path) -> None:
    """The sliding layers' cache in transformers forgets keys that the window has passed."""
    make_shape("1 of 3 experts, window 5", tmp_path / "checkpoint")
    golden = record(
        tmp_path / "checkpoint", tmp_path / "g.safetensors", random_tokens(30), "--chunks", "20,1,3", "--taps", "*"
    )
    status, report = check(golden, "float32")
    assert status == 0
    assert sum(tap["tap"].endswith("attn_weights") for tap in report["taps"]) == 3


def test_bfloat16_does_not_pass_for_float32(goldens: Goldens, tmp_path: Path) -> None:
    """What the allowance of one profile lets pass is no other's."""
    golden = goldens("1 of 3 experts, window 5", 300, None)
    arguments = ("check", golden, "--backend", "transformers", "--mode", "bfloat16", "--profile", "float32")
    assert assay(*arguments) == 1
