"""The check: one fault is found at its own tap and nowhere else, and a check that cannot see is seen through."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay.golden import check as check_module
from assay.golden.backends import open_backend
from assay.golden.check import check, incomparable_tokens, require_same_checkpoint
from assay.golden.errors import GoldenError
from assay.golden.forced import forced_pass
from assay.golden.measure import ALLOWANCE, Comparison
from assay.golden.noise import PROFILES
from assay.golden.record import record
from assay.reference.taps import default_taps, tap_table
from tests.checkpoint_files import opened, tokens_of, with_weight
from tests.golden import test_check_routing
from tests.golden.faults import GPT_OSS, diverging, golden_of, jolted, report_of, scaled, taps_with

NAMES = default_taps(opened(GPT_OSS).config)
FLOATS = [name for name in NAMES if not name.endswith("expert_ids")]


# --- the core: faults are found where they are, and only there ---


def test_the_oracle_itself_has_no_error_anywhere():
    report = report_of(taps_with({}))
    assert report.verdict == "match"
    assert [result.tap for result in report.taps] == NAMES
    for result in report.taps:
        assert (result.local_error, result.ratio) == (0, 0)
        assert result.inherited_error == (None if result.tap.endswith("expert_ids") else 0)
    assert report.logits == {"kl_nats": 0, "top1_agreement": 1, "regret_nats": 0}
    followed = {"followed": 0, "largest_followed_margin": 0, "open": 0}
    assert report.routing == {"flips": 0, "choices": 120, "largest_margin": 0, **followed}
    assert (report.structure, report.first_divergence, report.not_supplied) == (None, None, [])


# the fault's tap, and the first tap from which everything computed later is touched by it
IN_LAYER_0 = {
    "embed": "layers.0.attn_norm",
    "layers.0.attn_norm": "layers.0.q",
    "layers.0.q": "layers.0.attn_heads",
    "layers.0.k_rope": "layers.0.attn_heads",
    "layers.0.v": "layers.0.attn_heads",
    "layers.0.attn_heads": "layers.0.attn_out",
    "layers.0.attn_out": "layers.0.attn_residual",
    "layers.0.attn_residual": "layers.0.mlp_norm",
    "layers.0.expert_gate": "layers.0.expert_act",
    "layers.0.mlp_out": "layers.0.block_out",
    "layers.1.q_rope": "layers.1.attn_heads",
    "layers.2.mlp_norm": "layers.2.router_logits",
    "layers.2.block_out": "final_norm",
    "final_norm": "logits",
}


@pytest.mark.parametrize("fault", IN_LAYER_0)
def test_only_that_tap_diverges_although_all_later_ones_differ(fault):
    report = report_of(taps_with({fault: jolted}))
    results = {result.tap: result for result in report.taps}
    assert report.verdict == "diverges"
    assert diverging(report) == [fault]
    assert results[fault].local_error == pytest.approx(0.001, rel=1e-9)
    assert results[fault].inherited_error == 0
    assert [name for name in NAMES if results[name].local_error] == [fault]  # zero to the last bit elsewhere
    later = [name for name in NAMES[NAMES.index(IN_LAYER_0[fault]) :] if name in FLOATS]
    assert min(results[name].inherited_error for name in later) > 1e-8
    assert report.first_divergence is results[fault]


def test_a_small_fault_in_one_element_of_one_head_is_found_there():
    def fault(q_THC: np.ndarray) -> np.ndarray:
        q_THC = q_THC.copy()
        q_THC[23, 2, 5] += 0.01
        return q_THC

    report = report_of(taps_with({"layers.1.q": fault}), "float32")
    assert diverging(report) == ["layers.1.q"]
    first = report.first_divergence
    assert (first.worst["index"], first.worst_position) == ([23, 2, 5], 23)
    assert first.worst["got"] - first.worst["expected"] == pytest.approx(0.01, abs=1e-6)
    assert report.structure["places"]["T"] == {"affected": 1, "of": 40, "first": 23, "which": "23"}
    assert report.structure["places"]["H"] == {"affected": 1, "of": 4, "first": 2, "which": "2"}


def test_two_faults_are_two_divergences():
    report = report_of(taps_with({"layers.0.v": scaled(1.01), "layers.2.expert_up": scaled(0.99)}))
    assert diverging(report) == ["layers.0.v", "layers.2.expert_up"]


def test_a_fault_under_chunks_is_found_too():
    chunks = (7, 20, 1, 12)
    golden = golden_of(chunks=chunks)
    taps = taps_with({"layers.1.k": scaled(1.001)}, chunks=chunks)
    report = report_of(taps, golden=golden)
    assert diverging(report) == ["layers.1.k"]
    assert [result.local_error for result in report.taps if result.tap != "layers.1.k"] == [0] * (len(NAMES) - 1)


@pytest.mark.parametrize("profile", ["float32", "bfloat16", "float16"])
def test_a_fault_of_one_percent_is_found_under_the_noise_of_every_profile(profile):
    """Above the noise it is found; whatever else is rounded differently is allowed."""
    taps = taps_with({"layers.1.attn_out": scaled(1.03)}, dtype=np.float32)
    assert diverging(report_of(taps, profile)) == ["layers.1.attn_out"]


def test_heavy_taps_are_checked_when_supplied():
    from assay.golden.backends import open_backend

    checkpoint, table = opened(GPT_OSS), tap_table(opened(GPT_OSS).config)
    taps = dict(open_backend("reference", checkpoint).run(tokens_of("gpt_oss"), [30, 10], table))
    golden = golden_of(chunks=(30, 10))
    assert report_of(taps, golden=golden).verdict == "match"
    taps["layers.1.attn_weights"] = taps["layers.1.attn_weights"] * 1.001
    report = report_of(taps, golden=golden)
    # the weights were changed after the run, so that the heads no longer follow from them
    assert diverging(report) == ["layers.1.attn_weights", "layers.1.attn_heads"]


# --- noise ---


@pytest.mark.parametrize("name", [GPT_OSS, "llama/hf", "mistral/hf"])
def test_a_float32_run_is_float32_noise(name):
    """The oracle in float32 is one draw of the noise that the profile measures: ratios about 1."""
    from assay.golden.backends import open_backend

    checkpoint, golden = opened(name), golden_of(name)
    taps = open_backend("reference", checkpoint, "float32").run(
        tokens_of(name.split("/")[0]), [40], golden.provenance.taps
    )
    report = check(golden, checkpoint, taps, "float32", PROFILES["float32"])
    assert report.verdict == "match"
    for result in report.taps:
        if result.tap == "embed" or result.tap.endswith("expert_ids"):
            assert result.local_error == 0
        else:
            assert 0.2 < result.ratio < 3, result.tap


@pytest.mark.parametrize("token", [45, 124, 177])
def test_one_token_of_a_dense_model_is_float32_noise(token):
    """A norm of one position has one factor, one accident of rounding: by another one alone, 45 was 4.2 times it."""
    checkpoint = opened("llama/hf")
    for name in [name for name in checkpoint.tensors if "norm" in name]:
        checkpoint = with_weight(checkpoint, name, np.ones_like)  # as of a fresh model: gains that round nothing
    golden = record(checkpoint, open_backend("reference", checkpoint), [token], beside=Path())
    taps = open_backend("cpu", checkpoint).run([token], [1], golden.provenance.taps)
    report = check(golden, checkpoint, taps, "cpu", PROFILES["float32"])
    assert report.verdict == "match"
    assert max(tap.ratio for tap in report.taps) < ALLOWANCE / 2


def test_another_order_of_float32_sums_is_float32_noise():
    """Token by token is the same mathematics in another order of summation."""
    taps = taps_with({}, dtype=np.float32, chunks=(1,) * 40)
    assert report_of(taps, "float32").verdict == "match"


def test_another_order_of_float64_sums_is_float64_noise():
    report = report_of(taps_with({}, chunks=(1,) * 40), "float64")
    assert max(result.local_error for result in report.taps) > 0
    assert diverging(report) == []


def test_float32_is_not_float64():
    report = report_of(taps_with({}, dtype=np.float32), "float64")
    assert len(diverging(report)) > 0.8 * len(FLOATS)


def test_weights_of_zero_are_no_error():
    """Expanded models have blocks whose last projection is zero: every tap after it is exactly zero, and right."""
    name = "model.layers.1.self_attn.o_proj"
    checkpoint = opened(GPT_OSS)
    for part in ("weight", "bias"):
        checkpoint = with_weight(checkpoint, f"{name}.{part}", np.zeros_like)
    taps = taps_with({}, checkpoint)
    assert not taps["layers.1.attn_out"].any()
    golden = replace(golden_of(), provenance=replace(golden_of().provenance, weights_sha256=checkpoint.weights_sha256))
    for profile in ("float64", "float32"):
        report = report_of(taps, profile, golden, checkpoint)
        assert report.verdict == "match"
    taps["layers.1.attn_out"] = taps["layers.1.attn_out"] + 1e-30
    assert diverging(report_of(taps, "float32", golden, checkpoint)) == ["layers.1.attn_out"]


# --- values that are not finite ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["layers.0.v", "layers.1.router_logits", "layers.1.expert_out", "logits"])
def test_a_value_that_is_not_finite_is_reported_and_does_not_spread(name, value):
    taps = taps_with({})
    taps[name] = taps[name].copy()
    taps[name].flat[77] = value
    report = report_of(taps)
    assert diverging(report) == [name]
    assert report.first_divergence.nonfinite == 1
    place = list(map(int, np.unravel_index(77, taps[name].shape)))
    assert report.first_divergence.worst["index"] == place
    assert report.first_divergence.worst_position == place[0]
    assert all(result.local_error == 0 for result in report.taps if result.tap != name)
    text = json.dumps(report.as_json(), allow_nan=False)
    assert '"nonfinite": 1' in text


def test_a_tap_of_nothing_but_nan():
    taps = taps_with({})
    taps["layers.0.attn_out"] = np.full_like(taps["layers.0.attn_out"], np.nan)
    report = report_of(taps, "float32")
    assert diverging(report)[0] == "layers.0.attn_out"
    assert report.first_divergence.nonfinite == 40 * 64


# --- taps that are not there ---


def test_missing_taps_are_spanned():
    """Four taps a layer: each span is computed by the oracle from the last one that was supplied."""
    fault = {"layers.1.expert_act": scaled(1.01)}
    kept = [name for name in NAMES if name.rsplit(".", 1)[-1] in ("embed", "attn_residual", "block_out", "logits")]
    clean = {name: array for name, array in taps_with({}).items() if name in kept}
    faulty = {name: array for name, array in taps_with(fault).items() if name in kept}
    report = report_of(clean)
    assert report.verdict == "match"
    assert [result.tap for result in report.taps] == kept
    assert set(report.not_supplied) == set(NAMES) - set(kept)
    spans = {result.tap: result.spans for result in report.taps}
    in_layer = [f"layers.1.{kind}" for kind in ("mlp_norm", "router_logits", "expert_ids", "expert_weights")]
    in_layer += [f"layers.1.{kind}" for kind in ("expert_gate", "expert_up", "expert_act", "expert_out", "mlp_out")]
    assert (spans["embed"], spans["layers.1.block_out"], spans["logits"]) == ([], in_layer, ["final_norm"])
    assert diverging(report_of(faulty)) == ["layers.1.block_out"]  # where the span with the fault ends


def test_a_cache_that_was_not_supplied_is_spanned():
    """k and v of earlier chunks are the oracle's where the backend has none."""
    golden = golden_of(chunks=(30, 10))
    taps = taps_with({}, chunks=(30, 10))
    without = {name: array for name, array in taps.items() if not name.endswith((".k", ".v", ".k_rope"))}
    assert report_of(without, golden=golden).verdict == "match"


