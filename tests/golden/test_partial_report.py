"""What a report says of taps that are not whole, as text and as JSON."""

import io

import numpy as np

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
