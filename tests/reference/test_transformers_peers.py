"""The oracle in float64 against transformers in float32, on checkpoints that transformers' own classes describe."""

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.backends.reference import ReferenceBackend
from assay.golden.check import Report, check
from assay.golden.measure import relative
from assay.golden.noise import profile_named
from assay.golden.record import record
from assay.golden.store import Golden
from assay.loaders import open_checkpoint
from tests.golden.injection import random_tokens
from tests.reference.shapes import GPT_OSS, LLAMA, make_shape

pytestmark = pytest.mark.peers

PROMPT = 300
UNSEEN = ("attn_scores", "expert_out")  # transformers computes them where nothing outside can look
END_TO_END = 1e-5  # relative error that float32 rounding piles up over three layers; measured: up to 4.4e-6
LARGEST_RATIO = 3.0  # multiples of the step's own float32 noise; measured: up to 2.4, where inv_freq is float32 too


Compared = tuple[Golden, dict[str, np.ndarray], Report]


@pytest.fixture(scope="module", params=[*GPT_OSS, *LLAMA])
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """The oracle's taps, transformers' taps, and the report of checking these by the oracle."""
    checkpoint = open_checkpoint(make_shape(request.param, tmp_path_factory.mktemp("shapes") / "checkpoint"))
    golden = record(checkpoint, ReferenceBackend(checkpoint, "float64"), random_tokens(PROMPT), taps="*")
    tokens, chunks, names = golden.provenance.tokens, golden.provenance.chunks, golden.provenance.taps
    taps = dict(open_backend("transformers", checkpoint, "float32").run(tokens, chunks, names))
    report = check(golden, checkpoint, taps, "transformers", profile_named("float32"))
    return golden, taps, report


def test_logits_agree(compared: Compared) -> None:
    golden, taps, _ = compared
    expected, got = golden.taps["logits"], taps["logits"].astype(np.float64)
    nmse = np.square(got - expected).sum() / np.square(expected).sum()
    assert nmse < 1e-10


def test_every_tap_agrees_end_to_end(compared: Compared) -> None:
    golden, taps, report = compared
    # the seeds leave no near tie: smallest_router_margin is 2.9e-4 and more, in logits whose error is about 1e-6
    assert report.routing is None or report.routing["flips"] == 0, golden.provenance.coverage
    errors = {name: relative(taps[name].astype(np.float64) - golden.taps[name], golden.taps[name]) for name in taps}
    assert {name: error for name, error in errors.items() if error > END_TO_END} == {}


def test_every_step_is_within_float32_noise(compared: Compared) -> None:
    _, _, report = compared
    assert [tap.tap for tap in report.taps if tap.verdict != "match"] == []
    assert (report.verdict, report.scope) == ("match", "forced")
    assert max(tap.ratio or 0 for tap in report.taps) < LARGEST_RATIO


def test_transformers_exposes_all_but_two_kinds_of_tap(compared: Compared) -> None:
    golden, taps, _ = compared
    missing = set(golden.provenance.taps) - set(taps)
    assert missing == {name for name in golden.provenance.taps if name.endswith(UNSEEN)}