def test_no_tap_at_all_is_incomparable():
    report = report_of({"something": np.ones(3)})
    assert report.verdict == "incomparable"
    assert "none of the taps" in report.reason


# --- what cannot be compared ---


def test_golden_of_other_weights_is_refused_with_both_digests():
    checkpoint = with_weight(opened(GPT_OSS), "model.norm.weight", lambda w: w * 2)
    with pytest.raises(GoldenError) as error:
        report_of(taps_with({}), checkpoint=checkpoint)
    for part in (golden_of().provenance.weights_sha256, checkpoint.weights_sha256, "weights differ", "--model"):
        assert part in str(error.value)


def test_golden_of_another_config_is_refused_with_both_digests():
    checkpoint = opened(GPT_OSS)
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, sliding_window=13))
    with pytest.raises(GoldenError) as error:
        require_same_checkpoint(golden_of(), checkpoint)
    for part in (golden_of().provenance.config_sha256, checkpoint.config_sha256, "config differ"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("other", "part"),
    [([305, 284, 1], "3 in the dump, first difference at position 2"), ([305], "position 1"), ([9], "position 0")],
)
def test_other_tokens_are_incomparable(other, part):
    report = incomparable_tokens(golden_of(), other, "x", PROFILES["float32"])
    assert report.verdict == "incomparable"
    assert part in report.reason
    assert incomparable_tokens(golden_of(), tokens_of("gpt_oss"), "x", PROFILES["float32"]) is None


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: [1, *t], "the dump has [1] in front of what the golden has"),
        (lambda t: [t[0], *t], "(the same twice: a begin-of-sequence token added again)"),
        (lambda t: t[1:], "in front of what the dump has"),
        (lambda t: [*t, 3], "the dump goes on where the golden ends"),
    ],
)
def test_tokens_that_were_only_moved_are_said_to_be(change, part):
    report = incomparable_tokens(golden_of(), change(tokens_of("gpt_oss")), "x", PROFILES["float32"])
    assert part in report.reason


