"""A choice of experts that a mistake makes a near tie, in a step whose choices the backend does not show."""

import numpy as np

from assay.golden.backends import open_backend
from assay.golden.diagnose import Diagnosis, together
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.replay import Replay, Run
from assay.golden.noise import PROFILES
from assay.golden.record import record
from tests.checkpoint_files import opened, tokens_of, with_weight
from tests.golden.faults import GPT_OSS, report_of

BLOCK, LOGITS, IDS = (f"layers.0.{kind}" for kind in ("block_out", "router_logits", "expert_ids"))
T = 20  # the position whose choice is tied


def with_mistake(checkpoint, flipped=None) -> Replay:
    run = Run(checkpoint, tokens_of("gpt_oss"), [40], {})
    replay = Replay(run, together((CATALOGUE["yarn-ramp-rounded"],)), PROFILES["float64"], flipped)
    replay.value(BLOCK)
    return replay


def test_a_mistake_is_named_though_it_made_a_choice_a_near_tie(monkeypatch) -> None:
    logits_N = with_mistake(opened(GPT_OSS)).routed[LOGITS][T]
    second, third = np.argsort(logits_N)[::-1][1:3]

    def tied(bias_N: np.ndarray) -> np.ndarray:
        bias_N[third] += logits_N[second] - logits_N[third]
        return bias_N

    checkpoint = with_weight(opened(GPT_OSS), "model.layers.0.mlp.router.bias", tied)
    golden = record(checkpoint, open_backend("reference", checkpoint), tokens_of("gpt_oss"))
    got = with_mistake(checkpoint, {IDS: np.arange(40) == T}).value(BLOCK)
    assert np.abs(got - with_mistake(checkpoint).value(BLOCK))[T].max() > 0.1  # another expert's row
    assert report_of({BLOCK: got}, "float32", golden, checkpoint).cause["id"] == "yarn-ramp-rounded"
    monkeypatch.setattr(Diagnosis, "_following", lambda self, mistakes, name, value, routed: value)
    assert report_of({BLOCK: got}, "float32", golden, checkpoint).cause is None
