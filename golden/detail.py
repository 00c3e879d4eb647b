"""What the HTML report draws of each tap, gathered while it is judged: distribution, maps, the worst element.

All errors here are in multiples of one element's noise: the root mean square of what the profile makes of the step.
"""

from typing import Any

import numpy as np

from assay.golden.operands import Operand, layer_of, operands_of
from assay.reference.taps import AFTER_LAYERS, ATTENTION, BEFORE_LAYERS, DENSE, EXPERTS, OUTPUT, TapSpec, kind_of

Array = np.ndarray

SPECS = {spec.name: spec for spec in (*BEFORE_LAYERS, *ATTENTION, *DENSE, *EXPERTS, *OUTPUT, *AFTER_LAYERS)}
ROWS, COLUMNS = 32, 64  # of a map, at most

LOWEST_BIN, BINS, BINS_PER_DECADE = -3, 26, 2  # of the histogram: 1e-3 to 1e10 times the noise
LOWEST_CELL, CELLS_PER_DECADE = -2, 5  # of a map's levels: 1e-2 to 1e10 times the noise
LEVELS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxy"  # 61: one character a cell
MOST = 1e30  # times the noise: more is drawn as that
LOST = "!"  # a cell with a value that is not finite, or another expert than expected


class Details:
    """The observer of a check (see `assay.golden.check.Observer`); `taps` holds what a page shows of each, as JSON.

    `layers` is how many the model has, None if that is not known.
    """

    def __init__(self, tokens: list[int], unit_roundoff: float, layers: int | None):
        self.unit_roundoff, self.layers = unit_roundoff, layers
        self.taps: dict[str, dict[str, Any]] = {}
        self._tokens = np.array(tokens)
        self._given: dict[str, Array] = {}  # the backend's taps of this layer and the one before: operands

    def __call__(self, name: str, expected: Array, got: Array, noisy: Array | None) -> None:
        """Look at one tap; they come in the order of computation."""
        got = np.asarray(got).reshape(expected.shape)
        self._forget_before(name)
        self._given[name] = got
        spec = SPECS.get(kind_of(name))
        if spec is None or got.ndim != len(spec.axes):  # without the checkpoint a golden may hold anything
            return
        integer = np.issubdtype(expected.dtype, np.integer)
        detail = _ids(spec, expected, got) if integer else _numbers(spec, expected, got, noisy, self.unit_roundoff)
        operands: list[Operand] = []
        if noisy is not None:  # the error is that of a step: say from what
            operands = operands_of(name, detail["worst"]["at"], {"tokens": self._tokens, **self._given}, self.layers)
        self.taps[name] = detail | {"operands": [_shown(operand) for operand in operands]}

    def _forget_before(self, name: str) -> None:
        layer = layer_of(name)
        if layer is not None:
            self._given = {n: a for n, a in self._given.items() if (layer_of(n) or 0) >= layer - 1}


def _numbers(spec: TapSpec, expected: Array, got: Array, noisy: Array | None, unit_roundoff: float) -> dict[str, Any]:
    expected, got = expected.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(got) & np.isfinite(expected)
    error = np.abs(np.subtract(got, expected, where=finite, out=np.zeros(got.shape)))
    level = unit_roundoff * _rms(expected[finite])
    noise = None if noisy is None else np.abs(noisy[finite].astype(np.float64) - expected[finite])
    scale = level if noise is None else max(_rms(noise), level / 4)
    scale = max(scale, float(np.finfo(np.float32).tiny))
    index = np.unravel_index(np.argmax(np.where(finite, error, np.inf)), error.shape)
    multiples = np.minimum(error / scale, MOST)
    return {
        "scale": scale,
        "histogram": _histogram(multiples[finite]),
        "noise_histogram": None if noise is None else _histogram(noise / scale),
        "maps": _maps(spec, multiples, ~finite),
        "worst": {"at": list(map(int, index)), "expected": _text(expected[index]), "got": _text(got[index])},
    }


