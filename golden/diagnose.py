"""The cause of a divergence: which known mistake, made by the oracle on the same inputs, has the backend's values?"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from assay.golden.measure import ALLOWANCE, Comparison, compare, relative
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.mistake import Mistake
from assay.golden.mistakes.recipe import Recipe
from assay.golden.mistakes.replay import Replay, Run
from assay.golden.noise import PROFILES, Profile
from assay.golden.routing import tied
from assay.reference.taps import kind_of, tap_table

Array = np.ndarray
Mistakes = tuple[Mistake, ...]
Search = Callable[[int, int], None] | None

FALLS_TO = 0.5  # of the error: a cause must take away at least this much of it, at its worst position too
PAIRS = 60  # tried at most, when no single mistake explains the error
LAYERS = 6  # looked at, evenly spread, to see whether a mistake explains the other layers too
WORK = 25 * 10**10  # multiplications after which no further mistake is tried: some two minutes on two cores
FORGIVEN = 0.01  # share of values that a mistake which rounds may round to the other neighbour
KEPT = 8  # values of taps kept for another look
LIKE_OTHERS = 1.5  # times what taps that match leave: more is doubtful, where the same tap of other layers contradicts
SAME = 1e-9  # relative difference under which a mistake changes nothing here
NEARLY_TIED = 2.0  # residuals within this factor of each other do not tell two mistakes apart


@dataclass(frozen=True)
class Candidate:
    """Mistakes made together, what they leave of the error, and in how many other places they explain it.

    `contradicted` is in how many layers the same tap is wrong, and not as the mistakes make it.
    """

    mistakes: Mistakes
    found: Comparison
    residual: float  # relative to the oracle's own value, as the error before
    explained: int = 0
    of: int = 0
    contradicted: int = 0

    @property
    def share(self) -> float:
        return self.explained / max(self.of, 1)

    @property
    def id(self) -> str:
        return " + ".join(mistake.id for mistake in self.mistakes)


class Diagnosis:
    """The taps of one run, judged against the oracle with mistakes in it.

    `expected` and `noisy` are what the check's two forced passes computed for each supplied tap.
    """

    def __init__(self, run: Run, expected: Mapping[str, Array], noisy: Mapping[str, Array], profile: Profile):
        self.run, self.expected, self.noisy, self.profile = run, expected, noisy, profile
        self.table = tap_table(run.checkpoint.config)
        self._values: dict[tuple[str, str, str], Array] = {}
        self.work = 0  # done by replays, in multiplications
        self.untried = 0  # mistakes that `cause` did not come to
        self.acting = [mistake for mistake in CATALOGUE.values() if mistake.acts(run.checkpoint)]

    def value(self, mistakes: Mistakes, name: str, profile: Profile = PROFILES["float64"]) -> Array:
        """A tap by the oracle with these mistakes."""
        key = "+".join(mistake.id for mistake in mistakes), name, profile.name
        if key not in self._values:
            if len(self._values) >= KEPT:
                self._values.clear()
            with np.errstate(all="ignore"):  # a mistake may well divide by zero
                replay = Replay(self.run, together(mistakes), profile)
                value = replay.value(name)
                self.work += replay.work
                if profile.name == "float64" and not self.table[name].integer:
                    value = self._following(mistakes, name, value, replay.routed)
            self._values[key] = self._where_computed(name, value)
        return self._values[key]

    def _following(self, mistakes: Mistakes, name: str, value: Array, routed: Mapping[str, Array]) -> Array:
        """The value with nearly tied choices of experts, that this tap spans, made as the backend must have made them.

        With the mistakes in it other choices are tied than the oracle's.
        """
        open_choices: dict[str, Array] = {}
        for logits, logits_TN in routed.items():
            ids = logits.replace("router_logits", "expert_ids")
            A = self.run.checkpoint.config.dims.get("A", 0)
            if ids not in self.run.taps and logits in self.noisy and logits_TN.shape[1] > A:
                open_T = tied(logits_TN, A, self.noisy[logits] - self.expected[logits])
                open_choices |= {ids: open_T} if open_T.any() else {}
        if not open_choices:
            return value
        replay = Replay(self.run, together(mistakes), PROFILES["float64"], open_choices)
        other = replay.value(name)
        self.work += replay.work
        axis, got = self.table[name].axes.index("T"), np.asarray(self.run.taps[name])
        rest = tuple(i for i in range(got.ndim) if i != axis)
        nearer = np.sum((got - other) ** 2, rest, keepdims=True) < np.sum((got - value) ** 2, rest, keepdims=True)
        return np.where(nearer, other, value)

    def _where_computed(self, name: str, value: Array) -> Array:
        """The value, but the oracle's own where the backend computed none: no mistake shows there."""
        if name not in self.run.rows:
            return value
        whole, positions = self.expected[name].astype(value.dtype), self.run.rows[name]
        whole[positions] = value[positions]
        return whole

    def judge(self, mistakes: Mistakes, name: str) -> Comparison | None:
        """The backend's tap against the oracle with these mistakes; None if they change nothing here."""
        expected, got = self.expected[name], np.asarray(self.run.taps[name])
        value = self.value(mistakes, name)
        if relative(value - expected, expected) <= SAME and np.array_equal(np.isfinite(value), np.isfinite(expected)):
            return None
        return self._compared(mistakes, name, value, got)

    def _compared(self, mistakes: Mistakes, name: str, value: Array, got: Array) -> Comparison:
        if self.table[name].integer:
            return _compared_sets(value, got)
        noise = self._noise(mistakes, name, value)
        equally_lost = ~np.isfinite(value) & ~np.isfinite(got)
        value, got = np.where(equally_lost, 0, value), np.where(equally_lost, 0, got)
        value = np.where(np.isfinite(value), value, 0)
        grain = max(mistake.grain for mistake in mistakes)
        if grain:
            value = _rounded_either_way(value, got, grain)
        noisy = value + np.where(np.isfinite(noise), noise, 0)
        return compare(value, got, noisy, self.table[name].axes.index("T"), self.profile.unit_roundoff)

    def _noise(self, mistakes: Mistakes, name: str, value: Array) -> Array:
        """The profile's noise on this step: of the step with the mistakes in it, or the check's, if that is larger."""
        expected = self.expected[name]
        finite = np.where(np.isfinite(value), value, 0)
        checked = (self.noisy[name] - expected) * (_norm(finite) / max(_norm(expected), 1e-100))
        if any(mistake.grain for mistake in mistakes):
            return checked
        profile = self.profile
        if profile.name == "float64":
            rough = PROFILES["float32"]
            own = (self.value(mistakes, name, rough) - value) * (profile.unit_roundoff / rough.unit_roundoff)
        else:
            own = self.value(mistakes, name, profile) - value
        return own if _norm(np.where(np.isfinite(own), own, 0)) > _norm(checked) else checked

    def cause(
        self, name: str, before: Comparison, usual: float = ALLOWANCE, search: Search = None
    ) -> dict[str, Any] | None:
        """The mistake, or the pair of them, that explains the error of a tap; None if none in the catalogue does.

        `usual` is the largest ratio of the backend's taps that match: what is left by the true cause is like it.
        `search` is called before each mistake with how many were tried, of how many.
        """
        spanned = self._spanned(name)
        most = self.work + WORK
        tried = 0
        explaining: list[Candidate] = []
        failing: list[Candidate] = []
        singles = [(mistake,) for mistake in self.acting if spanned & set(mistake.taps)]
        for mistakes in singles:
            if self.work > most:
                self.untried = len(singles) - tried
                break
            if search is not None:
                search(tried, len(singles))
            tried += 1
            candidate = self._candidate(mistakes, name)
            if candidate is None:
                continue
            (explaining if self._explains(candidate, name, before) else failing).append(candidate)
        ranked = self._ranked(explaining, name, usual)
        if not ranked:
            failing += explaining
            pairs = self._pairs(failing)
            for pair in pairs:
                if self.work > most:
                    break
                if search is not None:
                    search(tried, len(singles) + len(pairs))
                tried += 1
                candidate = self._candidate(pair, name) if self._promises(pair, name, before) else None
                if candidate is not None and self._explains(candidate, name, before):
                    explaining.append(candidate)
            ranked = self._ranked(explaining, name, usual)
        if not ranked:
            return None
        others = sorted(failing, key=lambda candidate: candidate.residual)
        return self._described(ranked, others, before, tried)

    def _spanned(self, name: str) -> set[str]:
        """The kinds of tap whose steps lie between the backend's taps and this one, itself included."""
        replay = Replay(self.run, lambda recipe: recipe, PROFILES["float32"])
        with np.errstate(all="ignore"):
            replay.value(name)
        return {kind_of(computed) for computed in replay.computed}

    def _candidate(self, mistakes: Mistakes, name: str) -> Candidate | None:
        found = self.judge(mistakes, name)
        return None if found is None else Candidate(mistakes, found, self._residual(mistakes, found, name))

    def _residual(self, mistakes: Mistakes, found: Comparison, name: str) -> float:
        """The error left, relative to the oracle's own value."""
        if self.table[name].integer:
            return found.local_error
        finite = self.value(mistakes, name)
        finite = np.where(np.isfinite(finite), finite, 0)
        return found.local_error * _norm(finite) / max(_norm(self.expected[name]), 1e-100)

    def _explains(self, candidate: Candidate, name: str, before: Comparison) -> bool:
        """Within the allowance, and by what it takes away, not by a noise that would cover anything."""
        after = candidate.found
        if not after.allowed:
            return False
        if before.nonfinite or self.table[name].integer:
            return True
        # the ratio may fall for a larger noise: the error itself must fall too, where it was worst
        return after.ratio <= FALLS_TO * before.ratio and self._row_falls(candidate.mistakes, name, before)

    def _row_falls(self, mistakes: Mistakes, name: str, before: Comparison) -> bool:
        axis, t = self.table[name].axes.index("T"), before.worst_position
        rows = [np.take(array, t, axis) for array in (self.value(mistakes, name), self.expected[name])]
        got = np.take(np.asarray(self.run.taps[name]), t, axis)
        return _norm(got - rows[0]) <= FALLS_TO * _norm(got - rows[1])

    def _promises(self, mistakes: Mistakes, name: str, before: Comparison) -> bool:
        """Whether a pair takes away enough of the error to be worth measuring its noise."""
        if self.table[name].integer:
            return True
        try:
            value = self.value(mistakes, name)
        except (AssertionError, AttributeError, TypeError, ValueError):
            return False  # the first of the pair took away what the second is about, as no scaling its ramp
        left = np.asarray(self.run.taps[name]) - value
        return relative(left, self.expected[name]) <= FALLS_TO * max(before.local_error, self.profile.unit_roundoff)

    def _pairs(self, candidates: Sequence[Candidate]) -> list[Mistakes]:
        """Pairs of mistakes that each change this tap, those first that leave least alone."""
        ordered = sorted(candidates, key=lambda candidate: candidate.residual)
        pairs = ((a.mistakes[0], b.mistakes[0]) for a, b in itertools.combinations(ordered, 2))
        return list(itertools.islice(pairs, PAIRS))

    def _ranked(self, candidates: Sequence[Candidate], name: str, usual: float) -> list[Candidate]:
        """Those to be believed, by the share of other places explained too, then by what is left of the error.

        One that resembles the fault in this layer alone leaves more than noise, and is contradicted in others.
        """
        if not candidates:
            return []
        # places are those of all candidates: a mistake in q alone must also answer for a k that another one explains
        kinds = {kind_of(name), *(kind for c in candidates for mistake in c.mistakes for kind in mistake.taps)}
        places = _spread([place for place in self.run.taps if kind_of(place) in kinds and place in self.expected], name)
        checked = [self._with_other_places(candidate, places) for candidate in candidates]
        like_others = LIKE_OTHERS * max(usual, 1.0)
        credible = [c for c in checked if not c.contradicted or c.found.ratio <= like_others]
        return sorted(credible, key=lambda candidate: (-candidate.share, candidate.found.ratio))

    def _with_other_places(self, candidate: Candidate, places: Sequence[str]) -> Candidate:
        """How many of these taps are what the mistakes make of them."""
        explained = contradicted = 0
        for place in places:
            value, got = self.value(candidate.mistakes, place), np.asarray(self.run.taps[place])
            if self._compared(candidate.mistakes, place, value, got).allowed:
                explained += 1
            elif kind_of(place) == kind_of(places[0]):
                contradicted += not self._matches(place)
        return replace(candidate, explained=explained, of=len(places), contradicted=contradicted)

    def _matches(self, name: str) -> bool:
        """Whether the backend's tap is right without any mistake."""
        expected, got = self.expected[name], np.asarray(self.run.taps[name])
        if self.table[name].integer:
            return _compared_sets(expected, got).allowed
        axis = self.table[name].axes.index("T")
        return compare(expected, got, self.noisy[name], axis, self.profile.unit_roundoff).allowed

    def _described(
        self, ranked: list[Candidate], others: list[Candidate], before: Comparison, tried: int
    ) -> dict[str, Any]:
        best, *rest = ranked
        tied = [c for c in rest if c.share == best.share and c.found.ratio <= NEARLY_TIED * max(best.found.ratio, 1)]
        runner_up = next(iter([*rest, *others]), None)
        return {
            "id": best.id,
            "title": " and ".join(mistake.title for mistake in best.mistakes),
            "explanation": " ".join(mistake.explanation for mistake in best.mistakes),
            "residual_before": before.local_error,
            "residual_after": best.residual,
            "ratio_before": before.ratio,
            "ratio_after": best.found.ratio,
            "explained": {"taps": best.explained, "of": best.of},
            "ambiguous_with": [candidate.id for candidate in tied],
            "runner_up": None if runner_up is None else {"id": runner_up.id, "residual_after": runner_up.residual},
            "advice": " ".join(mistake.advice for mistake in best.mistakes),
            "sources": [source for mistake in best.mistakes for source in mistake.sources],
            "tried": tried,
        }


