"""What could a golden show at all? Which known mistakes its tokens reveal, and tokens that would reveal more."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from assay.golden.backends import open_backend
from assay.golden.diagnose import together
from assay.golden.forced import forced_pass
from assay.golden.measure import ALLOWANCE, compare
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.mistake import Mistake
from assay.golden.mistakes.replay import Replay, Run
from assay.golden.noise import PROFILES, Profile
from assay.golden.record import record
from assay.golden.store import Golden
from assay.loaders.checkpoint import Checkpoint
from assay.reference.taps import kind_of, tap_table

CLEARLY = 2.0  # times the allowance: what is nearer to it may go either way with the noise
LONGEST = 600  # tokens that are suggested: a mistake that needs more is listed with how many
ROWS_AT_A_TIME = 16384


def coverage(golden: Golden, checkpoint: Checkpoint, profile: Profile = PROFILES["float32"]) -> dict[str, Any]:
    """Which mistakes a golden's tokens and chunks can show above the profile's noise, and what would show the others.

    Every mistake that acts on the checkpoint is made at its own taps, from the golden's values, and measured. The
    tokens suggested were tried: `shows` lists what they add.
    """
    tokens, chunks = golden.provenance.tokens, golden.provenance.chunks
    acting = [mistake for mistake in CATALOGUE.values() if mistake.acts(checkpoint)]
    visible = shown_by(golden, checkpoint, acting, profile)
    hidden = [mistake for mistake in acting if mistake.id not in visible]
    return {
        "tokens": len(tokens),
        "chunks": chunks,
        "visible": visible,
        "hidden": [_hidden(mistake, checkpoint) for mistake in hidden],
        "suggestion": _suggestion(hidden, checkpoint, tokens, chunks, profile) if hidden else None,
    }


def shown_by(golden: Golden, checkpoint: Checkpoint, mistakes: Iterable[Mistake], profile: Profile) -> list[str]:
    """Ids of those mistakes whose effect on the golden's tokens is clearly above the noise."""
    tokens, chunks = golden.provenance.tokens, golden.provenance.chunks
    names = list(tap_table(checkpoint.config))
    exact = forced_pass(checkpoint, tokens, chunks, {}, names)
    noisy = forced_pass(checkpoint, tokens, chunks, exact, names, profile)
    run = Run(checkpoint, tokens, chunks, exact)
    return [mistake.id for mistake in mistakes if _ratio(mistake, run, noisy, profile) > CLEARLY * ALLOWANCE]


def _ratio(mistake: Mistake, run: Run, noisy: Mapping[str, np.ndarray], profile: Profile) -> float:
    """The mistake's largest effect on its own taps, in multiples of the noise."""
    replay = Replay(run, together((mistake,)), PROFILES["float64"])
    places = [name for name in run.taps if kind_of(name) in mistake.taps]
    return max((effect(replay, name, run.taps[name], noisy[name], profile)[1] for name in places), default=0.0)


def effect(
    replay: Replay, name: str, exact: np.ndarray, noisy: np.ndarray, profile: Profile
) -> tuple[np.ndarray, float]:
    """A tap as a replay has it, and how far that is from the oracle's value, in multiples of the noise."""
    spec = tap_table(replay.run.checkpoint.config)[name]
    with np.errstate(all="ignore"):
        value = replay.value(name)
    if spec.integer:
        return value, float("inf") if (np.sort(value, 1) != np.sort(exact, 1)).any() else 0.0
    found = compare(exact, value, noisy, spec.axes.index("T"), profile.unit_roundoff)
    return value, float("inf") if found.nonfinite else found.ratio


def _hidden(mistake: Mistake, checkpoint: Checkpoint) -> dict[str, Any]:
    needs = mistake.needs(checkpoint.config)
    return {"id": mistake.id, "needs": {"tokens": needs.tokens, "chunks": needs.chunks, "else": needs.else_}}


def _suggestion(
    hidden: list[Mistake], checkpoint: Checkpoint, tokens: list[int], chunks: list[int], profile: Profile
) -> dict[str, Any] | None:
    """Tokens that begin with these and show more, with the mistakes that they were seen to show; None if none do."""
    longer, split = _longer(hidden, checkpoint, tokens, chunks)
    if (longer, split) == (tokens, chunks):
        return None
    golden = record(checkpoint, open_backend("reference", checkpoint), longer, chunks=split, taps="logits")
    shows = shown_by(golden, checkpoint, hidden, profile)
    return {"length": len(longer), "tokens": longer, "chunks": split, "shows": shows} if shows else None


def _longer(
    hidden: list[Mistake], checkpoint: Checkpoint, tokens: list[int], chunks: list[int]
) -> tuple[list[int], list[int]]:
    """The tokens, more behind them as the hidden mistakes need, and chunks that end where something begins."""
    config, T = checkpoint.config, len(tokens)
    needs = [mistake.needs(config) for mistake in hidden]
    most = min(LONGEST, config.max_position_embeddings)
    length = max([T, 3, *(need.tokens for need in needs if need.tokens <= most)])
    rare = [need.else_ for need in needs if need.else_]
    if rare:  # rare values: more tokens, and the one whose embedding is smallest
        length = max(length, min(2 * T, T + 64), min(40, most))
    length = min(length, most)
    drawn = np.random.default_rng(T).integers(0, config.vocab_size, length).tolist()
    longer = tokens + drawn[T:]
    if rare and length > T:
        longer[-1] = _smallest_embedding(checkpoint)
    if len(chunks) > 1 and length == T:
        return longer, chunks
    first = length // 2
    return longer, [first, 1, length - first - 1]


def _smallest_embedding(checkpoint: Checkpoint) -> int:
    """The token whose row of the embedding is the shortest vector: where a norm's epsilon counts most."""
    tensor, V = checkpoint.tensors["model.embed_tokens.weight"], checkpoint.config.vocab_size
    pieces = [tensor[v : v + ROWS_AT_A_TIME].decode() for v in range(0, V, ROWS_AT_A_TIME)]
    return int(np.argmin(np.concatenate([np.linalg.norm(piece, axis=1) for piece in pieces])))
