"""What a report says of taps that are not whole, as text and as JSON."""

import io

import numpy as np

from assay.golden.html.page import page_of
from assay.golden.report import print_report
from tests.golden.faults import jolted, report_of, taps_with


def text_of(report) -> str:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    print_report(report, console)
    return " ".join(console.export_text().split())


def test_how_coarse_a_check_by_logits_is():
    report = report_of({"logits": taps_with({}, dtype=np.float32)["logits"]}, "float32")
    text = text_of(report)
    assert "logits stands for 60 steps: an error of less than" in text
    (tap,) = report.as_json()["taps"]
    assert tap["detectable"] == 4 * tap["noise"]
    assert f"{tap['detectable']:.2g} of it would not show" in text


def test_which_positions_were_computed():
    taps = taps_with({}, dtype=np.float32)
    taps["logits"] = taps["logits"][-1:]
    assert "not computed for all positions, only for 1: logits" in text_of(report_of(taps, "float32"))
    assert "would not show" not in text_of(report_of(taps_with({}, dtype=np.float32), "float32"))


def test_a_tensor_whose_name_is_no_tap_is_said_to_be_ignored():
    """Else a misspelt name would look like a step that was left out."""
    taps = {"logits": taps_with({}, dtype=np.float32)["logits"], "layers.0.q_rop": np.zeros(3), "blk.1.v": np.ones(2)}
    report = report_of(taps, "float32")
    assert (report.verdict, report.ignored) == ("match", ["layers.0.q_rop", "blk.1.v"])
    said = "2 tensors that are no taps of this model: layers.0.q_rop, blk.1.v. A map of names is given with --names"
    assert f"ignored: {said}" in text_of(report)
    assert said in page_of(report, {}, {})
    assert report_of({"logits": taps["logits"]}, "float32").ignored == []


def test_where_no_name_fits_it_says_which_there_are():
    report = report_of({"emb": np.zeros(3)}, "float32")
    assert report.verdict == "incomparable"
    assert "ignored: one tensor that is no tap of this model: emb." in text_of(report)


def test_a_divergence_says_which_steps_it_stands_for():
    """Else a fault in an early layer, seen in the logits, reads as one of the head."""
    taps = taps_with({"layers.0.v": jolted}, dtype=np.float32)
    blocks = {name: taps[name] for name in taps if name.endswith("block_out")}
    said = "20 steps are judged together here, from embed to layers.0.block_out: hand over taps between them to see"
    report = report_of(blocks, "float32")
    assert said in text_of(report)
    assert said in page_of(report, {}, {})
    assert "judged together" not in text_of(report_of(taps, "float32"))


def test_choices_of_experts_that_nobody_handed_over_are_not_counted():
    text = text_of(report_of({"logits": taps_with({}, dtype=np.float32)["logits"]}, "bfloat16"))
    assert "routing: no choices of experts were handed over; 15 not shown, that noise may have decided" in text
