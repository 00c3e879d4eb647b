"""What a report says of taps that are not whole, as text and as JSON."""

import io

import numpy as np

from assay.golden.html.page import page_of
from assay.golden.report import print_report
from tests.golden.faults import report_of, taps_with


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
