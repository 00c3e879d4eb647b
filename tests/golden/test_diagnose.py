"""Causes: known mistakes are named, pairs too, and what the catalogue does not know stays unknown."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.check import check
from assay.golden.measure import ALLOWANCE
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.injections import INJECTIONS
from assay.golden.mistakes.replay import Replay, Run
from assay.golden.noise import PROFILES
from assay.golden.report import none_fits
from assay.reference.taps import default_taps
from tests.checkpoint_files import opened, tokens_of
from tests.golden.faults import GPT_OSS, golden_of, report_of, scaled, taps_with

CHUNKS = (21, 1, 18)
Fault = Callable[[np.ndarray], np.ndarray]


def on(index: tuple, change: Fault) -> Fault:
    """A fault of some elements only."""

    def fault(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = change(array[index])
        return array

    return fault


def noise(size: float) -> Fault:
    return lambda array: array + size * np.random.default_rng(5).standard_normal(array.shape) * array.std()


ALL = slice(None)
# faults that no mistake of the catalogue makes: tap, what happens to it
UNKNOWN: dict[str, tuple[str, Fault]] = {
    "a channel of q zeroed": ("layers.0.q", on((ALL, ALL, 3), np.zeros_like)),
    "a channel of v zeroed": ("layers.1.v", on((ALL, ALL, 7), np.zeros_like)),
    "noise on q_rope": ("layers.0.q_rope", noise(0.02)),
    "noise on attn_heads": ("layers.1.attn_heads", noise(0.1)),
    "noise on the router": ("layers.0.router_logits", noise(0.01)),
    "noise on expert_act": ("layers.1.expert_act", noise(0.1)),
    "noise on the logits": ("logits", noise(0.1)),
    "a head scaled": ("layers.0.attn_heads", on((ALL, 1), lambda x: 1.3 * x)),
    "a head negated": ("layers.0.attn_heads", on((ALL, 2), np.negative)),
    "two heads exchanged": ("layers.1.attn_heads", lambda x: x[:, [1, 0, 2, 3]]),
    "rows permuted": ("layers.0.attn_out", lambda x: x[[1, 0, *range(2, 38), 39, 38]]),
    "one pair turned backwards": ("layers.0.q_rope", on((ALL, ALL, 20), np.negative)),
    "one row of k lost": ("layers.0.k", on((17,), np.zeros_like)),
    "a constant added to the norm": ("layers.0.attn_norm", lambda x: x + 0.05),
    "embedding scaled by 1.1": ("embed", lambda x: 1.1 * x),
    "expert_out of one slot halved": ("layers.0.expert_out", on((ALL, 0), lambda x: x / 2)),
    "channels of expert_up reversed": ("layers.1.expert_up", lambda x: x[..., ::-1]),
    "mlp_out three times as large": ("layers.0.mlp_out", lambda x: 3 * x),
    "logits capped": ("logits", lambda x: 3 * np.tanh(x / 3)),
    "final norm of the last half lost": ("final_norm", on((ALL, slice(32, 64)), np.zeros_like)),
}


@pytest.mark.parametrize("profile", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", UNKNOWN)
def test_a_fault_outside_the_catalogue_has_no_cause(what: str, profile: str) -> None:
    tap, fault = UNKNOWN[what]
    report = report_of(taps_with({tap: fault}, dtype=np.float32), profile)
    assert (report.first_divergence.tap, report.cause) == (tap, None)
    assert report.structure is not None


def test_a_search_that_ends_early_says_what_it_left(monkeypatch):
    """Otherwise "none fits" would be said of mistakes that nobody tried."""
    tap, fault = UNKNOWN["a channel of q zeroed"]
    taps = taps_with({tap: fault}, dtype=np.float32)
    assert report_of(taps, "float32").untried == 0
    left = []
    for work in (-1, 0):
        monkeypatch.setattr("assay.golden.diagnose.WORK", work)
        report = report_of(taps, "float32")
        left.append(report.untried)
        assert report.cause is None
        assert f"ended before {report.untried} others" in none_fits(report)
    assert left[1] == left[0] - 1 > 0  # counted by the work of each mistake, not by the clock


def taps_of(*ids: str, name: str = GPT_OSS, chunks: tuple[int, ...] = CHUNKS) -> tuple:
    """Checkpoint, golden, and what the Numba path supplies with one mistake, or two of separate functions, in it."""
    checkpoint, golden = opened(name), golden_of(name, chunks)
    first, *rest = (INJECTIONS[id] for id in ids)
    for other in rest:
        first = replace(
            first, functions={**first.functions, **other.functions}, weights={**first.weights, **other.weights}
        )
    with first.backend(checkpoint) as backend:
        taps = backend.run(golden.provenance.tokens, list(chunks), default_taps(checkpoint.config))
    return golden, checkpoint, taps, "cpu", PROFILES["float32"]


@pytest.mark.parametrize(
    ("more_than_noise", "other_layer_wrong", "cause"),
    [(True, False, "sinks-missing"), (False, True, "sinks-missing"), (True, True, None)],
)
def test_a_mistake_that_resembles_the_fault_in_one_layer_alone_is_no_cause(more_than_noise, other_layer_wrong, cause):
    """As the next head's sink does one of key heads, which leaves 1.8 x the noise of bfloat16 in one layer of two."""
    checkpoint, honest = opened(GPT_OSS), taps_with({}, dtype=np.float32)
    run = Run(checkpoint, tokens_of("gpt_oss"), [40], honest)
    heads = Replay(run, CATALOGUE["sinks-missing"].variant, PROFILES["float64"]).value("layers.0.attn_heads")
    noise = next(r.noise for r in report_of(honest, "float32").taps if r.tap == "layers.0.attn_heads")
    if more_than_noise:
        scale = 3 * noise * np.sqrt(np.mean(heads**2))
        heads = heads + scale * np.random.default_rng(1).standard_normal(heads.shape)
    faults = {"layers.0.attn_heads": lambda array: heads.astype(np.float32)}
    if other_layer_wrong:
        faults["layers.1.attn_heads"] = scaled(1.01)
    found = report_of(taps_with(faults, dtype=np.float32), "float32")
    assert found.first_divergence.tap == "layers.0.attn_heads"
    assert (found.cause and found.cause["id"]) == cause