WRONG_ARRAYS = {
    "too short": ("layers.0.q", lambda a: a[:39], "expected: [40, 4, 32]"),
    "last position only, in a layer that later ones need": (
        "layers.1.attn_out",
        lambda a: a[-1:],
        "expected: [40, 64]",
    ),
    "last position's keys only": ("layers.2.k_rope", lambda a: a[-1:], "expected: [40, 2, 32]"),
    "half a position": ("logits", lambda a: a[-1:, :160], "expected: [40, 320]"),
    "joined wrongly": ("layers.0.q", lambda a: a[:, :3], "expected: [40, 4, 32]"),
    "transposed": ("layers.0.attn_out", lambda a: a.T, "expected: [40, 64]"),
    "one number": ("embed", lambda a: np.array(1.0), "expected: [40, 64]"),
    "texts": ("embed", lambda a: np.full(a.shape, "x"), "numbers"),
    "complex": ("embed", lambda a: a * 1j, "numbers"),
    "ids that are none": ("layers.0.expert_ids", lambda a: a + 0.5, "integers 0 to 3"),
    "ids too high": ("layers.0.expert_ids", lambda a: a + 4, "integers 0 to 3"),
    "ids below zero": ("layers.0.expert_ids", lambda a: a - 4, "integers 0 to 3"),
    "ids NaN": ("layers.0.expert_ids", lambda a: a * np.nan, "integers 0 to 3"),
}


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_an_array_that_cannot_be_its_tap_is_refused(case):
    name, change, part = WRONG_ARRAYS[case]
    taps = taps_with({})
    taps[name] = change(taps[name])
    with pytest.raises(GoldenError) as error:
        report_of(taps)
    assert repr(name) in str(error.value)
    assert part in str(error.value)


