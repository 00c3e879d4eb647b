"""Does the check find what it should? Every mistake made in a real backend, and what a golden could show at all."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from assay.golden.backends import open_backend
from assay.golden.check import check
from assay.golden.diagnose import together
from assay.golden.errors import GoldenError
from assay.golden.forced import forced_pass
from assay.golden.measure import ALLOWANCE, compare
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.injections import INJECTIONS, Injection
from assay.golden.mistakes.mistake import Mistake
from assay.golden.mistakes.replay import Replay, Run
from assay.golden.noise import PROFILES, Profile, profile_named
from assay.golden.record import record
from assay.golden.store import Golden
from assay.loaders.checkpoint import Checkpoint
from assay.reference.taps import default_taps, tap_table

MODES = ("float32", "bfloat16")
CLEARLY = 2.0  # times the allowance: what is nearer to it may go either way with the noise


@dataclass(frozen=True)
class Row:
    """What became of one injected mistake."""

    id: str
    found: bool
    tap: str | None
    right_tap: bool
    named: bool  # its id is the cause, or is listed as not to be told from the cause here
    cause: str | None
    ambiguous_with: list[str]
    ratio: float | None
    ratio_after: float | None
    runner_up: str | None


def good_prompt(checkpoint: Checkpoint, seed: int = 0) -> tuple[list[int], list[int]]:
    """Random tokens and chunks that most mistakes show on: past the window, a long, a single and a short chunk."""
    config = checkpoint.config
    windows = [window for i in range(config.num_hidden_layers) if (window := config.window(i)) is not None]
    T = max(40, min(300, 2 * max(windows, default=0) + 8))
    T = min(T, config.max_position_embeddings)
    first = T // 2
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, T).tolist()
    return tokens, [first, 1, T - first - 1]


def selftest(
    checkpoint: Checkpoint, mode: str = "float32", progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Inject every mistake that acts on the checkpoint into the Numba path and check it; the matrix as JSON.

    In mode bfloat16 every tap of the backend is kept in that format. Mistakes that are roundings to bfloat16 are
    left out there, and those that the prompt cannot show (see `coverage`) everywhere.
    """
    if mode not in MODES:
        raise GoldenError(f"selftest has no profile {mode!r}", expected=", ".join(MODES))
    profile = profile_named(mode)
    tokens, chunks = good_prompt(checkpoint)
    golden = record(checkpoint, open_backend("reference", checkpoint), tokens, chunks=chunks)
    visible = coverage(golden, checkpoint, profile)["visible"]
    rows = []
    for id in visible:
        if id in INJECTIONS and not (mode == "bfloat16" and CATALOGUE[id].grain):
            if progress is not None:
                progress(id)
            rows.append(_row(id, golden, checkpoint, profile))
    named, found = sum(row.named for row in rows), sum(row.found for row in rows)
    return {
        "profile": mode,
        "tokens": len(tokens),
        "chunks": chunks,
        "injected": len(rows),
        "found": found,
        "right_tap": sum(row.right_tap for row in rows),
        "named": named,
        "named_alone": sum(row.named and not row.ambiguous_with for row in rows),
        "clean": _clean(golden, checkpoint, profile),
        "rows": [asdict(row) for row in rows],
        "without_injection": sorted(id for id in visible if id not in INJECTIONS),
    }


def _clean(golden: Golden, checkpoint: Checkpoint, profile: Profile) -> str:
    """The verdict on the same backend without a mistake."""
    with Injection().backend(checkpoint, profile.name == "bfloat16") as backend:
        taps = backend.run(golden.provenance.tokens, golden.provenance.chunks, default_taps(checkpoint.config))
    return check(golden, checkpoint, taps, "cpu", profile).verdict


def _row(id: str, golden: Golden, checkpoint: Checkpoint, profile: Profile) -> Row:
    with INJECTIONS[id].backend(checkpoint, profile.name == "bfloat16") as backend:
        taps = backend.run(golden.provenance.tokens, golden.provenance.chunks, default_taps(checkpoint.config))
    report = check(golden, checkpoint, taps, "cpu", profile, strict=True)
    first, cause = report.first_divergence, report.cause
    named = cause is not None and id in (cause["id"], *cause["ambiguous_with"])
    return Row(
        id=id,
        found=first is not None,
        tap=None if first is None else first.tap,
        right_tap=first is not None and first.tap in _first_taps(id, golden, checkpoint, taps),
        named=named,
        cause=None if cause is None else cause["id"],
        ambiguous_with=[] if cause is None else cause["ambiguous_with"],
        ratio=None if first is None else first.ratio,
        ratio_after=None if cause is None else cause["ratio_after"],
        runner_up=None if cause is None or cause["runner_up"] is None else cause["runner_up"]["id"],
    )


