"""What an unexplained error looks like: where it is, and what was done to the tensor, by search.

Every pattern of `patterns.py` is fitted to the difference and judged by what it leaves, in multiples of the
noise. One that leaves no more than the allowance describes the error; the others say how far they come.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.golden.fitting import Pattern, Seen
from assay.golden.measure import ALLOWANCE, compare
from assay.golden.mistakes.recipe import weights_renamed
from assay.golden.mistakes.replay import Replay, Run
from assay.golden.noise import PROFILES, Profile
from assay.golden.patterns import patterns
from assay.golden.places import NOUNS, at, placed
from assay.golden.spans import spanned
from assay.reference.taps import tap_table

Array = np.ndarray
LARGEST = 1 << 24  # values searched at most; of a larger tensor the positions around the first affected one
FALLS_TO = 0.5  # of the error, for a pattern to be worth telling
TOLD = 5  # patterns in the report
GENERAL = ("affine", "factor along", "sign along", "vector", "offset along", "rotation")
OTHER_LAYERS = 8  # whose weights are tried in the place of a layer's own
WEIGHTED = (
    *("attn_norm", "q", "k", "v", "attn_out", "mlp_norm", "router_logits", "gate", "up", "mlp_out"),
    *("expert_gate", "expert_up", "expert_out"),
)
NO_OTHERS: Mapping[str, Array] = {}


@dataclass(frozen=True)
class Tried:
    """A pattern and what it leaves."""

    pattern: Pattern
    residual: float  # multiples of the noise, as `Comparison.ratio`
    left: float  # relative to the expected values

    @property
    def fits(self) -> bool:
        return self.residual <= ALLOWANCE

    def as_json(self) -> dict[str, Any]:
        p = self.pattern
        return {
            "pattern": p.name,
            "sentence": p.sentence,
            "parameters": p.parameters,
            "residual": self.residual,
            "left": self.left,
            "fits": self.fits,
        }


def describe(
    expected: Array,
    got: Array,
    noisy: Array,
    axes: str,
    unit_roundoff: float = 2.0**-53,
    *,
    chunks: Sequence[int] = (),
    ids_TA: Array | None = None,
    others: Mapping[str, Array] = NO_OTHERS,
) -> dict[str, Any]:
    """The structure of an error, as JSON: affected places of each axis, and patterns by what they leave.

    `expected`, `got` and `noisy` have the tap's shape, whose letters are `axes`. `chunks` are the lengths that
    positions came in; `ids_TA` the experts of each position; `others` taps of which one may stand here.
    """
    expected, got, noisy = (np.asarray(a, dtype=np.float64) for a in (expected, got, noisy))
    finite = np.isfinite(got)
    filled = np.where(finite, got, expected)
    level = float(np.sqrt(np.mean((noisy - expected) ** 2)))
    level = max(level, unit_roundoff / 4 * float(np.sqrt(np.mean(expected**2))), np.finfo(np.float64).tiny)
    affected = _affected(filled - expected, noisy - expected, level)
    result: dict[str, Any] = {"axes": list(axes), "places": {}, "nonfinite": None, "patterns": []}
    for axis, letter in enumerate(axes):
        result["places"][letter] = _place(affected[axis], expected.shape[axis])
    if ids_TA is not None and axes in ("TAF", "TAD"):
        result["places"]["expert"] = _experts(filled - expected, ids_TA, level)
    result["elements"] = _elements(filled - expected, level)
    sentences = []
    if not finite.all():
        result["nonfinite"] = _nonfinite(got, axes)
        sentences.append(result["nonfinite"]["sentence"])
    if (filled != expected).any():
        if len(chunks) > 1 and (words := _of_chunks(affected[axes.index("T")], chunks)):
            result["places"]["T"]["chunks"] = words
        cut = _window(expected.shape, axes, affected)
        parts = [x[cut] for x in (expected, filled, noisy)]
        near = {name: other[cut] for name, other in others.items() if other.shape == expected.shape}
        ids = None if ids_TA is None else ids_TA[cut[0]]
        places = tuple(_fitted_at(a, s, n) for a, s, n in zip(affected, cut, expected.shape, strict=True))
        seen = Seen(axes, parts[0], parts[1], level, places, near, ids)
        tried = _ranked(seen, parts[2], unit_roundoff)
        result["patterns"] = [t.as_json() for t in tried[:TOLD]]
        sentences.append(_summary(tried, result))
    result["sentence"] = "; ".join(sentences)
    return result


def describe_tap(
    name: str, run: Run, expected: Mapping[str, Array], noisy: Mapping[str, Array], profile: Profile
) -> dict[str, Any]:
    """The structure of the error of a run's tap, searched among the taps of its layer and itself in other layers."""
    table, taps = tap_table(run.checkpoint.config), run.taps
    if table[name].integer:
        return describe_ids(expected[name], taps[name])
    prefix, _, kind = name.rpartition(".")
    order = {tap: i for i, tap in enumerate(table)}
    layer = int(prefix.split(".")[1]) if prefix else 0
    into = f"layers.{layer - 1}.block_out" if layer else "embed"
    near = [
        n for n in expected if n != name and (n.rpartition(".")[0] == prefix or n.endswith(f".{kind}") or n == into)
    ]
    # what came before is the backend's, what comes after is what it should be
    others = {other: (taps if order[other] < order[name] else expected)[other] for other in near if other in taps}
    others |= dict(_by_other_layers(name, run))
    ids = f"{prefix}.expert_ids"
    return describe(
        expected[name],
        taps[name],
        noisy[name],
        table[name].axes,
        profile.unit_roundoff,
        chunks=run.chunks,
        ids_TA=taps.get(ids, expected.get(ids)),
        others=others,
    )