def test_other_forms_of_the_same_array_are_taken():
    """A batch axis of one, heads joined, expert ids as floats, smaller dtypes."""
    taps = taps_with({}, dtype=np.float32)
    taps["embed"] = taps["embed"][None]
    taps["layers.0.q"] = taps["layers.0.q"].reshape(1, 40, 128)
    taps["layers.0.expert_ids"] = taps["layers.0.expert_ids"].astype(np.float32)
    taps["layers.1.expert_ids"] = taps["layers.1.expert_ids"].astype(np.int32)
    assert report_of(taps, "float32").verdict == "match"


# --- the report ---


def test_json_has_the_keys_of_the_contract():
    report = report_of(taps_with({"layers.0.attn_out": scaled(1.5)})).as_json()
    assert {"verdict", "first_divergence", "cause", "deviations", "logits", "routing", "taps", "not_supplied"} <= set(
        report
    )
    assert {"tap", "local_error", "noise", "ratio"} <= set(report["first_divergence"])
    keys = {"tap", "local_error", "inherited_error", "noise", "ratio", "verdict", "worst"}
    assert all(keys <= set(tap) for tap in report["taps"])
    assert set(report["logits"]) == {"kl_nats", "top1_agreement", "regret_nats"}
    assert {"flips", "largest_margin"} <= set(report["routing"])
    assert report["cause"] is None
    assert report["structure"]["patterns"][0]["parameters"]["factor"] == pytest.approx(1.5)
    assert report["allowance"] == ALLOWANCE
    assert json.loads(json.dumps(report, allow_nan=False)) == report


