"""The check: is each of a backend's taps what the oracle computes from the backend's own earlier taps?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from assay.golden.backends import Progress
from assay.golden.deviations import Deviations
from assay.golden.diagnose import Diagnosis, Search
from assay.golden.errors import GoldenError
from assay.golden.forced import forced_pass, nearly_tied, noisy_pass
from assay.golden.measure import ALLOWANCE, Comparison, compare, logit_view, relative
from assay.golden.mistakes.replay import Run
from assay.golden.noise import Profile
from assay.golden.reach import WORK, reach
from assay.golden.record import validated_tokens
from assay.golden.routing import Followed, compare_ids, routing_view
from assay.golden.spans import spanned, unchecked
from assay.golden.store import WEIGHTS, Golden
from assay.golden.structure import describe_tap
from assay.golden.supplied import Supplied, by_id, require_numbers, supplied
from assay.golden.weights import WeightFault, compare_weights, weights_among, weights_cause
from assay.loaders.checkpoint import Checkpoint
from assay.reference.taps import TapSpec, kind_of, tap_table

# handed each tap as it is judged: its name, expected, got, noisy (None where only the golden is at hand)
Observer = Callable[[str, np.ndarray, np.ndarray, np.ndarray | None], None] | None

SCHEMA = 1  # of the report as JSON: docs/report.schema.json
EXPERT_ROWS = ("expert_weights", "expert_gate", "expert_up", "expert_act", "expert_out")
END_TO_END_ALLOWANCE = 100.0  # multiples of the unit roundoff, where only the golden is at hand


@dataclass
class TapResult:
    """One row of the report; errors are relative, None where they cannot be known."""

    tap: str
    local_error: float | None
    inherited_error: float | None
    noise: float | None
    ratio: float | None
    verdict: str
    worst: dict[str, Any] | None
    worst_position: int | None = None
    nonfinite: int = 0
    positions: list[int] | None = None  # those compared, where the backend did not compute all
    spans: list[str] = field(default_factory=list)  # steps judged together with this one: their taps were not supplied

    @property
    def detectable(self) -> float | None:
        """The relative error from which this tap diverges; larger, the more steps are judged together."""
        return None if self.noise is None or self.local_error is None else ALLOWANCE * self.noise


@dataclass
class Report:
    """What a check found; `as_json` is the documented form (docs/report.md)."""

    verdict: str
    scope: str  # "forced": local errors; "end-to-end": golden alone
    backend: str
    profile: str
    taps: list[TapResult]
    not_supplied: list[str]
    logits: dict[str, float] | None
    routing: dict[str, Any] | None
    structure: dict[str, Any] | None = None
    cause: dict[str, Any] | None = None
    untried: int = 0  # mistakes that the search for the cause did not come to
    deviations: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    weights: dict[str, Any] | None = None  # how many were compared, and which differ; None where none were supplied
    not_checked: list[str] = field(default_factory=list)  # of those not supplied, what no comparison covers
    ignored: list[str] = field(default_factory=list)  # handed over under names that are none of this model's taps
    reach: dict[str, Any] | None = None  # which known mistakes the taps can show; None where all were supplied
    versions: dict[str, str] = field(default_factory=dict)  # of the backend and what it stands on, where it says

    @property
    def first_divergence(self) -> TapResult | None:
        """The first tap, in the order of computation, that is out of its allowance."""
        return next((result for result in self.taps if result.verdict == "diverges"), None)

    def as_json(self) -> dict[str, Any]:
        """A JSON object; numbers that are not finite become null."""
        first = self.first_divergence
        keys = ("tap", "local_error", "inherited_error", "noise", "ratio", "worst_position", "worst")
        report = {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "reason": self.reason,
            "scope": self.scope,
            "backend": self.backend,
            "profile": self.profile,
            "versions": self.versions,
            "allowance": ALLOWANCE if self.scope == "forced" else END_TO_END_ALLOWANCE,
            "first_divergence": None if first is None else {key: getattr(first, key) for key in keys},
            "cause": self.cause,
            "untried": self.untried,
            "structure": self.structure,
            "deviations": self.deviations,
            "logits": self.logits,
            "routing": self.routing,
            "taps": [{**vars(result), "detectable": result.detectable} for result in self.taps],
            "not_supplied": self.not_supplied,
            "not_checked": self.not_checked,
            "ignored": self.ignored,
            "reach": self.reach,
            "weights": self.weights,
        }
        return finite(report)


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def check(
    golden: Golden,
    checkpoint: Checkpoint | None,
    taps: Mapping[str, np.ndarray],
    backend: str,
    profile: Profile,
    progress: Progress = None,
    search: Search = None,
    *,
    strict: bool = False,
    observe: Observer = None,
    reach_work: float = WORK,
) -> Report:
    """Check a backend's taps against a golden: tap by tap with the checkpoint, end to end without.

    The profile's known deviations are accepted and listed, unless `strict`. `observe` sees the tensors compared.
    `search` hears how many mistakes were tried, of how many, in the search for a cause.
    Where taps are missing, what the others can show is tried until `reach_work` is done.

    Raises GoldenError if the golden is of another checkpoint, or a tap has a shape that cannot be its own.
    """
    if checkpoint is None:
        return _check_end_to_end(golden, taps, backend, profile, observe)
    require_same_checkpoint(golden, checkpoint)
    table = tap_table(checkpoint.config)
    weights = weights_among(taps)
    ignored = [name for name in taps if name not in table and not name.startswith(WEIGHTS)]
    faults = compare_weights(checkpoint, weights, profile)
    given = supplied(taps, golden, checkpoint.config)
    if not given.taps and not weights:
        report = _incomparable(golden, backend, profile, "the backend supplied none of the taps of this model")
        return replace(report, ignored=ignored)
    tokens, chunks = golden.provenance.tokens, golden.provenance.chunks
    names = {*given.taps, *(name for name in table if name.endswith("router_logits"))}
    expected = forced_pass(checkpoint, tokens, chunks, given.taps, names, progress=progress)
    taps = given.filled(expected)
    noisy = noisy_pass(checkpoint, tokens, chunks, taps, expected, profile, progress)
    followed = Followed(open_choices=sum(int(t.sum()) for t in nearly_tied(checkpoint, taps, expected, noisy).values()))
    diagnosis = Diagnosis(Run(checkpoint, tokens, chunks, taps, given.rows), expected, noisy, profile)
    deviations = Deviations(diagnosis, () if strict else profile.deviations, _oracle_s_logits(golden))
    results: list[TapResult] = []
    first: tuple[str, Comparison] | None = None
    for name in taps:
        found = _compared(name, table[name], given, expected, taps, noisy, profile, followed)
        left = None if found.allowed else deviations.explain(name)
        if first is None and not found.allowed and left is None:
            first = name, found
        verdict = "match" if found.allowed else "diverges" if left is None else "known-deviation"
        result = _result(name, found, _inherited(name, table[name], given, expected, golden, taps), verdict)
        result.positions = given.rows[name].tolist() if name in given.rows else None
        result.spans = spanned(name, checkpoint.config, taps)
        results.append(result)
        if observe is not None:
            observe(name, expected[name], taps[name], noisy[name])
    structure = cause = None
    if faults:  # what is computed from wrong weights needs no other cause
        cause, structure = weights_cause(checkpoint, weights, faults, profile)
    elif first is not None:
        matching = [result.ratio for result in results if result.verdict == "match" and result.ratio is not None]
        cause = diagnosis.cause(*first, max(matching, default=ALLOWANCE), search)
        structure = describe_tap(first[0], diagnosis.run, expected, noisy, profile)
    return Report(
        verdict="diverges" if first or faults else "known-deviation" if deviations.seen else "match",
        scope="forced",
        backend=backend,
        profile=profile.name,
        taps=[*(_weight_result(fault, profile) for fault in faults), *results],
        not_supplied=[name for name in table if name not in taps and not table[name].heavy],
        logits=_logits(golden, taps, given.rows.get("logits")),
        routing=routing_view(golden.taps, taps, followed),
        structure=structure,
        cause=cause,
        untried=diagnosis.untried,
        deviations=deviations.listed(),
        weights={"compared": len(weights), "differing": [fault.name for fault in faults]} if weights else None,
        not_checked=unchecked(checkpoint.config, taps),
        ignored=ignored,
        reach=reach(diagnosis.run, expected, noisy, profile, reach_work) if reach_work and taps else None,
    )


def _oracle_s_logits(golden: Golden) -> np.ndarray | None:
    """What the golden has of the oracle in float64."""
    ours = (golden.provenance.backend, golden.provenance.profile) == ("reference", "float64")
    return np.asarray(golden.taps["logits"]) if ours and "logits" in golden.taps else None


def _compared(
    name: str,
    spec: TapSpec,
    given: Supplied,
    expected: Mapping[str, np.ndarray],
    taps: Mapping[str, np.ndarray],
    noisy: Mapping[str, np.ndarray],
    profile: Profile,
    followed: Followed,
) -> Comparison:
    """The comparison of one tap, of the positions that the backend computed; indices count all positions."""
    ours, theirs, noise = (given.of_backend(name, values[name]) for values in (expected, taps, noisy))
    if spec.integer:
        logits_name = name.replace("expert_ids", "router_logits")
        handed_on = given.of_backend(name, taps.get(logits_name, expected[logits_name]))
        spread = 0.0 if logits_name in taps else float(np.std(noisy[logits_name] - expected[logits_name]))
        found = compare_ids(ours, theirs, handed_on, spread, followed)
    else:
        found = compare(ours, theirs, noise, spec.axes.index("T"), profile.unit_roundoff)
    if name not in given.rows:
        return found
    positions, index = given.rows[name], found.worst["index"]
    worst = {**found.worst, "index": [int(positions[index[0]]), *index[1:]]}
    return replace(found, worst=worst, worst_position=int(positions[found.worst_position]))


def _result(name: str, found: Comparison, inherited: float | None, verdict: str) -> TapResult:
    return TapResult(
        tap=name,
        local_error=found.local_error,
        inherited_error=inherited,
        noise=found.noise,
        ratio=found.ratio,
        verdict=verdict,
        worst=found.worst,
        worst_position=found.worst_position,
        nonfinite=found.nonfinite,
    )


def _weight_result(fault: WeightFault, profile: Profile) -> TapResult:
    noise = profile.unit_roundoff
    name, ratio = WEIGHTS + fault.name, fault.error / noise
    return TapResult(name, fault.error, None, noise, ratio, "diverges", fault.worst, None, fault.nonfinite)


def _inherited(
    name: str,
    spec: TapSpec,
    given: Supplied,
    expected: Mapping[str, np.ndarray],
    golden: Golden,
    taps: Mapping[str, np.ndarray],
) -> float | None:
    """How far a faultless step from the backend's inputs already is from the golden.

    Rows of experts are compared for the tokens that chose the same ones, each expert with itself.
    """
    if name not in golden.taps or spec.integer:
        return None
    ours, theirs = (given.of_backend(name, np.asarray(values[name])) for values in (expected, golden.taps))
    if "A" in spec.axes:
        ids = f"{name.rsplit('.', 1)[0]}.expert_ids"
        if ids not in golden.taps or ids not in taps:
            return None
        our_ids, their_ids = (given.of_backend(name, values[ids]) for values in (taps, golden.taps))
        ours, theirs = _same_experts(ours, our_ids, theirs, their_ids)
    return relative(ours - theirs, theirs)


def _same_experts(a_TA: np.ndarray, a_ids: np.ndarray, b_TA: np.ndarray, b_ids: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows of the tokens that chose the same experts in both, in the order of the experts' ids."""
    same_T = np.all(np.sort(a_ids, axis=1) == np.sort(b_ids, axis=1), axis=1)
    return by_id(a_TA[same_T], a_ids[same_T]), by_id(b_TA[same_T], b_ids[same_T])