def _ids(spec: TapSpec, expected_TA: Array, got_TA: Array) -> dict[str, Any]:
    """Choices of experts: nothing to measure, only which of the backend's are not among the oracle's."""
    other_TA = np.array([~np.isin(got, expected) for expected, got in zip(expected_TA, got_TA, strict=True)])
    t = int(other_TA.any(axis=1).argmax())
    return {
        "scale": None,
        "histogram": None,
        "noise_histogram": None,
        "maps": _maps(spec, np.zeros(expected_TA.shape), other_TA),
        "worst": {"at": [t], "expected": _listed(expected_TA[t]), "got": _listed(got_TA[t])},
    }


def _rms(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0


def _histogram(multiples: Array) -> list[int]:
    """Counts by half decades of the noise; what is smaller or larger falls into the outermost."""
    with np.errstate(divide="ignore"):
        bins = np.floor((np.log10(multiples) - LOWEST_BIN) * BINS_PER_DECADE)
    return np.bincount(np.clip(bins, 0, BINS - 1).astype(np.int64), minlength=BINS).tolist()


def _maps(spec: TapSpec, multiples: Array, lost: Array) -> list[dict[str, Any]]:
    """Positions against each of the other axes; a cell is the root mean square of what falls into it."""
    T_axis = spec.axes.index("T")
    multiples, lost = (np.moveaxis(a, T_axis, 0) for a in (multiples, lost))
    letters = spec.axes.replace("T", "")
    maps = []
    for axis, letter in enumerate(letters, start=1):
        others = tuple(i for i in range(1, multiples.ndim) if i != axis)
        square, gone = np.square(multiples).mean(axis=others), lost.astype(np.float64).max(axis=others)
        rows, columns = (_edges(n, most) for n, most in zip(square.shape, (ROWS, COLUMNS), strict=True))
        cells = _pooled(square, rows, columns) / np.outer(_lengths(rows), _lengths(columns))
        text = _levels(np.sqrt(cells), _pooled(gone, rows, columns) > 0)
        maps.append({"axes": ["T", letter], "of": list(square.shape), "shape": list(cells.shape), "cells": text})
    return maps


def _edges(n: int, most: int) -> Array:
    """Where the cells along an axis of n begin, and n."""
    return np.linspace(0, n, min(n, most) + 1).astype(np.int64)


def _lengths(edges: Array) -> Array:
    return np.diff(edges)


def _pooled(array: Array, rows: Array, columns: Array) -> Array:
    return np.add.reduceat(np.add.reduceat(array.astype(np.float64), rows[:-1], axis=0), columns[:-1], axis=1)


def _levels(cells: Array, lost: Array) -> str:
    with np.errstate(divide="ignore"):
        levels = np.round((np.log10(cells) - LOWEST_CELL) * CELLS_PER_DECADE)
    clipped = np.clip(levels, 0, len(LEVELS) - 1).astype(np.int64)
    return "".join(LOST if gone else LEVELS[level] for level, gone in zip(clipped.ravel(), lost.ravel(), strict=True))


def _shown(operand: Operand) -> dict[str, str]:
    """An operand as text: a few values, or what many are like."""
    label = f"{operand.tap}{operand.index}"
    values = operand.values
    if values is None:
        return {"what": label, "is": "not supplied"}
    if values.size <= 8:
        return {"what": label, "is": ", ".join(_text(value) for value in values.ravel())}
    finite = values[np.isfinite(values)]
    lost = values.size - finite.size
    text = f"{values.size} values, rms {_rms(finite):.6g}"
    if finite.size:
        text += f", {finite.min():.6g} to {finite.max():.6g}"
    return {"what": label, "is": text + (f", {lost} not finite" if lost else "")}


def _text(value: Any) -> str:
    return str(int(value)) if np.issubdtype(type(value), np.integer) else f"{float(value):.9g}"


def _listed(ids: Array) -> str:
    return ", ".join(str(int(id)) for id in ids)
