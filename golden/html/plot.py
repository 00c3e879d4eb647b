"""The two pictures that a page opens with: errors along the depth of the model, and the grid of taps by layers."""

import math
import re
from dataclasses import dataclass
from typing import Any

from assay.golden.operands import layer_of
from assay.reference.taps import kind_of

WIDTH, HEIGHT = 1120, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 96, 26, 34
TIMES = "\N{MULTIPLICATION SIGN}"
LOWEST = 1e-2  # times the noise: what is less is drawn there


@dataclass(frozen=True)
class Point:
    """One tap of the plot."""

    tap: str
    x: float
    y: float
    state: str
    label: str


@dataclass(frozen=True)
class Line:
    """A horizontal line with its label."""

    y: float
    label: str


@dataclass(frozen=True)
class Band:
    """The width of one layer."""

    x: float
    width: float
    label: str


@dataclass(frozen=True)
class Plot:
    """Coordinates of the plot along the depth, in the units of its view box."""

    points: list[Point]
    bands: list[Band]
    decades: list[Line]
    noise: Line | None
    allowance: Line
    first: Point | None
    anchor: str  # of the first divergence's label: on the side where there is room


@dataclass(frozen=True)
class Cell:
    """One tap of the grid."""

    tap: str
    text: str
    shade: str
    label: str


def times(ratio: float | None, nonfinite: int = 0) -> str:
    """A multiple of the noise in words: 0.4, 12, 3.1 thousand, 2.4 million, 5e+12."""
    if nonfinite:
        return "not finite"
    if ratio is None:
        return "unknown"
    if not math.isfinite(ratio):
        return "infinitely many"
    for size, word in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if size <= ratio < 1000 * size:
            return f"{ratio / size:.3g}{word}"
    return f"{ratio:.2g}" if ratio < 10 else f"{ratio:.3g}"


def state_of(result: dict[str, Any]) -> str:
    """How a tap is drawn: ok, known or diverges."""
    return {"match": "ok", "known-deviation": "known"}.get(result["verdict"], "diverges")


def plot_of(report: dict[str, Any]) -> Plot:
    """The plot of a report in its JSON form."""
    results = report["taps"]
    allowance = report["allowance"]
    values = [_drawn(result) for result in results]
    highest = math.ceil(math.log10(max([10 * allowance, *filter(math.isfinite, values)])) + 0.2)
    lowest = math.log10(LOWEST)
    inner = HEIGHT - TOP - BOTTOM
    step = (WIDTH - LEFT - RIGHT) / max(len(results), 1)

    def y(value: float) -> float:
        height = highest if math.isinf(value) else max(math.log10(value), lowest)
        return round(TOP + inner * (highest - height) / (highest - lowest), 1)

    points = [
        Point(
            result["tap"],
            round(LEFT + (i + 0.5) * step, 1),
            y(value),
            state_of(result),
            f"{result['tap']}: {times(result['ratio'], result['nonfinite'])} {TIMES} the noise",
        )
        for i, (result, value) in enumerate(zip(results, values, strict=True))
    ]
    first = next((point for point in points if point.state == "diverges"), None)
    every = max(1, round((highest - lowest) / 7))
    return Plot(
        points=points,
        bands=_bands([result["tap"] for result in results], step),
        decades=[Line(y(10.0**d), _power(d)) for d in range(round(lowest), highest + 1, every)],
        noise=Line(y(1.0), "noise floor") if report["scope"] == "forced" else None,
        allowance=Line(y(allowance), f"allowed: {allowance:g} {TIMES}"),
        first=first,
        anchor="end" if first is not None and first.x > WIDTH * 0.6 else "start",
    )


def _drawn(result: dict[str, Any]) -> float:
    ratio = result["ratio"]
    if result["nonfinite"] or (ratio is None and result["verdict"] == "diverges"):
        return math.inf  # at the upper edge, above all that is finite
    return max(ratio or 0.0, LOWEST)


def _power(decade: int) -> str:
    return f"{10.0**decade:g}" if -3 < decade < 4 else f"10{str(decade).translate(SUPERSCRIPTS)}"


_WEIGHT = re.compile(r"weights\.model\.layers\.(\d{1,6})\.(.+)")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _bands(taps: list[str], step: float) -> list[Band]:
    layers: dict[int, list[int]] = {}
    for i, tap in enumerate(taps):
        if (layer := layer_of(tap)) is not None:
            layers.setdefault(layer, []).append(i)
    return [
        Band(round(LEFT + ids[0] * step, 1), round((ids[-1] - ids[0] + 1) * step, 1), str(layer))
        for layer, ids in layers.items()
    ]


def grid_of(report: dict[str, Any]) -> tuple[list[int], list[tuple[str, list[Cell | None]]]]:
    """Layers as columns; kinds of tap as rows, each with a cell for a layer or None.

    What there is once a model lies in the first column if it is before the layers, in the last if after.
    """
    results = report["taps"]
    layers = sorted({layer for result in results if (layer := _place(result["tap"])[0]) is not None})
    columns = {layer: i for i, layer in enumerate(layers)}
    width = max(len(layers), 1)
    rows: dict[str, list[Cell | None]] = {}
    for result in results:
        layer, kind = _place(result["tap"])
        column = columns[layer] if layer is not None else 0 if kind == "embed" else width - 1
        rows.setdefault(kind, [None] * width)[column] = _cell(result, report["allowance"])
    return layers, list(rows.items())


def _place(tap: str) -> tuple[int | None, str]:
    """The layer and the row of a tap, or of a weight that the backend handed over."""
    weight = _WEIGHT.fullmatch(tap)
    if weight:
        return int(weight[1]), f"weights {weight[2]}"
    layer = layer_of(tap)
    return layer, tap if layer is None else kind_of(tap)


def _cell(result: dict[str, Any], allowance: float) -> Cell:
    ratio, state = result["ratio"], state_of(result)
    many = times(ratio, result["nonfinite"])
    said = {"ok": "within its allowance", "known": "differs by design", "diverges": "diverges"}[state]
    label = f"{result['tap']}, {said}, {many}{'' if result['nonfinite'] else ' times the noise'}"
    return Cell(
        result["tap"],
        _short(ratio, result["nonfinite"]),
        _shade(None if result["nonfinite"] else ratio, state, allowance),
        label,
    )


def _short(ratio: float | None, nonfinite: int) -> str:
    if nonfinite:
        return "NaN"
    if ratio is None:
        return "∞"
    if ratio < 9.95:
        return "0" if ratio == 0 else "<.1" if ratio < 0.05 else f"{ratio:.1f}"
    if ratio < 999.5:
        return f"{ratio:.0f}"
    digit, exponent = f"{ratio:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


def _shade(ratio: float | None, state: str, allowance: float) -> str:
    """The class of a cell: its state, and how far within or out of the allowance."""
    if state == "known":
        return "known"
    share = math.inf if ratio is None else ratio / allowance
    if state == "ok":
        return f"ok{sum(share > bound for bound in (0.1, 0.4, 0.7))}"
    return f"out{sum(share > bound for bound in (10, 1e3))}"
