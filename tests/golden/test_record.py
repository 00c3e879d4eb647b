"""Recording: which taps, in which chunks, with what provenance and coverage."""

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.errors import GoldenError
from assay.golden.record import chosen_taps, coverage, record, split_into_chunks, validated_tokens
from assay.reference.taps import default_taps
from tests.checkpoint_files import CHECKPOINTS, opened, tokens_of
from tests.golden.faults import GPT_OSS, golden_of, taps_with

CONFIG = opened(GPT_OSS).config


# --- which taps ---


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("logits", ["logits"]),
        ("logits,embed", ["embed", "logits"]),  # in the order of computation
        ("layers.*.q_rope", [f"layers.{i}.q_rope" for i in range(3)]),
        (
            " layers.1.attn_* , ",
            [f"layers.1.attn_{x}" for x in ("norm", "scores", "weights", "heads", "out", "residual")],
        ),
        ("layers.[02].expert_ids", ["layers.0.expert_ids", "layers.2.expert_ids"]),
    ],
)
def test_globs(pattern, wanted):
    assert chosen_taps(CONFIG, pattern) == wanted


def test_no_glob_means_all_but_the_heavy_ones():
    assert chosen_taps(CONFIG, None) == default_taps(CONFIG)


@pytest.mark.parametrize("pattern", ["layers.3.q", "LOGITS", "", "q"])
def test_a_glob_that_fits_nothing_is_refused(pattern):
    with pytest.raises(GoldenError, match=f"no tap is named {pattern!r}"):
        chosen_taps(CONFIG, pattern)


# --- which chunks ---


@pytest.mark.parametrize(
    ("T", "lengths", "wanted"),
    [
        (5, None, [5]),
        (5, [5], [5]),
        (5, [9], [5]),
        (5, [1], [1] * 5),
        (9, [4, 1], [4, 1, 1, 1, 1, 1]),
        (9, [4, 3], [4, 3, 2]),
        (9, [2, 3, 100], [2, 3, 4]),
        (3, [2, 3, 100], [2, 1]),
    ],
)
def test_chunks(T, lengths, wanted):
    assert split_into_chunks(T, lengths) == wanted


@pytest.mark.parametrize("lengths", [[], [0], [3, 0], [-1]])
def test_chunks_that_cannot_be(lengths):
    with pytest.raises(GoldenError, match="chunk lengths must be positive"):
        split_into_chunks(5, lengths)


# --- tokens ---


@pytest.mark.parametrize(
    ("tokens", "part"),
    [
        ([], "no tokens"),
        ([1, 320], "token outside the vocabulary\n  expected: 0 to 319\n  got: 320"),
        ([-1], "got: -1"),
        ([10**30], "token outside the vocabulary"),
        ([1] * 1537, "too many tokens\n  expected: at most 1536\n  got: 1537"),
    ],
)
def test_tokens_that_cannot_be_run(tokens, part):
    with pytest.raises(GoldenError) as error:
        validated_tokens(tokens, CONFIG)
    assert part in str(error.value)
    assert validated_tokens((0, 319), CONFIG) == [0, 319]


# --- what a golden says of itself ---


def test_provenance():
    golden = golden_of(chunks=(30, 7))
    provenance, checkpoint = golden.provenance, opened(GPT_OSS)
    assert provenance.tokens == tokens_of("gpt_oss")
    assert provenance.chunks == [30, 7, 3]
    assert provenance.taps == list(golden.taps) == default_taps(CONFIG)
    assert (provenance.backend, provenance.profile, provenance.schema) == ("reference", "float64", 1)
    assert provenance.versions == {"numpy": np.__version__}
    assert provenance.config_sha256 == checkpoint.config_sha256
    fields = {"class": "GptOssConfig", **asdict(CONFIG)}
    assert provenance.config_sha256 == hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def test_chunks_give_the_taps_of_one_pass():
    whole, pieces = golden_of(), golden_of(chunks=(1,))
    for name, array in whole.taps.items():
        np.testing.assert_allclose(pieces.taps[name], array, rtol=0, atol=1e-12 * np.abs(array).max(), err_msg=name)


def test_only_the_chosen_taps_are_kept_though_more_are_observed():
    checkpoint = opened(GPT_OSS)
    golden = record(checkpoint, open_backend("reference", checkpoint), [1, 2, 3], taps="logits,layers.0.attn_weights")
    assert list(golden.taps) == golden.provenance.taps == ["layers.0.attn_weights", "logits"]
    assert golden.taps["layers.0.attn_weights"].shape == (4, 3, 3)
    assert "smallest_router_margin" in golden.provenance.coverage


