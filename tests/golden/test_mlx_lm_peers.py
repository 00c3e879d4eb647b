"""mlx-lm as released: the taps are its own, its rounded YaRN ramp is found, and nothing else of it is blamed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.check import Report, check
from assay.golden.errors import GoldenError
from assay.golden.noise import PROFILES
from assay.golden.record import record, split_into_chunks
from assay.loaders import Checkpoint, open_checkpoint
from assay.reference.config import YarnScaling
from tests.checkpoint_files import CHECKPOINTS
from tests.reference.shapes import make_shape

pytestmark = pytest.mark.peers
EXPERT_PRODUCTS = {"expert_gate", "expert_up", "expert_out"}


def checked(
    checkpoint: Checkpoint, mode: str, T: int = 40, chunks: list[int] | None = None, truncate: bool | None = None
) -> Report:
    """The check of mlx-lm, the oracle's ramp as the checkpoint says or as `truncate` does."""
    tokens = np.random.default_rng(T).integers(8, checkpoint.config.vocab_size, T).tolist()
    backend = open_backend("mlx-lm", checkpoint, mode)
    if truncate is not None:
        scaling = checkpoint.config.rope_scaling
        assert isinstance(scaling, YarnScaling)
        assert scaling.truncate is not truncate
        config = replace(checkpoint.config, rope_scaling=replace(scaling, truncate=truncate))
        checkpoint = replace(checkpoint, config=config)
    lengths = None if chunks is None else split_into_chunks(T, chunks)
    golden = record(checkpoint, open_backend("reference", checkpoint), tokens, chunks=lengths, taps=None, beside=Path())
    taps = backend.run(tokens, golden.provenance.chunks, golden.provenance.taps)
    return check(golden, checkpoint, taps, "mlx-lm", PROFILES[backend.profile])


def diverging(report: Report) -> set[str]:
    return {tap.tap.rsplit(".", 1)[-1] for tap in report.taps if tap.verdict == "diverges"}


@pytest.mark.parametrize("chunks", [None, [7, 1, 1, 21]])
@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt_oss/hf", "gpt_oss/mlx"])
def test_the_rounded_ramp_and_nothing_else(name: str, mode: str, chunks: list[int] | None) -> None:
    checkpoint = open_checkpoint(CHECKPOINTS / name)
    found = checked(checkpoint, mode, chunks=chunks)
    assert found.first_divergence is not None
    assert found.first_divergence.tap == "layers.0.q_rope"
    assert diverging(found) - sums_in(mode) == {"q_rope", "k_rope"}
    allowed_for = checked(checkpoint, mode, chunks=chunks, truncate=True)
    assert diverging(allowed_for) <= sums_in(mode)
    assert (allowed_for.verdict == "match") or sums_in(mode)


def sums_in(mode: str) -> set[str]:
    """Taps that MLX's CPU may spoil: on x86 it adds up products by quantised matrices in bfloat16."""
    import mlx.core as mx

    return EXPERT_PRODUCTS if mode == "bfloat16" and mx.default_device().type == mx.cpu else set()


def test_every_tap_but_three() -> None:
    """Those three lie between modules: nothing hands them out."""
    report = checked(open_checkpoint(CHECKPOINTS / "gpt_oss/hf"), "float32", truncate=True)
    assert report.not_supplied == [f"layers.{i}.expert_weights" for i in range(3)]
    dense = checked(open_checkpoint(CHECKPOINTS / "llama/hf"), "float32")
    assert (dense.verdict, dense.not_supplied) == ("match", [])


@pytest.mark.parametrize(
    ("name", "T", "chunks"),
    [("YaRN truncated, one key head, window 16", 100, [30, 1, 1, 20]), ("YaRN of gpt-oss-20b", 300, None)],
)
def test_whole_ramp_ends_leave_nothing_to_find(name: str, T: int, chunks: list[int] | None, tmp_path: Path) -> None:
    """A checkpoint whose config rounds the ramp itself matches; the released ramp's ends are not whole."""
    checkpoint = open_checkpoint(make_shape(name, tmp_path / "checkpoint"))
    report = checked(checkpoint, "float32", T, chunks)
    assert diverging(report) == (set() if "truncated" in name else {"q_rope", "k_rope"})


def test_mistral_s_window_is_ignored() -> None:
    report = checked(open_checkpoint(CHECKPOINTS / "mistral/hf"), "float32")
    assert report.first_divergence is not None
    assert (report.first_divergence.tap, diverging(report)) == ("layers.0.attn_heads", {"attn_heads"})


def test_phi3_s_fused_projections_are_taken_apart() -> None:
    """Its window is ignored, and the long factors are taken for a short prompt too."""
    checkpoint = open_checkpoint(CHECKPOINTS / "phi3/hf")
    assert checked(checkpoint, "float32", 17).not_supplied == []
    assert diverging(checked(checkpoint, "float32", 17)) == {"q_rope", "k_rope"}
    assert diverging(checked(checkpoint, "float32", 40)) == {"attn_heads"}


def test_affine_kernels_of_the_cpu_add_up_in_bfloat16() -> None:
    """No mistake of mlx-lm's, and none that a GPU makes (docs/metal.md): products by quantised matrices show it."""
    import mlx.core as mx

    report = checked(open_checkpoint(CHECKPOINTS / "llama/mlx-4bit"), "bfloat16")
    products = {"q", "k", "v", "attn_out", "gate", "up", "mlp_out", "logits"}
    if mx.default_device().type == mx.cpu:
        assert report.first_divergence is not None
        assert report.first_divergence.tap == "layers.0.q"
    assert diverging(report) <= products


def test_gguf_is_refused() -> None:
    checkpoint = open_checkpoint(CHECKPOINTS / "llama/gguf")
    with pytest.raises(GoldenError, match="reads Hugging Face and MLX directories, not GGUF"):
        open_backend("mlx-lm", checkpoint)
