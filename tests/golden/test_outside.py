"""Faults that no mistake of the catalogue explains get no cause but a description; two mistakes at once are named."""

import functools

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.check import Report, check
from assay.golden.coverage import shown_by
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.injecting import Injection
from assay.golden.mistakes.injections import INJECTIONS
from assay.golden.noise import profile_named
from assay.golden.record import record
from assay.golden.selftest import good_prompt
from assay.golden.store import Golden
from assay.reference.taps import default_taps
from tests.checkpoint_files import opened
from tests.golden.faults import GPT_OSS
from tests.golden.injected_numba import OUTSIDE, pairs

pytestmark = pytest.mark.long

FINE = (  # within the noise of bfloat16
    "noise on one head of q",
    "noise on one head's keys",
    "q in half precision",
    "mlp_out in half precision",
    "a slope of 1.6",
)


@functools.cache
def prompt() -> Golden:
    tokens, chunks = good_prompt(opened(GPT_OSS))
    return record(opened(GPT_OSS), open_backend("reference", opened(GPT_OSS)), tokens, chunks=chunks)


def report_with(injection: Injection, mode: str = "float32") -> Report:
    checkpoint, golden = opened(GPT_OSS), prompt()
    with injection.backend(checkpoint, mode) as backend, np.errstate(all="ignore"):
        taps = backend.run(golden.provenance.tokens, golden.provenance.chunks, default_taps(checkpoint.config))
    return check(golden, checkpoint, taps, "cpu", profile_named(mode), strict=True)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "q8"])
def test_no_fault_from_outside_gets_a_cause(mode: str) -> None:
    found = {what: report_with(fault.injection, mode) for what, fault in OUTSIDE.items()}
    shown = {what: r.first_divergence.tap for what, r in found.items() if r.first_divergence is not None}
    fine = FINE if mode == "bfloat16" else ()
    assert shown == {what: fault.tap for what, fault in OUTSIDE.items() if what not in fine}
    assert [(what, r.cause["id"]) for what, r in found.items() if r.cause is not None] == []


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("q by the layer before", "the values of layers.1.q by the weights of layer 0"),
        ("experts by the layer before", "the values of layers.1.expert_up by the weights of layer 0"),
        ("a router row lost", "in place of every value at expert 1"),
        (
            "positions from three",
            "rotary pairs 0 to 7 turned further by the same angle at every position, radians: 3, ",
        ),
        ("a norm by the layer before", "a factor of its own for each channel: "),
        ("a stale row of keys", "positions 5 and 26 hold what belongs 1 before"),
        ("logits one id late", "vocabulary ids moved on by 1, the end going round to the beginning"),
        ("the last logits lost", "zero at vocabulary ids from 316 on"),
    ],
)
def test_what_is_not_known_is_described(what: str, sentence: str) -> None:
    assert sentence in report_with(OUTSIDE[what].injection).structure["sentence"]


@pytest.mark.parametrize("same_tap", [False, True])
def test_two_mistakes_at_once_are_not_taken_for_a_third(same_tap: bool) -> None:
    """Either is named, where it acts first, or both; none where both exchange the same operation."""
    checkpoint = opened(GPT_OSS)
    acting = [mistake for mistake in CATALOGUE.values() if mistake.acts(checkpoint)]
    ids = [id for id in shown_by(prompt(), checkpoint, acting, profile_named("float32")) if id in INJECTIONS]
    named = wrong = 0
    made = list(pairs(ids, checkpoint.config, same_tap, 30))
    for a, b, injection in made:
        cause = report_with(injection).cause
        causes = set() if cause is None else {*cause["id"].split(" + "), *cause["ambiguous_with"]}
        named += bool(causes & {a, b})
        wrong += bool(causes) and not causes & {a, b}
    assert len(made) == 30
    assert named >= 27
    assert wrong <= 1  # halved and doubled, two experts' weights are those that were not applied
