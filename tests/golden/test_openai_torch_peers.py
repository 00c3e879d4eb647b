"""OpenAI's own torch model: every tap of it is what its profile makes of the oracle's, in both dtypes."""

import dataclasses
from importlib.util import find_spec
from typing import Any

import pytest

from assay.golden.backends import open_backend
from assay.golden.check import Report, check
from assay.golden.errors import GoldenError
from assay.golden.noise import PROFILES
from assay.golden.record import record
from assay.loaders import Checkpoint, open_checkpoint
from tests.checkpoint_files import CHECKPOINTS, tokens_of

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(find_spec("gpt_oss") is None, reason="gpt-oss is not installed (make peers, --no-deps)"),
]

# measured: 1.000 in bfloat16, where the emulation is the model's own sequence of roundings; 1.9 in float32
LARGEST_RATIO = {"bfloat16": 1.01, "float32": 2.5}


def checked(checkpoint: Checkpoint, mode: str, chunks: list[int], profile: str | None = None) -> Report:
    golden = record(checkpoint, open_backend("reference", checkpoint), tokens_of("gpt_oss"), chunks=chunks)
    backend = open_backend("openai-torch", checkpoint, mode)
    taps = backend.run(golden.provenance.tokens, golden.provenance.chunks, golden.provenance.taps)
    return check(golden, checkpoint, taps, backend.name, PROFILES[profile or backend.profile])


@pytest.mark.parametrize("mode", ["bfloat16", "float32"])
@pytest.mark.parametrize("chunks", [[40], [30, 1, 9]])
@pytest.mark.parametrize("name", ["gpt_oss/hf", "gpt_oss/gguf"])
def test_every_tap_is_its_profile_s(name: str, chunks: list[int], mode: str) -> None:
    report = checked(open_checkpoint(CHECKPOINTS / name), mode, chunks)
    assert (report.verdict, report.not_supplied) == ("match", [])
    assert max(tap.ratio or 0.0 for tap in report.taps) < LARGEST_RATIO[mode]


def test_it_rounds_more_than_it_stores() -> None:
    report = checked(open_checkpoint(CHECKPOINTS / "gpt_oss/hf"), "bfloat16", [40], "bfloat16")
    assert max(tap.ratio or 0.0 for tap in report.taps) > 1.5


def test_a_mistake_in_its_code_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt_oss.torch import model

    swiglu = model.swiglu
    monkeypatch.setattr(model, "swiglu", lambda x, limit: swiglu(x, alpha=1.0, limit=limit))
    report = checked(open_checkpoint(CHECKPOINTS / "gpt_oss/hf"), "bfloat16", [40])
    assert report.first_divergence is not None
    assert report.first_divergence.tap == "layers.0.expert_act"
    assert report.cause is not None
    assert report.cause["id"] == "silu-plain"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rms_norm_eps": 1e-6}, "rms_norm_eps fixed"), ({"layer_types": ("full_attention",) * 3}, "layer_types fixed")],
)
def test_what_the_model_has_fixed_is_said(change: dict[str, Any], message: str) -> None:
    checkpoint = open_checkpoint(CHECKPOINTS / "gpt_oss/hf")
    other = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **change))
    with pytest.raises(GoldenError, match=message):
        open_backend("openai-torch", other)


def test_only_gpt_oss() -> None:
    with pytest.raises(GoldenError, match="runs gpt-oss only"):
        open_backend("openai-torch", open_checkpoint(CHECKPOINTS / "llama/hf"))
