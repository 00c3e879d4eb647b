"""Record a golden: the taps of a backend, by default the oracle, for given tokens."""

import fnmatch
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from assay.golden.backends import Backend, Progress
from assay.golden.errors import GoldenError
from assay.golden.store import Golden, Provenance
from assay.loaders.checkpoint import Checkpoint, open_checkpoint
from assay.reference.config import Config, GptOssConfig
from assay.reference.taps import default_taps, kind_of, tap_table


def chosen_taps(config: Config, pattern: str | None) -> list[str]:
    """The taps that a comma-separated list of globs names (`layers.0.*,logits`), in order; None: the default ones."""
    if pattern is None:
        return default_taps(config)
    globs = [glob.strip() for glob in pattern.split(",") if glob.strip()]
    names = [name for name in tap_table(config) if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
    if not names:
        raise GoldenError(
            f"no tap is named {pattern!r}", expected="embed, layers.0.q_rope, layers.*.attn_*, logits, ..."
        )
    return names


def split_into_chunks(T: int, lengths: Collection[int] | None) -> list[int]:
    """Chunk lengths that add up to T: the given ones, the last of them repeated as often as needed."""
    if lengths is None:
        return [T]
    if not lengths or any(n < 1 for n in lengths):
        raise GoldenError("chunk lengths must be positive", got=list(lengths))
    chunks: list[int] = []
    queue = list(lengths)
    while (left := T - sum(chunks)) > 0:
        length = queue.pop(0) if len(queue) > 1 else queue[0]
        chunks.append(min(length, left))
    return chunks


def validated_tokens(tokens: Collection[int], config: Config) -> list[int]:
    """The tokens themselves, if there are any and the vocabulary has all of them."""
    tokens = list(tokens)
    if not tokens:
        raise GoldenError("there are no tokens to run")
    if wrong := [t for t in tokens if not 0 <= t < config.vocab_size]:
        raise GoldenError("token outside the vocabulary", expected=f"0 to {config.vocab_size - 1}", got=wrong[0])
    if len(tokens) > config.max_position_embeddings:
        raise GoldenError("too many tokens", expected=f"at most {config.max_position_embeddings}", got=len(tokens))
    return tokens


def record(
    checkpoint: Checkpoint,
    backend: Backend,
    tokens: Collection[int],
    *,
    chunks: Collection[int] | None = None,
    taps: str | None = None,
    beside: Path | None = None,
    progress: Progress = None,
) -> Golden:
    """Run tokens through a backend and keep its taps; `beside` is the folder that the golden will lie in."""
    tokens = validated_tokens(tokens, checkpoint.config)
    lengths = split_into_chunks(len(tokens), chunks)
    names = chosen_taps(checkpoint.config, taps)
    observed = coverage_taps(checkpoint.config)
    values = backend.run(tokens, lengths, {*names, *observed}, progress)
    provenance = Provenance(
        tokens=tokens,
        chunks=lengths,
        config_sha256=checkpoint.config_sha256,
        weights_sha256=checkpoint.weights_sha256,
        checkpoint=os.path.relpath(checkpoint.path.resolve(), (beside or Path.cwd()).resolve()),
        backend=backend.name,
        profile=backend.profile,
        versions=dict(backend.versions),
        taps=[name for name in names if name in values],
        coverage=coverage(checkpoint.config, len(tokens), {name: values[name] for name in observed if name in values}),
    )
    return Golden(provenance, {name: values[name] for name in provenance.taps})


def checkpoint_of(golden: Golden | None, model: Path | None) -> Checkpoint | None:
    """The checkpoint given, or the one that the golden's record of it leads to; None if there is none any more."""
    if model is not None:
        return open_checkpoint(model)
    if golden is None or golden.path is None:
        return None
    recorded = golden.path.parent / golden.provenance.checkpoint
    return open_checkpoint(recorded) if recorded.exists() else None


def coverage_taps(config: Config) -> list[str]:
    """The taps that coverage is counted on."""
    kinds = ("expert_gate", "expert_up", "router_logits")
    return [name for name in tap_table(config) if kind_of(name) in kinds]


def coverage(config: Config, T: int, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the tokens exercise: a mistake in a part that they never reach cannot show."""
    windows = [window for i in range(config.num_hidden_layers) if (window := config.window(i)) is not None]
    covered: dict[str, Any] = {
        "longest_position": T - 1,
        "keys_excluded_by_window": sum(max(0, t + 1 - window) for window in windows for t in range(T)),
    }
    if not isinstance(config, GptOssConfig) or not values:
        return covered

    def each(kind: str) -> list[np.ndarray]:
        return [array for name, array in values.items() if name.endswith(kind)]

    limit, A = config.swiglu_limit, config.num_experts_per_tok
    above: Callable[[np.ndarray], int] = lambda array: int(np.sum(array > limit))  # noqa: E731
    covered["clamped_gates"] = sum(above(gate) for gate in each("expert_gate"))
    covered["clamped_ups"] = sum(above(np.abs(up)) for up in each("expert_up"))
    if config.num_local_experts > A:
        ordered = [np.sort(logits, axis=1)[:, ::-1] for logits in each("router_logits")]
        covered["smallest_router_margin"] = float(min(np.min(o[:, A - 1] - o[:, A]) for o in ordered))
    return covered
