"""Taps that are not whole: rows that were not computed, mask values, experts in another order, a few taps only."""

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.diagnose import Diagnosis
from assay.golden.measure import ALLOWANCE
from assay.golden.spans import INPUTS, spanned
from assay.reference.taps import tap_table
from tests.checkpoint_files import opened, tokens_of
from tests.golden.faults import GPT_OSS, diverging, golden_of, report_of, scaled, taps_with

LAST_LAYER = "layers.2."
WHOLE = ("attn_norm", "k", "v", "k_rope")


def cut(taps, positions):
    """As an engine leaves them that wants the logits of these positions only."""
    computed = ("final_norm", "logits")
    return {
        name: array[positions]
        if name in computed or (name.startswith(LAST_LAYER) and name.rsplit(".", 1)[-1] not in WHOLE)
        else array
        for name, array in taps.items()
    }


@pytest.mark.parametrize(
    ("chunks", "positions"), [((40,), [39]), ((40,), [37, 38, 39]), ((30, 9, 1), [29, 38, 39]), ((20, 20), [39])]
)
def test_rows_that_were_not_computed_are_not_judged(chunks, positions):
    golden, taps = golden_of(chunks=chunks), taps_with({}, chunks=chunks)
    report = report_of(cut(taps, positions), "float32", golden)
    assert (report.verdict, report.not_supplied) == ("match", [])
    judged = {result.tap: result.positions for result in report.taps}
    assert judged["logits"] == judged[f"{LAST_LAYER}q"] == judged[f"{LAST_LAYER}expert_ids"] == positions
    assert judged[f"{LAST_LAYER}k"] is judged["layers.1.q"] is None
    assert report.logits["top1_agreement"] == 1


@pytest.mark.parametrize("name", [f"{LAST_LAYER}q_rope", f"{LAST_LAYER}expert_act", f"{LAST_LAYER}block_out", "logits"])
def test_a_fault_in_the_rows_that_are_there_is_found_at_its_place(name):
    taps = cut(taps_with({name: scaled(1.01)}), [38, 39])
    report = report_of(taps, "float32")
    assert diverging(report) == [name]
    assert report.first_divergence.worst_position in (38, 39)
    assert report.first_divergence.worst["index"][0] in (38, 39)


def test_the_cause_is_found_from_one_row():
    name, taps = f"{LAST_LAYER}expert_act", taps_with({})
    gate, up = (
        np.clip(taps[f"{LAST_LAYER}{kind}"], low, 7) for kind, low in (("expert_gate", None), ("expert_up", -7))
    )
    plain = gate / (1 + np.exp(-gate)) * (up + 1)
    report = report_of(cut(taps_with({name: lambda act: plain}), [39]), "float32")
    assert diverging(report) == [name]
    assert report.cause["id"] == "silu-plain"
    assert report.cause["residual_after"] < 1e-6


def test_a_row_of_nan_is_not_a_row_that_is_missing():
    taps = taps_with({})
    taps["logits"] = taps["logits"].copy()
    taps["logits"][7] = np.nan
    report = report_of(taps)
    assert diverging(report) == ["logits"]
    assert report.first_divergence.nonfinite == 320


# --- masks ---


@pytest.mark.parametrize("value", [-np.inf, float(np.finfo(np.float32).min), -1e6])
def test_what_a_mask_leaves_in_the_scores_is_free(value):
    checkpoint, chunks = opened(GPT_OSS), (30, 10)
    taps = dict(
        open_backend("reference", checkpoint).run(tokens_of("gpt_oss"), [*chunks], tap_table(checkpoint.config))
    )
    name = "layers.0.attn_scores"
    hidden = taps["layers.0.attn_weights"] == 0
    assert hidden.any()
    taps[name] = np.where(hidden, value, taps[name])
    assert report_of(taps, golden=golden_of(chunks=chunks)).verdict == "match"
    taps[name][1, 20, 20] = value  # its own key, which no mask hides
    assert name in diverging(report_of(taps, golden=golden_of(chunks=chunks)))


# --- experts in another order ---


@pytest.mark.parametrize("order", [[1, 0]])
def test_experts_in_another_order_are_the_same_experts(order):
    """Every tap with an axis of experts follows the backend's own list: engines may select without sorting."""
    taps = {name: array[:, order] if "expert_" in name else array for name, array in taps_with({}).items()}
    report = report_of(taps)
    assert report.verdict == "match"
    assert {r.inherited_error for r in report.taps if r.tap.endswith(("expert_gate", "expert_out"))} == {0}
    taps["layers.1.expert_gate"] = taps["layers.1.expert_gate"][:, ::-1]  # rows no longer at their experts
    assert diverging(report_of(taps))[0] == "layers.1.expert_gate"


def test_without_the_checkpoint_too():
    from assay.golden.check import check
    from assay.golden.noise import PROFILES

    taps = {name: array[:, ::-1] if "expert_" in name else array for name, array in taps_with({}).items()}
    assert check(golden_of(), None, taps, "other order", PROFILES["float32"]).verdict == "match"
    del taps["layers.1.expert_ids"]
    assert check(golden_of(), None, taps, "other order", PROFILES["float32"]).verdict == "diverges"


# --- a few taps only ---


@pytest.mark.parametrize("kept", ["logits", "block_out"])
@pytest.mark.parametrize("profile", ["float32", "bfloat16"])
def test_a_few_taps_are_enough_and_the_report_says_how_coarse_they_are(kept, profile, monkeypatch):
    few = lambda taps: {name: array for name, array in taps.items() if name.rsplit(".", 1)[-1] == kept}  # noqa: E731
    clean = report_of(few(taps_with({}, dtype=np.float32)), profile)
    assert clean.verdict == "match"
    coarse = {r.tap: r for r in clean.taps}
    fine = {r.tap: r for r in report_of(taps_with({}, dtype=np.float32), profile).taps}
    for name, result in coarse.items():
        steps = len(result.spans)
        assert steps == (len(fine) - 1 if kept == "logits" else 19 if name == "layers.0.block_out" else 18)
        assert result.noise > fine[name].noise
        assert result.detectable == ALLOWANCE * result.noise
    monkeypatch.setattr(Diagnosis, "cause", lambda *arguments: None)  # what is spanned takes it long
    fault = {"layers.1.attn_out": np.negative}
    report = report_of(few(taps_with(fault, dtype=np.float32)), profile)
    assert diverging(report) == ["logits" if kept == "logits" else "layers.1.block_out"]


def test_inputs_of_every_step():
    """Each tap's value is a function of these alone: with them supplied nothing is spanned but heavy taps."""
    for model in (GPT_OSS, "llama/hf"):
        config = opened(model).config
        table = tap_table(config)
        names = [name for name, spec in table.items() if not spec.heavy]
        for name in names:
            kind = name.rsplit(".", 1)[-1]
            assert kind == "embed" or kind in INPUTS
            assert spanned(name, config, names) == []
            assert spanned(name, config, ()) == [
                n for n in names[: names.index(name)] if n in spanned(name, config, ())
            ]
        assert set(spanned("logits", config, ())) == set(names) - {"logits"}
