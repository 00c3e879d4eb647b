"""Clean backends over many (checkpoint, prompt, profile, chunking) combinations: no false alarm, and how near to one.

    python -m tests.golden.clean_sweep [FOLDER]

Needs the peers, and ASSAY_LLAMA_CPP. Prints the largest ratio of every profile, the tap it was at, and every
combination that did not match; exits with 1 if there is one. Checkpoints are made in FOLDER and kept there.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from assay.golden.backends import open_backend
from assay.golden.check import check
from assay.golden.noise import profile_named
from assay.golden.record import record
from assay.loaders import Checkpoint, open_checkpoint
from assay.reference.config import YarnScaling
from assay.reference.taps import default_taps
from tests import tiny
from tests.golden.injection import random_tokens

GPT_OSS = {
    "oss-a": {"seed": 1},
    "oss-b": {"seed": 2, "head_dim": 64, "num_experts_per_tok": 4, "num_local_experts": 8, "num_hidden_layers": 2}
    | {"rope_scaling": {"beta_fast": 32.0}},  # llama.cpp does not read gpt-oss's beta_fast: 32 is its default
    "oss-c": {"seed": 3, "num_key_value_heads": 1, "hidden_size": 96, "num_hidden_layers": 2},
}
LLAMA = {"llama": "llama", "mistral": "mistral"}
PROMPTS = ((1, None), (9, [1]), (13, [12, 1]), (48, None), (60, [20, 1, 39]), (130, [65]))
OUTTYPES = ("bf16", "f16", "f32", "Q8_0", "Q4_0", "Q4_1")


class Subject(NamedTuple):
    """A backend in a mode with a checkpoint that it loads."""

    path: Path
    backend: str
    mode: str


def subjects(root: Path) -> Iterator[Subject]:
    """Every checkpoint in every container that some backend reads, made when it is not there yet."""
    for name, settings in (*GPT_OSS.items(), *((name, None) for name in LLAMA)):
        directory = root / name
        if not directory.exists():
            if settings is not None:
                tiny.make_gpt_oss(directory, **settings)
            else:
                tiny.make_llama(directory, seed=4, architecture=LLAMA[name])
        for mode in ("float32", "bfloat16"):
            yield Subject(directory, "transformers", mode)
        yield Subject(directory, "cpu", "exact")
        for outtype in ("bf16", "Q8_0") if settings is not None else OUTTYPES:
            path = _gguf(root, directory, outtype)
            for mode in ("default", "float32"):
                yield Subject(path, "llama.cpp", mode)


def _gguf(root: Path, directory: Path, outtype: str) -> Path:
    path = root / f"{directory.name}.{outtype}.gguf"
    if path.exists():
        return path
    if outtype in ("bf16", "f16", "f32") or "oss" in directory.name:
        return tiny.to_gguf(directory, path, outtype=outtype.lower())
    return tiny.quantize_gguf(_gguf(root, directory, "f32"), path, outtype)


def as_the_backend_reads_it(checkpoint: Checkpoint, backend: str) -> Checkpoint:
    """With llama.cpp's one deviation made the oracle's own: here it is the rest that must be clean."""
    scaling = checkpoint.config.rope_scaling
    if backend != "llama.cpp" or not isinstance(scaling, YarnScaling):
        return checkpoint
    config = dataclasses.replace(checkpoint.config, rope_scaling=dataclasses.replace(scaling, truncate=True))
    return dataclasses.replace(checkpoint, config=config)


def sweep(root: Path) -> int:
    """Run all combinations and print what was found; the number of false alarms."""
    largest: dict[str, tuple[float, str]] = {}
    combinations = alarms = 0
    for subject in subjects(root):
        checkpoint = as_the_backend_reads_it(open_checkpoint(subject.path), subject.backend)
        backend = open_backend(subject.backend, checkpoint, subject.mode)
        for T, chunks in PROMPTS:
            golden = record(checkpoint, open_backend("reference", checkpoint), random_tokens(T, seed=T), chunks=chunks)
            ran = golden.provenance
            taps = backend.run(ran.tokens, ran.chunks, default_taps(checkpoint.config))
            report = check(golden, checkpoint, taps, subject.backend, profile_named(backend.profile))
            combinations += 1
            worst = max(report.taps, key=lambda result: result.ratio or 0.0)
            label = f"{subject.path.name}, {T} tokens, chunks {chunks}, {worst.tap}"
            key = f"{subject.backend} {backend.profile}"
            largest[key] = max(largest.get(key, (0.0, "")), (worst.ratio or 0.0, label))
            if report.verdict != "match":
                alarms += 1
                print(f"{report.verdict}: {subject.backend} {subject.mode}, {label}: {worst.ratio:.2f}", flush=True)
    for profile, (ratio, label) in largest.items():
        print(f"{profile:24} {ratio:6.2f} x its noise at the most: {label}")
    print(f"{combinations} combinations, {alarms} false alarms")
    return alarms


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(1 if sweep(Path(sys.argv[1] if len(sys.argv) > 1 else temporary)) else 0)
