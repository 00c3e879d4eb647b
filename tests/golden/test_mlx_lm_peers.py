"""mlx-lm as released: the taps are its own, its rounded YaRN ramp is found or accepted, nothing else is blamed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.check import Report, check
from assay.golden.errors import GoldenError
from assay.golden.noise import PROFILES
from assay.golden.record import record, split_into_chunks
from assay.loaders import Checkpoint, open_checkpoint
from assay.loaders.convert import convert
from tests.checkpoint_files import CHECKPOINTS
from tests.reference.shapes import GPT_OSS, make_shape

pytestmark = pytest.mark.peers
LARGEST_RATIO = 2.0  # measured: up to 1.68 (q_rope under Llama 3's scaling, in float32), 1.64 (act, in bfloat16)


def checked(
    checkpoint: Checkpoint, mode: str, T: int = 40, chunks: list[int] | None = None, strict: bool = False
) -> Report:
    """The check of mlx-lm, its rounded ramp accepted, or not if `strict`."""
    return both(checkpoint, mode, T, chunks, (strict,))[0]


def both(
    checkpoint: Checkpoint, mode: str, T: int, chunks: list[int] | None, strict: tuple[bool, ...] = (True, False)
) -> list[Report]:
    """Checks of one run of mlx-lm, its rounded ramp not accepted, and accepted."""
    tokens = np.random.default_rng(T).integers(8, checkpoint.config.vocab_size, T).tolist()
    backend = open_backend("mlx-lm", checkpoint, mode)
    lengths = None if chunks is None else split_into_chunks(T, chunks)
    golden = record(checkpoint, open_backend("reference", checkpoint), tokens, chunks=lengths, taps=None, beside=Path())
    taps = backend.run(tokens, golden.provenance.chunks, golden.provenance.taps)
    return [check(golden, checkpoint, taps, "mlx-lm", PROFILES[backend.profile], strict=each) for each in strict]


def kinds(report: Report, verdict: str = "diverges") -> set[str]:
    return {tap.tap.rsplit(".", 1)[-1] for tap in report.taps if tap.verdict == verdict}


def largest_ratio(report: Report) -> float:
    return max(tap.ratio for tap in report.taps if tap.verdict == "match")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A checkpoint of tests/checkpoints, or a shape, written at first use, with a config.json that mlx-lm reads."""
    root = tmp_path_factory.mktemp("shapes")

    def opened(name: str) -> Checkpoint:
        if name not in GPT_OSS:
            return open_checkpoint(CHECKPOINTS / name)
        if not (root / name).exists():
            make_shape(name, root / name, config_style="released")
        return open_checkpoint(root / name)

    return opened


# windows of 12, 5 and 128: the tokens go over them and round the ring
RAMPS = {
    "gpt_oss/hf": 40,
    "gpt_oss/mlx": 40,
    "gpt_oss/mlx-q8": 40,
    "1 of 3 experts, window 5": 40,
    "head 64, 4 of 8 experts, window 128": 132,
}


@pytest.mark.parametrize("chunks", [None, [7, 1, 1, 21], [1]])
@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RAMPS)
def test_the_rounded_ramp_and_nothing_else(
    shapes: Callable[[str], Checkpoint], name: str, mode: str, chunks: list[int] | None
) -> None:
    """Plain weights, MXFP4 experts, and those with the rest and the router in 8 bits; the ramps' ends are not whole."""
    strict, accepted = both(shapes(name), mode, RAMPS[name], chunks)
    assert strict.first_divergence is not None
    assert strict.first_divergence.tap == "layers.0.q_rope"
    assert kinds(strict) == {"q_rope", "k_rope"}
    assert strict.cause is not None
    assert (strict.cause["id"], strict.cause["ambiguous_with"]) == ("yarn-ramp-rounded", [])
    assert strict.cause["ratio_after"] < LARGEST_RATIO
    assert (accepted.verdict, accepted.first_divergence) == ("known-deviation", None)
    assert kinds(accepted, "known-deviation") == {"q_rope", "k_rope"}
    assert [row["id"] for row in accepted.deviations] == ["yarn-ramp-rounded"]
    assert accepted.deviations[0]["kl_nats"] > 1e-3
    assert largest_ratio(accepted) < LARGEST_RATIO


def test_every_tap_but_three() -> None:
    """Those three lie between modules: nothing hands them out."""
    report = checked(open_checkpoint(CHECKPOINTS / "gpt_oss/hf"), "float32")
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
    report = checked(checkpoint, "float32", T, chunks, strict=True)
    assert kinds(report) == (set() if "truncated" in name else {"q_rope", "k_rope"})


