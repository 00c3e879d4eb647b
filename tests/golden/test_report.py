"""The report in the terminal: 80 columns hold it, a pipe gets plain text, and names are never markup."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from assay.golden.check import check
from assay.golden.noise import PROFILES
from assay.golden.report import print_report
from assay.golden.store import Golden
from tests.golden.faults import golden_of, jolted, report_of, taps_with
from tests.golden.test_diagnose import taps_of


def printed(report, width=80, **options) -> str:
    text = io.StringIO()
    print_report(report, Console(file=text, width=width, **options))
    return text.getvalue()


@pytest.fixture(scope="module")
def reports():
    """A named cause, an unknown one, and no fault."""
    golden, checkpoint, taps, *rest = taps_of("yarn-ramp-rounded")
    return {
        "named": check(golden, checkpoint, taps, *rest),
        "unknown": report_of(taps_with({"layers.1.attn_heads": jolted}), "float32"),
        "clean": report_of(taps_with({}), "float32"),
    }


@pytest.mark.parametrize("which", ["named", "unknown", "clean"])
def test_80_columns_hold_it(reports, which):
    lines = printed(reports[which]).splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]  # nothing is cut


def test_a_pipe_gets_plain_text(reports):
    assert "\x1b" not in printed(reports["named"])
    assert "\x1b[" in printed(reports["named"], force_terminal=True)


def test_what_is_wrapped_stays_indented(reports):
    lines = printed(reports["named"], width=60).splitlines()
    start = next(i for i, line in enumerate(lines) if "what to do" in line)
    assert [line[:2] for line in lines[start : start + 2]] == ["  ", "  "]


def test_it_says_what_to_do(reports):
    text = " ".join(printed(reports["named"]).split())
    cause = reports["named"].cause
    assert f"first divergence: {reports['named'].first_divergence.tap}" in text
    assert f"cause: {cause['title']} ({cause['id']})" in text
    assert cause["advice"] in text
    assert "cause unknown" in printed(reports["unknown"])
    assert "first divergence" not in printed(reports["clean"])


def test_names_are_not_markup():
    recorded = golden_of()
    name = "[bold red]boo[/bold red][/]"
    taps = {name: np.ones((2, 2)), "embed": np.ones((2, 2))}
    golden = Golden(replace(recorded.provenance, taps=[name, "embed", "[/]"]), {**taps, "[/]": np.ones(1)})
    report = check(golden, None, {tap: array + 1 for tap, array in taps.items()}, name, PROFILES["float32"])
    text = printed(report, width=200)
    assert f"first divergence: {name}" in text
    assert f"diverges  {name}" in text
    assert "not supplied, spanned by the next tap: [/]" in text


def test_a_narrow_terminal_still_shows_the_verdict(reports):
    assert printed(reports["named"], width=30).startswith("diverges")