def together(mistakes: Mistakes) -> Any:
    """All of these mistakes, made one after the other."""

    def variant(recipe: Recipe) -> Recipe:
        for mistake in mistakes:
            recipe = mistake.variant(recipe)
        return recipe

    return variant


def _compared_sets(expected_TA: Array, got_TA: Array) -> Comparison:
    """Choices of experts as sets: explained if all but one in fifty are the mistake's."""
    differs_T = np.any(np.sort(expected_TA, axis=1) != np.sort(got_TA, axis=1), axis=1)
    share, t = float(differs_T.mean()), int(differs_T.argmax())
    worst = {"index": [t], "expected": expected_TA[t].tolist(), "got": got_TA[t].tolist()}
    ratio = share * 50 * ALLOWANCE
    return Comparison(share, 1 / (50 * ALLOWANCE), ratio, worst, t, 0)


def _rounded_either_way(value: Array, got: Array, grain: float) -> Array:
    """The value with a few elements moved to the backend's where they are one rounding step away.

    What float32 makes of a number halfway between two coarser ones may be on the other side of it.
    """
    off = np.abs(got - value)
    scale = np.abs(value).max(initial=0.0)
    moved = (off > 1e-5 * scale) & (off <= 4 * grain * np.maximum(np.abs(value), 1e-3 * scale))
    return np.where(moved, got, value) if moved.mean() <= FORGIVEN else value


def _spread(places: Sequence[str], first: str) -> list[str]:
    """At most LAYERS of each kind of tap, the first one's own among them."""
    kept: list[str] = []
    for _, group in itertools.groupby(sorted(places, key=kind_of), key=kind_of):
        members = sorted(group, key=places.index)
        step = max(1, -(-len(members) // LAYERS))
        kept += [place for place in members[::step] if place != first]
    return [first, *kept]


def _norm(array: Array) -> float:
    return float(np.linalg.norm(array.ravel()))