def _check_end_to_end(
    golden: Golden, taps: Mapping[str, np.ndarray], backend: str, profile: Profile, observe: Observer
) -> Report:
    """Compare with the golden's own values: without the checkpoint, what is local and what inherited is unknown."""
    recorded = golden.provenance.taps  # in the order of computation, which a file does not keep
    shared = [name for name in recorded if name in taps]
    if not shared:
        return _incomparable(golden, backend, profile, "the golden and the backend have no tap in common")
    results = []
    for name in shared:
        ours, theirs = golden.taps[name], np.asarray(taps[name])
        if np.issubdtype(ours.dtype, np.integer):
            continue  # expert ids: a choice may legally differ here, see `routing`
        require_numbers(name, theirs)
        if ours.shape != theirs.shape:
            raise GoldenError(f"tap {name!r} has the wrong shape", expected=list(ours.shape), got=list(theirs.shape))
        ids = name.rsplit(".", 1)[0] + ".expert_ids"
        if ids != name and ids in taps and ids in golden.taps and kind_of(name) in EXPERT_ROWS:
            ours, theirs = _same_experts(ours, golden.taps[ids], theirs, np.asarray(taps[ids]).astype(np.int64))
        error, noise = relative(theirs.astype(np.float64) - ours, ours), profile.unit_roundoff
        nonfinite = int(theirs.size - np.count_nonzero(np.isfinite(theirs)))
        good = nonfinite == 0 and error <= END_TO_END_ALLOWANCE * noise
        verdict = "match" if good else "diverges"
        results.append(TapResult(name, None, error, noise, error / noise, verdict, None, None, nonfinite))
        if observe is not None:
            observe(name, ours, theirs, None)
    return Report(
        verdict="diverges" if any(r.verdict == "diverges" for r in results) else "match",
        scope="end-to-end",
        backend=backend,
        profile=profile.name,
        taps=results,
        not_supplied=[name for name in recorded if name not in taps],
        logits=_logits(golden, taps),
        routing=routing_view(golden.taps, taps),
        reason="no checkpoint at hand: errors are end to end, and local and inherited error cannot be told apart",
    )


