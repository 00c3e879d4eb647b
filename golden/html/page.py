"""Render a report, with the details gathered beside it, to one HTML file."""

import base64
import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from assay.golden.check import Report
from assay.golden.detail import BINS, BINS_PER_DECADE, CELLS_PER_DECADE, LEVELS, LOST, LOWEST_BIN, LOWEST_CELL, SPECS
from assay.golden.html import plot
from assay.golden.mistakes import CATALOGUE
from assay.golden.report import (
    by_layers,
    ignored_sentence,
    none_fits,
    reach_sentences,
    shortened,
    spanned_sentence,
    structure_lines,
)
from assay.golden.store import Golden, replacing
from assay.loaders.checkpoint import Checkpoint
from assay.reference.taps import kind_of

HERE = Path(__file__).parent
VERDICTS = {
    "match": "Matches",
    "known-deviation": "Matches, but for known deviations",
    "diverges": "Diverges",
    "incomparable": "Cannot be compared",
}
# keys of a tap's row that the page shows; the maps and distributions come from the details
SHOWN = ("tap", "verdict", "local_error", "inherited_error", "noise", "ratio", "nonfinite", "positions", "spans")


def write_page(path: Path, report: Report, details: Mapping[str, dict[str, Any]], about: Mapping[str, str]) -> None:
    """Write the page, whole or not at all; `about` is what else was compared with what: label to text.

    `details` are `assay.golden.detail.Details.taps` of the same check. Raises GoldenError if it cannot be written.
    """
    text = page_of(report, details, about)
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8", errors="replace")


def page_of(report: Report, details: Mapping[str, dict[str, Any]], about: Mapping[str, str]) -> str:
    """The page's HTML. Everything that comes from a file or a backend is escaped, and no script but our own may run."""
    from jinja2 import Environment, StrictUndefined  # here: nothing else of a check needs it

    found = report.as_json()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(times=plot.times, short=_short)
    script = (HERE / "page.js").read_text("utf-8")
    layers, rows = plot.grid_of(found)
    wrong = report.first_divergence
    opened = wrong.tap if wrong is not None else _worst(found["taps"])
    return environment.from_string((HERE / "page.html").read_text("utf-8")).render(
        report=found,
        headline=VERDICTS[report.verdict],
        about=about,
        meaning={kind: spec.meaning for kind, spec in SPECS.items()},
        none_fits=none_fits(report),
        structure=[] if report.structure is None else list(structure_lines(report.structure, report.cause is not None)),
        not_supplied=shortened(report.not_supplied),
        not_checked=by_layers(report.not_checked),
        spanned=spanned_sentence(wrong.tap, wrong.spans) if wrong is not None and wrong.spans else None,
        ignored=ignored_sentence(report.ignored) if report.ignored else None,
        reach=[] if report.reach is None else list(reach_sentences(report.reach, most=len(CATALOGUE))),
        coarsest=max(found["taps"], key=lambda row: len(row["spans"]), default=None),
        out_of_allowance=sum(result.verdict == "diverges" for result in report.taps),
        known=sum(result.verdict == "known-deviation" for result in report.taps),
        plot=plot.plot_of(found),
        layers=layers,
        rows=rows,
        width=plot.WIDTH,
        height=plot.HEIGHT,
        left=plot.LEFT,
        right=plot.WIDTH - plot.RIGHT,
        top=plot.TOP,
        bottom=plot.HEIGHT - plot.BOTTOM,
        opened=opened,
        style=(HERE / "page.css").read_text("utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_data(found, details, opened),
    )


def _data(found: dict[str, Any], details: Mapping[str, dict[str, Any]], opened: str | None) -> dict[str, Any]:
    """What the page's script draws from."""
    return {
        "opened": opened,
        "allowance": found["allowance"],
        "forced": found["scope"] == "forced",
        "profile": found["profile"],
        "histogram": {"lowest": LOWEST_BIN, "bins": BINS, "perDecade": BINS_PER_DECADE},
        "map": {"lowest": LOWEST_CELL, "perDecade": CELLS_PER_DECADE, "levels": LEVELS, "lost": LOST},
        "about": {
            kind: {"axes": list(spec.axes), "meaning": spec.meaning}
            for kind, spec in SPECS.items()
            if any(kind_of(row["tap"]) == kind for row in found["taps"])
        },
        "taps": {
            row["tap"]: {key: _rounded(row[key]) for key in SHOWN} | {"detail": _compact(details.get(row["tap"]))}
            for row in found["taps"]
        },
    }


def _compact(detail: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if detail is None else detail | {"scale": _rounded(detail["scale"])}


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _worst(rows: list[dict[str, Any]]) -> str | None:
    """The tap to look at where none diverges: the one with the largest ratio."""
    return max(rows, key=lambda row: row["ratio"] or 0.0)["tap"] if rows else None


def _short(value: float | None) -> str:
    return "not known" if value is None else "0" if value == 0 else f"{value:.2g}"


def about_of(golden: Golden, checkpoint: Checkpoint | None) -> dict[str, str]:
    """What a page says of the golden and the checkpoint that a backend was checked against."""
    recorded = golden.provenance
    fed = "at once" if len(recorded.chunks) == 1 else f"in {len(recorded.chunks)} chunks"
    return {
        "golden": f"{golden.path or 'in memory'}: {len(recorded.taps)} tensors, recorded by {recorded.backend}",
        "checkpoint": str(checkpoint.path) if checkpoint is not None else f"{recorded.checkpoint} (not at hand)",
        "tokens": f"{len(recorded.tokens)}, {fed}",
        "assay": version("assay"),
    }