# --- the check can fail: break the comparison, and the tests above see it ---


def core_tests() -> None:
    """What the checks above stand on."""
    test_only_that_tap_diverges_although_all_later_ones_differ("layers.0.attn_out")
    test_check_routing.test_an_illegal_choice_is_caught_at_the_choice(with_logits=True)
    test_a_value_that_is_not_finite_is_reported_and_does_not_spread("layers.0.v", np.nan)


def test_core_tests_pass_as_they_are():
    core_tests()


def blind(*args) -> Comparison:
    return Comparison(0.0, 1.0, 0.0, {"index": [0]}, 0, 0)


def golden_instead_of_forced(checkpoint, tokens, chunks, backend, names, profile=PROFILES["float64"], progress=None):
    """The classic comparison: every tap against the golden's."""
    return forced_pass(checkpoint, tokens, chunks, {}, names, profile, progress)


def agreeing(checkpoint, tokens, chunks, backend, names, profile=PROFILES["float64"], progress=None):
    """An oracle that always expects what it gets."""
    return {**forced_pass(checkpoint, tokens, chunks, backend, names, profile, progress), **backend}


def infinite_noise(checkpoint, tokens, chunks, backend, expected, profile, progress=None):
    return {name: 2 * array + 1 for name, array in expected.items()}


@pytest.mark.parametrize(
    ("where", "broken"),
    [("compare", blind), ("compare_ids", blind), ("forced_pass", golden_instead_of_forced), ("forced_pass", agreeing)],
)
def test_a_broken_check_is_caught(monkeypatch, where, broken):
    monkeypatch.setattr(check_module, where, broken)
    with pytest.raises(AssertionError):
        core_tests()


def test_noise_without_bounds_is_caught(monkeypatch):
    monkeypatch.setattr(check_module, "noisy_pass", infinite_noise)
    with pytest.raises(AssertionError):
        test_a_fault_of_one_percent_is_found_under_the_noise_of_every_profile("float32")


def test_a_dead_fault_would_be_noticed():
    """The faults above change the logits: a fault that does nothing would make the tests above say nothing."""
    clean = taps_with({})["logits"]
    for name in IN_LAYER_0:
        if name != "logits":
            assert np.abs(taps_with({name: jolted})["logits"] - clean).max() > 1e-6, name


@pytest.mark.parametrize("checkpoint", [True, False])
def test_an_observer_sees_the_tensors_compared(checkpoint):
    taps, seen = taps_with({"layers.1.attn_heads": jolted}), {}
    report = check(
        golden_of(),
        opened(GPT_OSS) if checkpoint else None,
        taps,
        "faulty",
        PROFILES["float32"],
        observe=lambda name, expected, got, noisy: seen.setdefault(name, (expected, got, noisy)),
    )
    assert list(seen) == [result.tap for result in report.taps]
    expected, got, noisy = seen["layers.1.attn_heads"]
    np.testing.assert_array_equal(got, taps["layers.1.attn_heads"])
    np.testing.assert_allclose(jolted(expected), got, 1e-12 if checkpoint else 0)
    assert (noisy is not None) is checkpoint