def _by_other_layers(name: str, run: Run) -> Iterator[tuple[str, Array]]:
    """A step as the weights of another layer make it, by what to call that; the nearest layers first."""
    config, (prefix, _, kind) = run.checkpoint.config, name.rpartition(".")
    if kind not in WEIGHTED or not prefix or name in run.rows or spanned(name, config, run.taps):
        return
    layer = int(prefix.split(".")[1])
    others = sorted(range(config.num_hidden_layers), key=lambda i: abs(i - layer))[1 : OTHER_LAYERS + 1]
    for i in others:
        renamed = weights_renamed({f"model.{prefix}.": f"model.layers.{i}."})
        with np.errstate(all="ignore"):
            yield f"{name} by the weights of layer {i}", Replay(run, renamed, PROFILES["float64"]).value(name)


def describe_ids(expected_TA: Array, got_TA: Array) -> dict[str, Any]:
    """The structure of a wrong choice of experts: which positions, and whether one expert stands for another."""
    expected, got = np.sort(expected_TA, axis=1), np.sort(got_TA, axis=1)
    rows = np.flatnonzero(np.any(expected != got, axis=1))
    places = {"T": _place(rows, len(expected))}
    result: dict[str, Any] = {"axes": ["T", "A"], "places": places, "nonfinite": None, "patterns": []}
    n = int(max(expected.max(), got.max())) + 1
    sentence = f"other experts at {at('T', rows, len(expected))}"
    pairs = {(int(e), int(g)) for e, g in zip(expected_TA[rows].ravel(), got_TA[rows].ravel(), strict=True)}
    named = dict(pairs)
    if len(named) == len(pairs) > 1 and len(rows) >= 4:  # each expert became one and the same other
        shift = {(g - e) % n for e, g in pairs}
        how = f"each id is {shift.pop()} too large (mod {n})" if len(shift) == 1 else "one id stands for another: "
        how += ", ".join(f"{g} for {e}" for e, g in sorted(pairs)[:4]) if how.endswith(": ") else ""
        parameters = {"expected": list(named), "got": list(named.values())}
        result["patterns"] = [
            {"pattern": "ids", "sentence": how, "parameters": parameters, "residual": 0.0, "left": 0.0, "fits": True}
        ]
        sentence += f"; {how}"
    return {**result, "sentence": sentence}


def _affected(difference: Array, noise: Array, level: float) -> tuple[Array, ...]:
    """The places of each axis where the error is over the noise there; all of them where it is nowhere by itself."""
    places = []
    for axis in range(difference.ndim):
        rest = tuple(i for i in range(difference.ndim) if i != axis)
        error = np.sqrt(np.mean(difference**2, axis=rest))
        usual = np.maximum(np.sqrt(np.mean(noise**2, axis=rest)), level)
        over = np.flatnonzero(error > ALLOWANCE * usual)
        places.append(over if len(over) else np.arange(difference.shape[axis]))
    return tuple(places)


def _place(places: Array, n: int) -> dict[str, Any]:
    first = int(places[0]) if len(places) else None
    return {"affected": len(places), "of": n, "first": first, "which": placed(places, n) if len(places) else "none"}


def _worded(letter: str, entry: dict[str, Any]) -> str:
    return f"{NOUNS.get(letter, 'expert')}{'s' if entry['affected'] != 1 else ''} {entry['which']}"


def _experts(difference: Array, ids_TA: Array, level: float) -> dict[str, Any]:
    """The experts in whose outputs the error is, of those that ran."""
    error_TA = np.sqrt(np.mean(difference**2, axis=2))
    ran = np.unique(ids_TA)
    wrong = [int(id) for id in ran if np.sqrt(np.mean(error_TA[ids_TA == id] ** 2)) > ALLOWANCE * level]
    shown = "all that ran" if len(wrong) == len(ran) else ", ".join(map(str, wrong[:6])) + ", ..." * (len(wrong) > 6)
    first = wrong[0] if wrong else None
    return {"affected": len(wrong), "of": len(ran), "first": first, "which": shown or "none"}


def _elements(difference: Array, level: float) -> dict[str, int]:
    """How many single values are out of what the noise does to one."""
    return {"affected": int(np.count_nonzero(np.abs(difference) > 4 * ALLOWANCE * level)), "of": difference.size}


