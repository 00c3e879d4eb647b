"""Does the check find what it should? Every mistake made in a real backend, checked and asked for its cause."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from assay.golden.backends import open_backend
from assay.golden.check import check, finite
from assay.golden.coverage import shown_by
from assay.golden.errors import GoldenError
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.injections import INJECTIONS, Injection
from assay.golden.noise import Profile, profile_named
from assay.golden.record import chosen_taps, record
from assay.golden.store import Golden
from assay.loaders.checkpoint import Checkpoint
from assay.reference.taps import kind_of, tap_table

MODES = ("float32", "bfloat16", "q8")
LONG = 300  # tokens of the prompt for what the usual one is too short for


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


def good_prompt(checkpoint: Checkpoint, seed: int = 0, least: int = 40) -> tuple[list[int], list[int]]:
    """Random tokens and chunks that most mistakes show on: past the window, a long, a single and a short chunk."""
    config = checkpoint.config
    windows = [window for i in range(config.num_hidden_layers) if (window := config.window(i)) is not None]
    T = max(least, min(LONG, 2 * max(windows, default=0) + 8))
    T = min(T, config.max_position_embeddings)
    first = T // 2
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, T).tolist()
    return tokens, [first, 1, T - first - 1]


def selftest(
    checkpoint: Checkpoint,
    mode: str = "float32",
    progress: Callable[[str], None] | None = None,
    only: Collection[str] | None = None,
    taps: str | None = None,
) -> dict[str, Any]:
    """Inject every mistake that acts on the checkpoint into the Numba path and check it; the matrix as JSON.

    In mode bfloat16 every tap of the backend is kept in that format; q8 is the backend's own mode. Mistakes that are
    roundings to bfloat16 are left out there, and those that no prompt here shows (`hidden`) everywhere. `only` are
    the ids to inject, `taps` globs of those that the backend hands over.
    """
    if mode not in MODES:
        raise GoldenError(f"selftest has no profile {mode!r}", expected=", ".join(MODES))
    profile = profile_named(mode)
    golden = _golden(checkpoint, good_prompt(checkpoint))
    acting = [m for m in CATALOGUE.values() if m.acts(checkpoint) and (only is None or m.id in only)]
    visible = shown_by(golden, checkpoint, acting, profile)
    prompts = dict.fromkeys(visible, golden)
    if any(len(golden.provenance.tokens) < m.needs(checkpoint.config).tokens <= LONG for m in acting):
        longer = _golden(checkpoint, good_prompt(checkpoint, least=LONG))
        rest = [mistake for mistake in acting if mistake.id not in visible]
        prompts |= dict.fromkeys(shown_by(longer, checkpoint, rest, profile), longer)
    names = chosen_taps(checkpoint.config, taps)
    rows = []
    for id, prompt in prompts.items():
        if id in INJECTIONS and not (mode == "bfloat16" and CATALOGUE[id].grain):
            if progress is not None:
                progress(id)
            rows.append(_row(id, prompt, checkpoint, profile, names))
    named, found = sum(row.named for row in rows), sum(row.found for row in rows)
    return {
        "profile": mode,
        "tokens": len(golden.provenance.tokens),
        "chunks": golden.provenance.chunks,
        "injected": len(rows),
        "found": found,
        "right_tap": sum(row.right_tap for row in rows),
        "named": named,
        "named_alone": sum(row.named and not row.ambiguous_with for row in rows),
        "clean": _clean(golden, checkpoint, profile, names),
        "rows": [finite(asdict(row)) for row in rows],
        "hidden": [mistake.id for mistake in acting if mistake.id not in prompts],
        "without_injection": sorted(id for id in prompts if id not in INJECTIONS),
    }


def _golden(checkpoint: Checkpoint, prompt: tuple[list[int], list[int]]) -> Golden:
    tokens, chunks = prompt
    return record(checkpoint, open_backend("reference", checkpoint), tokens, chunks=chunks)


def _clean(golden: Golden, checkpoint: Checkpoint, profile: Profile, names: Collection[str]) -> str:
    """The verdict on the same backend without a mistake."""
    with Injection().backend(checkpoint, profile.name) as backend:
        taps = backend.run(golden.provenance.tokens, golden.provenance.chunks, names)
    return check(golden, checkpoint, taps, "cpu", profile, reach_work=0).verdict


def _row(id: str, golden: Golden, checkpoint: Checkpoint, profile: Profile, names: Collection[str]) -> Row:
    with INJECTIONS[id].backend(checkpoint, profile.name) as backend:
        taps = backend.run(golden.provenance.tokens, golden.provenance.chunks, names)
    report = check(golden, checkpoint, taps, "cpu", profile, strict=True, reach_work=0)
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
    places = [i for i, name in enumerate(table) if kind_of(name) in CATALOGUE[id].taps]
    return [next(name for name in table[i:] if name in taps) for i in places]
