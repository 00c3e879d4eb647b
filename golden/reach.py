"""What fewer taps leave open: which known mistakes hide in the steps between them, and which look alike there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.golden.coverage import CLEARLY, effect
from assay.golden.diagnose import together
from assay.golden.forced import forced_pass, noisy_pass
from assay.golden.measure import ALLOWANCE, compare
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.mistake import Mistake
from assay.golden.mistakes.replay import Replay, Run
from assay.golden.noise import PROFILES, Profile
from assay.golden.record import chosen_taps
from assay.golden.spans import spanned
from assay.golden.store import Golden
from assay.loaders.checkpoint import Checkpoint
from assay.reference.taps import default_taps, kind_of, tap_table

Array = np.ndarray
WORK = 2 * 10**10  # multiplications, some ten seconds on two cores: what a check has not tried by then is listed
PASSES = 8  # forced passes that must fit into it, for anything to be tried
FOLLOWED_BY = {"attn_scores": "attn_heads", "attn_weights": "attn_heads"}  # heavy taps are part of the next step
SKETCH = (64, 512)  # positions, and places of each other axis, on which two mistakes are compared


@dataclass(frozen=True)
class Shown:
    """Where a mistake is first out of what is allowed, and a part of the tensor that it makes there."""

    mistake: Mistake
    place: str
    value: Array


def reach(
    run: Run,
    expected: Mapping[str, Array],
    noisy: Mapping[str, Array],
    profile: Profile,
    most: float = WORK,
) -> dict[str, Any] | None:
    """Which mistakes of the catalogue a run's taps can show, as JSON; None where no step lacks its tap.

    Only mistakes in steps without a tap of their own are looked at, and of those the ones that these tokens would
    show if it were there. `hides` stay within what is allowed, `alike` are groups that leave the same values.
    After `most` multiplications the others are `not_tried`.
    """
    config = run.checkpoint.config
    spans = {name: spanned(name, config, run.taps) for name in run.taps}
    table = tap_table(config)
    missing = {kind_of(name) for name, spec in table.items() if name not in run.taps and not spec.heavy}
    acting = [m for m in CATALOGUE.values() if _kinds(m) & missing and m.acts(run.checkpoint)]
    if not acting:
        return None
    result: dict[str, Any] = {"shows": [], "hides": [], "alike": [], "not_tried": [m.id for m in acting]}
    if PASSES * sum(run.work_by_kind[kind_of(name)] for name in table) > most:
        return result
    whole, exact, rough = _with_all_taps(run, profile)
    shown, work = [], 0
    for mistake in acting:
        if work > most:
            break
        result["not_tried"].remove(mistake.id)
        with_all, with_these = (Replay(ran, together((mistake,)), PROFILES["float64"]) for ran in (whole, run))
        if _shows_with_all(mistake, with_all, exact, rough, profile):
            found = _first_shown(mistake, with_these, expected, noisy, spans, profile)
            result["hides" if found is None else "shows"].append(mistake.id)
            shown += [] if found is None else [found]
        work += with_all.work + with_these.work
    result["alike"] = _alike(shown, expected, noisy, run, profile)
    return result


def reach_of(golden: Golden, checkpoint: Checkpoint, pattern: str, profile: Profile) -> dict[str, Any] | None:
    """`reach` of a faultless backend that hands over the taps of some globs only; every mistake is tried."""
    tokens, chunks = golden.provenance.tokens, golden.provenance.chunks
    names = chosen_taps(checkpoint.config, pattern)
    exact = forced_pass(checkpoint, tokens, chunks, {}, names)
    recorded = {*names, *(name for name in default_taps(checkpoint.config) if name.endswith("router_logits"))}
    expected = forced_pass(checkpoint, tokens, chunks, exact, recorded)
    noisy = noisy_pass(checkpoint, tokens, chunks, exact, expected, profile)
    return reach(Run(checkpoint, tokens, chunks, exact), expected, noisy, profile, float("inf"))


def _with_all_taps(run: Run, profile: Profile) -> tuple[Run, dict[str, Array], dict[str, Array]]:
    """The run with the oracle's values for what it lacks, what the oracle computes from them, and with noise."""
    ran = run.checkpoint, run.tokens, run.chunks
    exact = forced_pass(*ran, run.taps, default_taps(run.checkpoint.config))
    whole = Run(*ran, {**exact, **run.taps}, run.rows)
    return whole, exact, noisy_pass(*ran, whole.taps, exact, profile)


def _shows_with_all(
    mistake: Mistake, replay: Replay, exact: Mapping[str, Array], rough: Mapping[str, Array], profile: Profile
) -> bool:
    places = [name for name in exact if kind_of(name) in _kinds(mistake)]
    return any(_clear(effect(replay, name, exact[name], rough[name], profile)[1]) for name in places)


def _first_shown(
    mistake: Mistake,
    replay: Replay,
    expected: Mapping[str, Array],
    noisy: Mapping[str, Array],
    spans: Mapping[str, list[str]],
    profile: Profile,
) -> Shown | None:
    for name, between in spans.items():
        if _kinds(mistake) & {kind_of(step) for step in (name, *between)}:
            value, ratio = effect(replay, name, expected[name], noisy[name], profile)
            if _clear(ratio):
                return Shown(mistake, name, _sketch(value, _T_axis(name, replay.run)))
    return None


def _alike(
    shown: list[Shown], expected: Mapping[str, Array], noisy: Mapping[str, Array], run: Run, profile: Profile
) -> list[list[str]]:
    """Groups of mistakes whose values, where they first show, are the same but for noise."""
    groups: list[list[Shown]] = []
    for one in shown:
        axis = _T_axis(one.place, run)
        exact, rough = (_sketch(values[one.place], axis) for values in (expected, noisy))
        if tap_table(run.checkpoint.config)[one.place].integer or not np.isfinite(one.value).all():
            continue

        def same(a: Array, b: Array, noise: Array = rough - exact, axis: int = axis) -> bool:
            return compare(a, b, a + noise, axis, profile.unit_roundoff).allowed

        if same(exact, one.value):  # it shows in other places than those of the sketch
            continue
        group = next((g for g in groups if any(o.place == one.place and same(o.value, one.value) for o in g)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return [[one.mistake.id for one in group] for group in groups if len(group) > 1]


def _sketch(array: Array, T_axis: int) -> Array:
    """At most so many places of each axis, evenly spread."""
    for axis, n in enumerate(array.shape):
        most = SKETCH[0] if axis == T_axis else SKETCH[1]
        if n > most:
            array = np.take(array, np.linspace(0, n - 1, most).astype(int), axis)
    return array.copy()


def _clear(ratio: float) -> bool:
    return ratio > CLEARLY * ALLOWANCE


def _kinds(mistake: Mistake) -> set[str]:
    return {FOLLOWED_BY.get(kind, kind) for kind in mistake.taps}


def _T_axis(name: str, run: Run) -> int:
    return tap_table(run.checkpoint.config)[name].axes.index("T")