def _nonfinite(got: Array, axes: str) -> dict[str, Any]:
    """Which values are no numbers: kinds, and the places of each axis."""
    lost = ~np.isfinite(got)
    kinds = {"NaN": int(np.isnan(got).sum()), "inf": int((got == np.inf).sum()), "-inf": int((got == -np.inf).sum())}
    kinds = {name: count for name, count in kinds.items() if count}
    where, whole = {}, []
    for axis, letter in enumerate(axes):
        rest = tuple(i for i in range(got.ndim) if i != axis)
        where[letter] = _place(np.flatnonzero(lost.any(axis=rest)), got.shape[axis])
        if lost.sum() == where[letter]["affected"] * got.size // got.shape[axis]:
            whole.append(letter)
    parts = [_worded(letter, entry) for letter, entry in where.items() if entry["affected"] < entry["of"]]
    count = " and ".join(f"{n} {name}" for name, n in kinds.items())
    sentence = f"{count} of {got.size} values" + (f", at {', '.join(parts)}" if parts else "")
    if whole and not lost.all():
        sentence += f": whole {NOUNS[whole[0]]}s"
    return {"kinds": kinds, "places": where, "sentence": sentence}


def _of_chunks(places: Array, chunks: Sequence[int]) -> str | None:
    """Which chunks the affected positions are, where they are whole chunks or their edges."""
    ends = np.cumsum(chunks)
    starts = ends - chunks
    hit = [i for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if ((places >= a) & (places < b)).any()]
    if len(hit) < len(chunks):
        return f"only in chunk{'s' * (len(hit) > 1)} {', '.join(str(i + 1) for i in hit)} of {len(chunks)}"
    for edge, words in ((starts, "first"), (ends - 1, "last")):
        if np.array_equal(places, edge):
            return f"only the {words} position of each chunk"
    return None


def _window(shape: tuple[int, ...], axes: str, affected: tuple[Array, ...]) -> tuple[slice, ...]:
    """All of a tensor that is small enough; of a larger one so many positions, the first affected one among them."""
    cut = [slice(0, n) for n in shape]
    axis = axes.index("T") if "T" in axes else 0
    each = max(1, int(np.prod(shape)) // shape[axis])
    if (most := max(1, LARGEST // each)) < shape[axis]:
        first = max(0, min(int(affected[axis][0]) - 1, shape[axis] - most))
        cut[axis] = slice(first, first + most)
    return tuple(cut)


def _fitted_at(places: Array, cut: slice, n: int) -> Array:
    """The places that patterns are fitted at: most of an axis here and there is the whole of it."""
    if 2 * len(places) > n and "more" in placed(places, n):
        return np.arange(cut.stop - cut.start)
    return places[(places >= cut.start) & (places < cut.stop)] - cut.start


def _ranked(seen: Seen, noisy: Array, unit_roundoff: float) -> list[Tried]:
    """Patterns that take away half of the error, first those that leave noise, plainest first, then by what is left."""
    axis = max(seen.axes.find("T"), 0)
    before = compare(seen.expected, seen.got, noisy, axis, unit_roundoff)
    tried = []
    for pattern in patterns(seen):
        with np.errstate(all="ignore"):
            value, noise = pattern.change(seen.expected), pattern.change(noisy)
        if not (np.isfinite(value).all() and np.isfinite(noise).all()):
            continue
        # the backend's noise may have come before the change or after it: the larger of the two
        if np.linalg.norm(noise - value) < np.linalg.norm(noisy - seen.expected):
            noise = value + (noisy - seen.expected)
        found = compare(value, seen.got, noise, axis, unit_roundoff)
        left = found.local_error * float(np.linalg.norm(value)) / max(float(np.linalg.norm(seen.expected)), 1e-100)
        if left <= FALLS_TO * before.local_error:
            tried.append(Tried(pattern, found.ratio, left))
    ranked = sorted(tried, key=lambda t: (not t.fits, 0.0 if t.fits else t.left))
    if not (ranked and ranked[0].fits):
        return ranked
    # with more numbers the same fits too: that is no news
    plainest, *rest = ranked
    return [plainest, *(t for t in rest if t.fits and not t.pattern.name.startswith(GENERAL))]


def _summary(tried: Sequence[Tried], result: dict[str, Any]) -> str:
    if tried and tried[0].fits:
        return tried[0].pattern.sentence
    parts = []
    for letter, entry in result["places"].items():
        if entry["affected"] < entry["of"]:
            parts.append(f"{_worded(letter, entry)} of {entry['of']}")
    elements = result["elements"]
    where = ", ".join(parts) if parts else "everywhere"
    if elements["affected"] * 20 < elements["of"]:
        where += f"; {elements['affected']} of {elements['of']} single values"
    if not tried:
        return f"no pattern: {where}"
    best = tried[0]
    return f"no pattern: {where}; nearest to it, {best.pattern.sentence}, leaves {best.residual:.3g} x the noise"