def _incomparable(golden: Golden, backend: str, profile: Profile, reason: str) -> Report:
    return Report(
        "incomparable", "forced", backend, profile.name, [], golden.provenance.taps, None, None, reason=reason
    )


def incomparable_tokens(golden: Golden, tokens: list[int], backend: str, profile: Profile) -> Report | None:
    """A report if a backend ran other tokens than the golden's: nothing numeric means anything then."""
    ours = golden.provenance.tokens
    if tokens == ours:
        return None
    at = next((i for i, (a, b) in enumerate(zip(ours, tokens, strict=False)) if a != b), min(len(ours), len(tokens)))
    reason = (
        f"the backend ran other tokens: {len(ours)} in the golden, {len(tokens)} in the dump, first difference at "
        f"position {at} (golden {ours[at : at + 4]}, dump {tokens[at : at + 4]}){_moved(ours, tokens)}"
    )
    return _incomparable(golden, backend, profile, reason)


def _moved(ours: list[int], theirs: list[int]) -> str:
    """In words, that one side has a few tokens more in front or behind: a begin-of-sequence token, a template."""
    for a, b, who, other in ((theirs, ours, "dump", "golden"), (ours, theirs, "golden", "dump")):
        more = len(a) - len(b)
        if more > 0 and a[more:] == b:
            twice = " (the same twice: a begin-of-sequence token added again)" if more == 1 and a[0] == b[0] else ""
            return f": the {who} has {a[:more]} in front of what the {other} has{twice}"
        if more > 0 and a[: len(b)] == b:
            return f": the {who} goes on where the {other} ends"
    return ""


def require_same_checkpoint(golden: Golden, checkpoint: Checkpoint) -> None:
    """Refuse a golden that was recorded from another config or other weights."""
    for what in ("config", "weights"):
        ours, theirs = getattr(golden.provenance, f"{what}_sha256"), getattr(checkpoint, f"{what}_sha256")
        if ours != theirs:
            raise GoldenError(
                f"the golden was recorded from another checkpoint: its {what} differ",
                where=golden.path,
                expected=f"{what} sha256 {ours}",
                got=f"{theirs} ({checkpoint.path})",
                remedy="give the golden's own checkpoint with --model, or record a new golden",
            )
    validated_tokens(golden.provenance.tokens, checkpoint.config)


def _logits(
    golden: Golden, taps: Mapping[str, np.ndarray], positions: np.ndarray | None = None
) -> dict[str, float] | None:
    if "logits" not in golden.taps or "logits" not in taps:
        return None
    ours = golden.taps["logits"]
    theirs = np.asarray(taps["logits"]).reshape(ours.shape)
    return logit_view(ours, theirs) if positions is None else logit_view(ours[positions], theirs[positions])