def _first_taps(id: str, golden: Golden, checkpoint: Checkpoint, taps: Mapping[str, np.ndarray]) -> list[str]:
    """Where the mistake may first show: its own taps, or the first supplied one after each."""
    table = list(tap_table(checkpoint.config))
    places = [i for i, name in enumerate(table) if name.rsplit(".", 1)[-1] in CATALOGUE[id].taps]
    return [next(name for name in table[i:] if name in taps) for i in places]


def coverage(golden: Golden, checkpoint: Checkpoint, profile: Profile = PROFILES["float32"]) -> dict[str, Any]:
    """Which mistakes a golden's tokens and chunks can show above the profile's noise, and what would show the others.

    Every mistake that acts on the checkpoint is made at its own taps, from the golden's values, and measured.
    """
    tokens, chunks = golden.provenance.tokens, golden.provenance.chunks
    table = tap_table(checkpoint.config)
    names = list(table)
    exact = forced_pass(checkpoint, tokens, chunks, {}, names)
    noisy = forced_pass(checkpoint, tokens, chunks, exact, names, profile)
    run = Run(checkpoint, tokens, chunks, exact)
    acting = [mistake for mistake in CATALOGUE.values() if mistake.acts(checkpoint)]
    ratios = {mistake.id: _ratio(mistake, run, noisy, profile) for mistake in acting}
    visible = [id for id, ratio in ratios.items() if ratio > CLEARLY * ALLOWANCE]
    hidden = [mistake for mistake in acting if mistake.id not in visible]
    return {
        "tokens": len(tokens),
        "chunks": chunks,
        "visible": visible,
        "hidden": [_hidden(mistake, checkpoint) for mistake in hidden],
        "suggestion": _suggestion(hidden, checkpoint, len(tokens), chunks),
    }


def _ratio(mistake: Mistake, run: Run, noisy: Mapping[str, np.ndarray], profile: Profile) -> float:
    """The mistake's largest effect on its own taps, in multiples of the noise."""
    table, largest = tap_table(run.checkpoint.config), 0.0
    replay = Replay(run, together((mistake,)), PROFILES["float64"])
    for name, exact in run.taps.items():
        if name.rsplit(".", 1)[-1] not in mistake.taps:
            continue
        with np.errstate(all="ignore"):
            value = replay.value(name)
        if table[name].integer:
            largest = max(largest, float("inf") if (np.sort(value, 1) != np.sort(exact, 1)).any() else 0.0)
            continue
        found = compare(exact, value, noisy[name], table[name].axes.index("T"), profile.unit_roundoff)
        largest = max(largest, float("inf") if found.nonfinite else found.ratio)
    return largest


def _hidden(mistake: Mistake, checkpoint: Checkpoint) -> dict[str, Any]:
    needs = mistake.needs(checkpoint.config)
    return {"id": mistake.id, "needs": {"tokens": needs.tokens, "chunks": needs.chunks, "else": needs.else_}}


def _suggestion(hidden: list[Mistake], checkpoint: Checkpoint, T: int, chunks: list[int]) -> dict[str, Any] | None:
    """A length and chunks that would show more; None if more tokens and chunks would not help."""
    config = checkpoint.config
    needs = [mistake.needs(config) for mistake in hidden]
    wanted = [need.tokens for need in needs if T < need.tokens <= config.max_position_embeddings]
    more_chunks = len(chunks) < 2 and any(need.chunks > 1 for need in needs)
    other = sorted({need.else_ for need in needs if need.else_})
    if not wanted and not more_chunks and not other:
        return None
    length = max([T, 3, *wanted])
    first = length // 2
    return {"tokens": length, "chunks": [first, 1, length - first - 1] if more_chunks else chunks, "also": other}