def test_a_cause_says_what_it_explains() -> None:
    cause = check(*taps_of("yarn-ramp-rounded")).cause
    assert (cause["id"], cause["title"]) == ("yarn-ramp-rounded", "YaRN ramp rounded")
    assert cause["residual_before"] > 0.01
    assert cause["residual_after"] < 1e-6
    assert cause["ratio_after"] < ALLOWANCE < cause["ratio_before"]
    assert cause["explained"] == {"taps": 6, "of": 6}
    assert cause["ambiguous_with"] == []
    assert cause["runner_up"]["residual_after"] > 0.001
    assert "vLLM #27722, #28244" in cause["sources"]
    assert "truncate" in cause["advice"]


def test_two_mistakes_in_one_step_are_found_as_a_pair() -> None:
    cause = check(*taps_of("sinks-twice", "heads-share-by-turns")).cause
    assert set(cause["id"].split(" + ")) == {"sinks-twice", "heads-share-by-turns"}
    assert cause["ratio_after"] < ALLOWANCE


def test_a_mistake_in_one_layer_is_named_with_how_little_it_explains() -> None:
    golden, checkpoint, taps, *rest = taps_of("sinks-missing")
    honest = open_backend("cpu", checkpoint).run(
        golden.provenance.tokens, list(CHUNKS), default_taps(checkpoint.config)
    )
    mixed = {name: (taps if name.startswith("layers.0.attn_heads") else honest)[name] for name in honest}
    mixed["layers.0.attn_out"] = taps["layers.0.attn_out"]
    cause = check(golden, checkpoint, mixed, *rest).cause
    assert (cause["id"], cause["explained"]) == ("sinks-missing", {"taps": 1, "of": 3})


def test_the_cause_is_found_from_the_logits_alone() -> None:
    golden, checkpoint, taps, *rest = taps_of("plus-one-missing")
    report = check(golden, checkpoint, {"logits": taps["logits"]}, *rest)
    assert (report.first_divergence.tap, report.cause["id"]) == ("logits", "plus-one-missing")


def test_a_known_deviation_is_listed_and_fails_only_when_strict() -> None:
    golden, checkpoint, taps, name, profile = taps_of("yarn-ramp-rounded")
    by_design = replace(profile, deviations=("yarn-ramp-rounded",))
    report = check(golden, checkpoint, taps, name, by_design)
    assert (report.verdict, report.first_divergence, report.cause) == ("known-deviation", None, None)
    (deviation,) = report.deviations
    assert (deviation["id"], deviation["first"], deviation["taps"]) == ("yarn-ramp-rounded", "layers.0.q_rope", 6)
    assert deviation["kl_nats"] > 0.001
    strict = check(golden, checkpoint, taps, name, by_design, strict=True)
    assert (strict.verdict, strict.cause["id"], strict.deviations) == ("diverges", "yarn-ramp-rounded", [])


def test_a_deviation_does_not_hide_another_mistake() -> None:
    golden, checkpoint, taps, name, profile = taps_of("sinks-missing")
    by_design = replace(profile, deviations=("yarn-ramp-rounded",))
    report = check(golden, checkpoint, taps, name, by_design)
    assert (report.verdict, report.cause["id"], report.deviations) == ("diverges", "sinks-missing", [])


def test_the_search_is_followed():
    """Every mistake that acts there is counted, then the pairs, and none beyond the number told."""
    heard: list[tuple[int, int]] = []
    taps = taps_with(dict([UNKNOWN["a channel of q zeroed"]]))
    checkpoint = opened("gpt_oss/hf")
    report = check(golden_of(), checkpoint, taps, "x", PROFILES["float32"], search=lambda *told: heard.append(told))
    assert report.cause is None
    assert [tried for tried, _ in heard] == list(range(len(heard)))
    singles, pairs = heard[0][1], heard[-1][1]
    assert 0 < singles < pairs == len(heard)
    assert {of for _, of in heard} == {singles, pairs}


def test_no_search_where_nothing_is_wrong():
    check(golden_of(), opened("gpt_oss/hf"), taps_with({}), "x", PROFILES["float32"], search=pytest.fail)