def test_the_config_s_clamp_is_ignored(shapes: Callable[[str], Checkpoint]) -> None:
    """It clamps at 7 whatever swiglu_limit says; the released models' is 7."""
    report = checked(shapes("head 64, no groups, 3 of 5 experts, limit 3"), "float32")
    assert kinds(report) == {"expert_act"}
    assert report.cause is not None
    assert (report.cause["id"], report.cause["ambiguous_with"]) == ("clamp-at-seven", [])
    assert largest_ratio(report) < LARGEST_RATIO


@pytest.mark.parametrize(
    ("name", "cause"),
    [("head 64, 4 of 8 experts, window 128", "yarn-missing"), ("biases, one key head of 24", "llama3-missing")],
)
def test_rope_parameters_of_transformers_5_are_not_read(name: str, cause: str, tmp_path: Path) -> None:
    """It takes plain RoPE with its default theta, which is theirs; an MLX directory that we write is read right."""
    checkpoint = open_checkpoint(make_shape(name, tmp_path / "checkpoint"))
    report = checked(checkpoint, "float32")
    assert report.first_divergence is not None
    assert (report.first_divergence.tap, kinds(report)) == ("layers.0.q_rope", {"q_rope", "k_rope"})
    assert report.cause is not None
    assert (report.cause["id"], report.cause["ambiguous_with"]) == (cause, [])
    assert report.cause["ratio_after"] < LARGEST_RATIO
    assert (report.verdict, report.deviations) == ("diverges", [])
    assert largest_ratio(report) < LARGEST_RATIO
    convert(checkpoint, tmp_path / "mlx", "mlx")
    assert checked(open_checkpoint(tmp_path / "mlx"), "float32").verdict in ("match", "known-deviation")


def test_mistral_s_window_is_ignored() -> None:
    report = checked(open_checkpoint(CHECKPOINTS / "mistral/hf"), "float32")
    assert report.first_divergence is not None
    assert (report.first_divergence.tap, kinds(report)) == ("layers.0.attn_heads", {"attn_heads"})


def test_phi3_s_fused_projections_are_taken_apart() -> None:
    """Its window is ignored, and the long factors are taken for a short prompt too."""
    checkpoint = open_checkpoint(CHECKPOINTS / "phi3/hf")
    assert checked(checkpoint, "float32", 17).not_supplied == []
    assert kinds(checked(checkpoint, "float32", 17)) == {"q_rope", "k_rope"}
    assert kinds(checked(checkpoint, "float32", 40)) == {"attn_heads"}


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama/mlx-4bit", "gpt_oss/mlx-q8"])
def test_quantised_weights_are_the_profile_s_too(name: str, mode: str) -> None:
    """4-bit everything, and MXFP4 experts with the rest and the router in 8 bits: MLX's CPU adds up in bfloat16."""
    report = checked(open_checkpoint(CHECKPOINTS / name), mode, chunks=[30, 1, 9])
    assert kinds(report) == set()
    assert largest_ratio(report) < LARGEST_RATIO


def test_attention_s_scores_are_added_up_in_mlx_s_order(shapes: Callable[[str], Checkpoint]) -> None:
    """On its CPU, with a head of 64: judged by NumPy's order they look like 1.8 times the noise."""
    import mlx.core as mx

    if mx.default_device().type != mx.cpu:
        return
    report = checked(shapes("head 64, 4 of 8 experts, window 128"), "float32", 132)
    assert max(tap.ratio for tap in report.taps if tap.tap.endswith("attn_heads")) < 1.3


def test_plain_bfloat16_is_not_enough() -> None:
    """What the profile says about MLX's CPU is needed: judged without it every product is out of its allowance."""
    import mlx.core as mx

    if mx.default_device().type != mx.cpu:
        return
    checkpoint = open_checkpoint(CHECKPOINTS / "llama/mlx-4bit")
    tokens = np.random.default_rng(1).integers(8, checkpoint.config.vocab_size, 40).tolist()
    golden = record(checkpoint, open_backend("reference", checkpoint), tokens)
    taps = open_backend("mlx-lm", checkpoint, "bfloat16").run(tokens, [40], golden.provenance.taps)
    report = check(golden, checkpoint, taps, "mlx-lm", PROFILES["bfloat16"])
    assert {"q", "k", "v"} <= kinds(report)


def test_gguf_is_refused() -> None:
    checkpoint = open_checkpoint(CHECKPOINTS / "llama/gguf")
    with pytest.raises(GoldenError, match="reads Hugging Face and MLX directories, not GGUF"):
        open_backend("mlx-lm", checkpoint)
