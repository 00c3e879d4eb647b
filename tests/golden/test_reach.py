"""What fewer taps leave open, against mistakes made in the Numba path by other means than the catalogue's."""

import functools

import numpy as np
import pytest

from assay.golden.check import Report, check
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.injections import INJECTIONS
from assay.golden.noise import profile_named
from assay.golden.reach import WORK, reach_of
from assay.golden.record import chosen_taps
from assay.golden.selftest import selftest
from tests.checkpoint_files import opened
from tests.golden.faults import GPT_OSS, golden_of, report_of, taps_with
from tests.golden.test_partial_report import text_of

pytestmark = pytest.mark.long

LOGITS, BLOCKS = "logits", "*block_out"


@functools.cache
def reached(pattern: str, profile: str = "float32"):
    return reach_of(golden_of(), opened(GPT_OSS), pattern, profile_named(profile))


def checked(id: str, pattern: str, profile: str = "float32") -> Report:
    """The Numba path with a mistake in it, that hands over a few taps."""
    checkpoint, golden = opened(GPT_OSS), golden_of()
    with INJECTIONS[id].backend(checkpoint, profile) as backend:
        taps = backend.run(golden.provenance.tokens, golden.provenance.chunks, chosen_taps(checkpoint.config, pattern))
    return check(golden, checkpoint, taps, "cpu", profile_named(profile), reach_work=0)


@pytest.mark.parametrize(
    ("id", "pattern", "profile"),
    [
        ("positions-from-one", LOGITS, "float32"),  # only differences of positions count in a score
        ("positions-from-one", BLOCKS, "bfloat16"),
        ("sinks-missing", LOGITS, "bfloat16"),  # open choices of experts, spanned
    ],
)
def test_a_mistake_that_is_said_to_hide_does(id: str, pattern: str, profile: str) -> None:
    assert id in reached(pattern, profile)["hides"]
    assert checked(id, pattern, profile).verdict == "match"
    assert checked(id, "*", profile).verdict == "diverges"


@pytest.mark.parametrize(
    ("id", "pattern", "profile"),
    [
        ("sinks-missing", LOGITS, "float32"),
        ("sinks-missing", BLOCKS, "bfloat16"),
        ("yarn-ramp-rounded", LOGITS, "float32"),
        ("expert-weights-equal", BLOCKS, "bfloat16"),
    ],
)
def test_a_mistake_that_is_said_to_show_does(id: str, pattern: str, profile: str) -> None:
    assert id in reached(pattern, profile)["shows"]
    assert checked(id, pattern, profile).verdict == "diverges"


def test_mistakes_that_are_said_to_be_alike_cannot_be_told_apart() -> None:
    group = next(group for group in reached(BLOCKS)["alike"] if "gate-up-swapped" in group)
    cause = checked("gate-up-swapped", BLOCKS).cause
    assert sorted(group) == sorted([cause["id"], *cause["ambiguous_with"]])
    assert checked("gate-up-swapped", "*").cause["ambiguous_with"] == []


def test_only_steps_without_a_tap_count() -> None:
    taps = taps_with({}, dtype=np.float32)
    assert report_of(taps, "float32", reach_work=WORK).reach is None
    few = {name: array for name, array in taps.items() if not name.endswith("attn_residual")}
    found = report_of(few, "float32", reach_work=WORK).reach
    assert {id for key in ("shows", "hides") for id in found[key]} == {
        id for id, mistake in CATALOGUE.items() if mistake.acts(opened(GPT_OSS)) and "attn_residual" in mistake.taps
    }


def test_what_is_not_tried_is_said() -> None:
    golden, checkpoint = golden_of(), opened(GPT_OSS)
    taps = {"logits": taps_with({}, dtype=np.float32)["logits"]}
    report = check(golden, checkpoint, taps, "x", profile_named("float32"), reach_work=1)
    assert (report.reach["shows"], report.reach["hides"]) == ([], [])
    assert len(report.reach["not_tried"]) > 90
    assert "known mistakes were not tried, to keep the check short: `assay selftest --golden GOLDEN" in text_of(report)


def test_the_text_names_what_hides_and_what_is_alike() -> None:
    taps = {name: a for name, a in taps_with({}, dtype=np.float32).items() if name.endswith(("block_out", "logits"))}
    text = text_of(report_of(taps, "float32", reach_work=WORK))
    assert "May not show here: gate-clamped-both-ways, positions-from-one." in text
    assert "Not to be told apart here: gate-up-swapped = gate-up-weights-swapped" in text


def test_the_self_test_of_fewer_taps_finds_what_shows() -> None:
    some = ("sinks-missing", "yarn-ramp-rounded", "expert-weights-equal")
    result = selftest(opened(GPT_OSS), only=some, taps=BLOCKS)
    assert (result["clean"], result["found"], result["right_tap"], result["named"]) == ("match", 3, 3, 3)
    assert {row["tap"] for row in result["rows"]} == {"layers.0.block_out"}


def test_what_nothing_comes_after_is_not_checked_and_said_so() -> None:
    taps = {name: a for name, a in taps_with({}, dtype=np.float32).items() if name in ("embed", "layers.0.attn_norm")}
    report = report_of(taps, "float32", reach_work=WORK)
    assert report.verdict == "match"
    assert set(report.not_checked) == set(report.not_supplied)
    assert {"logits", "layers.0.q", "layers.1.attn_norm"} <= set(report.not_checked)
    assert report.reach["shows"]
    assert {"sinks-missing", "yarn-ramp-rounded"} <= set(report.reach["hides"])
    assert "not checked: 58 of 60 steps, since no tap handed over is computed from them: " in text_of(report)
    assert "layer 0: q, k, v, q_rope" in text_of(report)
    assert "layers 1 to 2: attn_norm, q, k, v, q_rope" in text_of(report)
    assert "block_out; final_norm, logits" in text_of(report)
    assert "spanned by the next tap" not in text_of(report)


def test_what_a_later_tap_is_computed_from_is_checked() -> None:
    report = report_of({"logits": taps_with({}, dtype=np.float32)["logits"]}, "float32")
    assert (report.not_checked, len(report.not_supplied)) == ([], 59)
