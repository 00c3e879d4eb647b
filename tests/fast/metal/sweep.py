"""The MLX path under the check: every test checkpoint, prompts up to and over a window of 128, whole and in pieces.

    python -m tests.fast.metal.sweep [--only phi3]

Needs mlx and, for the checkpoints with that window, transformers. Prints the largest ratio of local error to noise of
each checkpoint in both modes (the allowance is 4) and the tap it was at; exits with 1 if anything diverges.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from assay.golden.backends import open_backend
from assay.golden.check import Report, check
from assay.golden.measure import ALLOWANCE
from assay.golden.noise import profile_named
from assay.golden.record import record, split_into_chunks
from assay.loaders import Checkpoint, open_checkpoint
from assay.loaders.convert import convert
from tests.checkpoint_files import CHECKPOINTS
from tests.reference.shapes import make_shape

MODES = ("float32", "bfloat16")
PROMPTS = [  # tokens, chunks: the last token within the window, at its edge, just over it, and far over it
    *((T, None) for T in (127, 128, 129, 300)),
    *((T, [100, 1, 26, 1, 1]) for T in (127, 128, 129, 300)),
    (129, [1]),
]
SHAPES = {"gpt-oss": "head 64, 4 of 8 experts, window 128", "mistral": "mistral, window 128"}


def checkpoints(root: Path, only: str) -> Iterator[tuple[str, Path]]:
    """Those of tests/checkpoints, and two with a window of 128 in each container, whose names contain `only`."""
    for path in sorted(CHECKPOINTS.glob("*/*")):
        if path.is_dir() and only in (name := str(path.relative_to(CHECKPOINTS))):
            yield name, path
    for family, shape in SHAPES.items():
        if only not in f"{family}, window 128":
            continue
        source = make_shape(shape, root / family)
        yield f"{family}, window 128, hf", source
        for container in ("gguf", "mlx"):
            target = root / f"{family}.{container}"
            convert(open_checkpoint(source), target, container)
            yield f"{family}, window 128, {container}", target


def reports(checkpoint: Checkpoint) -> Iterator[tuple[str, str, Report]]:
    """Mode, prompt and report of each prompt that fits the context."""
    oracle, backends = open_backend("reference", checkpoint), [open_backend("metal", checkpoint, m) for m in MODES]
    for T, chunks in PROMPTS:
        if checkpoint.config.max_position_embeddings < T:
            continue
        tokens = np.random.default_rng(T).integers(8, checkpoint.config.vocab_size, T).tolist()
        lengths = None if chunks is None else split_into_chunks(T, chunks)
        golden = record(checkpoint, oracle, tokens, chunks=lengths, taps=None, beside=Path())
        for mode, backend in zip(MODES, backends, strict=True):
            taps = backend.run(tokens, golden.provenance.chunks, golden.provenance.taps)
            report = check(golden, checkpoint, taps, "metal", profile_named(backend.profile))
            yield mode, f"{T} tokens, {'whole' if chunks is None else 'chunks ' + ','.join(map(str, chunks))}", report


def sweep(root: Path, only: str) -> int:
    """Check all and print the table; the number of prompts that did not match."""
    print(f"largest ratio to the noise, allowance {ALLOWANCE:g}", flush=True)
    count = wrong = 0
    for name, path in checkpoints(root, only):
        checkpoint, largest = open_checkpoint(path), dict.fromkeys(MODES, (0.0, ""))
        for mode, prompt, report in reports(checkpoint):
            count += 1
            if report.verdict != "match" or report.not_supplied:
                wrong += 1
                print(f"{report.verdict}: {name}, {mode}, {prompt}")
            ratio, tap = max((tap.ratio or 0.0, tap.tap) for tap in report.taps)
            largest[mode] = max(largest[mode], (ratio, f"{tap}, {prompt}"))
        cells = (f"{mode} {ratio:.2f} ({where})" for mode, (ratio, where) in largest.items())
        print(f"{name:27} {checkpoint.format:11} {'; '.join(cells)}", flush=True)
    print(f"{count} checks, {wrong} did not match")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The MLX path under the check, in both modes, on every checkpoint.")
    parser.add_argument("--only", default="", help="a part of the names of the checkpoints to take")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(1 if sweep(Path(temporary), given.only) else 0)