def test_float32_mode():
    checkpoint = opened("llama/hf")
    golden = record(checkpoint, open_backend("reference", checkpoint, "float32"), [1, 2], taps="logits")
    assert golden.provenance.profile == "float32"
    assert golden.taps["logits"].dtype == np.float32


@pytest.mark.parametrize("linked", [False, True])
def test_the_checkpoint_is_found_from_the_golden_s_folder(tmp_path, monkeypatch, linked):
    """Recorded as a relative path that holds from the real folder, also where that was reached through a link."""
    real = tmp_path / "deep" / "er"
    real.mkdir(parents=True)
    beside = real
    if linked:
        beside = tmp_path / "link"
        beside.symlink_to(real)
    monkeypatch.chdir(tmp_path)
    checkpoint = opened("llama/hf")
    golden = record(checkpoint, open_backend("reference", checkpoint), [1], taps="logits", beside=beside)
    assert not os.path.isabs(golden.provenance.checkpoint)
    for seen_from in {beside, real}:
        assert (seen_from / golden.provenance.checkpoint).resolve() == (CHECKPOINTS / "llama/hf").resolve()


def test_progress_hears_of_every_block():
    checkpoint, heard = opened("llama/hf"), []
    record(
        checkpoint,
        open_backend("reference", checkpoint),
        [1, 2, 3],
        chunks=[2, 1],
        taps="logits",
        progress=heard.append,
    )
    assert [name for name in heard if name.endswith("block_out")] == ["layers.0.block_out", "layers.1.block_out"] * 2


def test_unknown_backends_and_modes_list_the_known_ones():
    checkpoint = opened("llama/hf")
    with pytest.raises(
        GoldenError, match=r"unknown backend 'vllm'[\s\S]*reference, cpu, metal, mlx-lm, transformers, llama.cpp"
    ):
        open_backend("vllm", checkpoint)
    with pytest.raises(GoldenError, match=r"'reference' has no mode 'int4'[\s\S]*float64, float32"):
        open_backend("reference", checkpoint, "int4")


# --- coverage ---


def test_keys_excluded_by_the_window():
    """Window 12 in layers 0 and 2 of three, 40 positions: query t misses t + 1 - 12 keys."""
    covered = coverage(CONFIG, 40, {})
    assert covered == {"longest_position": 39, "keys_excluded_by_window": 2 * sum(range(1, 29))}
    assert coverage(CONFIG, 12, {})["keys_excluded_by_window"] == 0
    assert coverage(CONFIG, 13, {})["keys_excluded_by_window"] == 2
    assert coverage(opened("mistral/hf").config, 13, {})["keys_excluded_by_window"] == 2
    assert coverage(opened("llama/hf").config, 40, {}) == {"longest_position": 39, "keys_excluded_by_window": 0}


def test_clamp_hits_literally():
    values = {
        "layers.0.expert_gate": np.array([7.0, 7.1, -9.0, 30.0]),
        "layers.1.expert_gate": np.array([0.0, 8.0]),
        "layers.0.expert_up": np.array([-7.1, 7.0, 7.1]),
        "layers.0.router_logits": np.array([[1.0, 5.0, 2.0, 4.0], [0.0, 3.0, 2.0, 1.75]]),
    }
    covered = coverage(CONFIG, 2, values)
    assert (covered["clamped_gates"], covered["clamped_ups"]) == (3, 2)
    assert covered["smallest_router_margin"] == 0.25  # second and third of [3, 2, 1.75, 0]


def test_margin_of_a_model_that_uses_all_its_experts_is_left_out():
    config = replace(CONFIG, num_experts_per_tok=4)
    assert "smallest_router_margin" not in coverage(config, 1, {"layers.0.router_logits": np.ones((1, 4))})


def test_coverage_of_the_small_checkpoint():
    """The prompt reaches the clamp and the window; its closest choice is the one its maker looked for."""
    covered, taps = golden_of().provenance.coverage, taps_with({})
    gates = sum(int((taps[f"layers.{i}.expert_gate"] > 7).sum()) for i in range(3))
    assert covered["clamped_gates"] == gates > 20
    assert covered["clamped_ups"] > 20
    assert covered["smallest_router_margin"] == pytest.approx(0.046, abs=5e-4)
    assert isinstance(Path(golden_of().provenance.checkpoint), Path)
