"""Clean backends over many (checkpoint, prompt, profile, chunking) combinations: no false alarm, and how near to one.

    python -m tests.golden.clean_sweep [FOLDER] [--backend NAME]

Each is checked with all its taps, as its profile has it by design; some also with block_out or logits alone. Needs
the peers, and ASSAY_LLAMA_CPP. Prints the largest ratio of every profile, the tap it was at, and every combination
that alarmed; exits with 1 if there is one. Checkpoints are made in FOLDER and kept there.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from assay.golden.backends import open_backend
from assay.golden.check import Report, check
from assay.golden.noise import profile_named
from assay.golden.record import record
from assay.loaders import open_checkpoint
from assay.reference.taps import default_taps
from tests import tiny
from tests.checkpoint_files import CHECKPOINTS
from tests.golden.injection import random_tokens

GPT_OSS = {
    "oss-a": {"seed": 1},
    "oss-b": {"seed": 2, "head_dim": 64, "num_experts_per_tok": 4, "num_local_experts": 8, "num_hidden_layers": 2},
    "oss-c": {"seed": 3, "num_key_value_heads": 1, "hidden_size": 96, "num_hidden_layers": 2},
}
LLAMA = {"llama": "llama", "mistral": "mistral"}
PROMPTS = ((1, None), (9, [1]), (13, [12, 1]), (48, None), (60, [20, 1, 39]), (130, [65]))
WITH_FEW_TAPS = (48, 60)  # tokens of the prompts that are also checked by one tap a layer, and by the logits alone
OUTTYPES = ("bf16", "f16", "f32", "Q8_0", "Q4_0", "Q4_1")
MLX = ("gpt_oss/mlx", "gpt_oss/mlx-q8", "llama/mlx-4bit")


class Subject(NamedTuple):
    """A backend in a mode with a checkpoint that it loads."""

    path: Path
    backend: str
    mode: str


def subjects(root: Path) -> Iterator[Subject]:
    """Every checkpoint in every container that some backend reads, made when it is not there yet."""
    both = ("float32", "bfloat16")
    for name, settings in (*GPT_OSS.items(), *((name, None) for name in LLAMA)):
        directory = root / name
        if not directory.exists():
            if settings is not None:
                tiny.make_gpt_oss(directory, **settings)
            else:
                tiny.make_llama(directory, seed=4, architecture=LLAMA[name])
        # mlx-lm ignores Mistral's window: there it is wrong, and not by design
        peers = ("transformers", "metal") if name == "mistral" else ("transformers", "metal", "mlx-lm")
        yield from (Subject(directory, backend, mode) for backend in peers for mode in both)
        if settings is not None:
            yield from (Subject(directory, "openai-torch", mode) for mode in both)
        yield from (Subject(directory, "cpu", mode) for mode in ("exact", "q8"))
        for outtype in ("bf16", "Q8_0") if settings is not None else OUTTYPES:
            path = _gguf(root, directory, outtype)
            yield from (Subject(path, "llama.cpp", mode) for mode in ("default", "float32"))
            if outtype.startswith("Q"):
                yield Subject(path, "cpu", "q8")
    for name in MLX:
        yield from (Subject(CHECKPOINTS / name, backend, mode) for backend in ("mlx-lm", "metal") for mode in both)


def _gguf(root: Path, directory: Path, outtype: str) -> Path:
    path = root / f"{directory.name}.{outtype}.gguf"
    if path.exists():
        return path
    if outtype in ("bf16", "f16", "f32") or "oss" in directory.name:
        return tiny.to_gguf(directory, path, outtype=outtype.lower())
    return tiny.quantize_gguf(_gguf(root, directory, "f32"), path, outtype)


def few(taps: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """The taps of one kind."""
    return {name: array for name, array in taps.items() if name.rsplit(".", 1)[-1] == kind}


class Tally:
    """The largest ratio by backend, profile and taps supplied, where it was, and the alarms."""

    def __init__(self) -> None:
        self.largest: dict[str, tuple[float, str]] = {}
        self.combinations = self.alarms = 0

    def note(self, subject: Subject, tokens: int, chunks: list[int] | None, supplied: str, report: Report) -> None:
        self.combinations += 1
        judged = [result for result in report.taps if result.verdict != "known-deviation"]
        ratio, tap = max(((result.ratio or 0.0, result.tap) for result in judged), default=(0.0, "none"))
        label = f"{subject.path.parent.name}/{subject.path.name}, {tokens} tokens, chunks {chunks}, {tap}"
        key = f"{subject.backend:13}{report.profile:24}{supplied:10}"
        self.largest[key] = max(self.largest.get(key, (0.0, label)), (ratio, label))
        if report.verdict not in ("match", "known-deviation"):
            self.alarms += 1
            first = report.first_divergence
            where = "" if first is None else f"{first.tap} {first.ratio:.2f}"
            print(f"{report.verdict}: {subject.backend} {subject.mode}, {supplied}, {label}: {where}", flush=True)

    def print(self) -> None:
        for key, (ratio, label) in sorted(self.largest.items()):
            print(f"{key} {ratio:6.2f} x its noise at the most: {label}")
        print(f"{self.combinations} combinations, {self.alarms} false alarms", flush=True)


def sweep(root: Path, only: str | None = None) -> Tally:
    """Run all combinations, or one backend's."""
    tally = Tally()
    for subject in subjects(root):
        if only not in (None, subject.backend):
            continue
        checkpoint = open_checkpoint(subject.path)
        backend = open_backend(subject.backend, checkpoint, subject.mode)
        profile, V = profile_named(backend.profile), checkpoint.config.vocab_size
        for T, chunks in PROMPTS:
            tokens = [token % V for token in random_tokens(T, seed=T)]
            golden = record(checkpoint, open_backend("reference", checkpoint), tokens, chunks=chunks)
            taps = backend.run(tokens, golden.provenance.chunks, default_taps(checkpoint.config))
            for kind in ("all", *(("block_out", "logits") if T in WITH_FEW_TAPS else ())):
                chosen = taps if kind == "all" else few(taps, kind)
                report = check(golden, checkpoint, chosen, subject.backend, profile, reach_work=0)
                tally.note(subject, T, chunks, kind, report)
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--backend")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = sweep(Path(arguments.folder or temporary), arguments.backend)
    found.print()
    sys.exit(1 if found.alarms else 0)
