"""The CPU path under the check: every test checkpoint and true shapes of gpt-oss-20b, both modes, prompts up to 4200.

    python -m tests.fast.cpu.sweep [--prompts 1 9 127 128 129 300 4200] [--only gpt_oss] [--modes exact q8 exact-f16]

Each prompt whole, in chunks and token by token; models that have a sliding window also with one of 128 positions.
The oracle takes long prompts, and all of large models, in pieces of its own (see `judged_in`). Prints, for each
checkpoint and mode, the largest ratio of local error to noise (the allowance is 4) and the tap it was at; exits with 1
if anything diverges.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from assay.fast.engine import CPU_MODES
from assay.golden.backends import open_backend
from assay.golden.check import Report, check
from assay.golden.measure import ALLOWANCE
from assay.golden.noise import profile_named
from assay.golden.record import record, split_into_chunks
from assay.golden.store import Golden
from assay.loaders import Checkpoint, open_checkpoint
from assay.loaders.convert import write_gguf_checkpoint
from assay.loaders.registry import find_shape
from assay.loaders.synth import random_weights, synthetic_tokenizer
from assay.reference.config import LongRopeScaling
from tests.checkpoint_files import CHECKPOINTS

MODES = ("exact", "q8")
PROMPTS = (1, 9, 127, 128, 129, 300, 4200)
WINDOW = 128  # of gpt-oss
TRUE_SHAPES = (1, 2)  # layers
LONG = 1000  # tokens, from which on the oracle goes by pieces, and a few taps of a large model are looked at
PIECE = 300  # tokens whose scores of all pairs fit into memory: those of gpt-oss-20b and 4200 are [64, 300, 4200]
FEW = ("q_rope", "k_rope", "attn_heads", "attn_residual", "router_logits", "expert_ids", "mlp_out")


def subjects(only: str, folder: Path) -> Iterator[tuple[str, Checkpoint]]:
    """Those of tests/checkpoints, their contexts made long enough, and random ones of the shape of gpt-oss-20b."""
    for path in sorted(CHECKPOINTS.glob("*/*")):
        name = str(path.relative_to(CHECKPOINTS))
        if not path.is_dir() or only not in name:
            continue
        opened = open_checkpoint(path)
        config = replace(opened.config, max_position_embeddings=max(*PROMPTS, opened.config.max_position_embeddings))
        yield name, replace(opened, config=config)
        if config.sliding_window:
            yield f"{name}, window {WINDOW}", replace(opened, config=replace(config, sliding_window=WINDOW))
    for layers in TRUE_SHAPES:
        if only in (name := f"gpt-oss-20b, {layers} layers"):
            yield name, true_shape(layers, folder / f"{layers}.gguf")


def true_shape(layers: int, path: Path) -> Checkpoint:
    """gpt-oss-20b's shapes but for the vocabulary, which would make 6.7 GB of logits of 4200 tokens."""
    whole = find_shape("gpt-oss-20b")
    shape = replace(whole, config=replace(whole.config, vocab_size=4096), special_tokens={}, bos=0, eos=1, pad=2)
    config = shape.shortened(layers)
    write_gguf_checkpoint(
        path, config, shape.model_type, random_weights(config, "gguf", None, 0), synthetic_tokenizer(shape), _silent
    )
    return open_checkpoint(path)


def _silent(nbytes: int) -> None:
    pass


def chunkings(T: int) -> dict[str, list[int]]:
    """Chunk lengths in words and in numbers: whole, ending before, on and behind the edge of a window, and single."""
    some = [1000, 31, 1, 1, 500] if T >= LONG else [100, 1, 26, 1, 1]
    told = {f"{T} tokens in {','.join(map(str, lengths))}": split_into_chunks(T, lengths) for lengths in (some, [1])}
    return {f"{T} tokens": [T]} | {words: chunks for words, chunks in told.items() if chunks != [T]}


def judged_in(checkpoint: Checkpoint, chunks: list[int]) -> list[int]:
    """The chunks that the oracle takes a prompt in, of which a backend ran these: it has the same values for all.

    All but LongRoPE's, whose factors follow from where a chunk ends. Of a large model each chunk decodes the chosen
    experts anew, and a long prompt's scores of all pairs fill the memory.
    """
    T = sum(chunks)
    if isinstance(checkpoint.config.rope_scaling, LongRopeScaling):
        return chunks
    if T >= LONG:
        return split_into_chunks(T, [PIECE])
    return [T] if is_large(checkpoint) else chunks


def is_large(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.hidden_size > 1000


def reports(checkpoint: Checkpoint, prompts: Sequence[int], modes: Sequence[str]) -> Iterator[tuple[str, str, Report]]:
    """Mode, prompt, and what the check says."""
    oracle = open_backend("reference", checkpoint)
    backends = {mode: open_backend("cpu", checkpoint, mode) for mode in modes}
    for T in prompts:
        tokens = np.random.default_rng(T).integers(8, checkpoint.config.vocab_size, T).tolist()
        few = ",".join(f"layers.*.{tap}" for tap in FEW) if is_large(checkpoint) and T >= LONG else None
        golden: Golden | None = None
        for told, chunks in chunkings(T).items():
            judged = judged_in(checkpoint, chunks)
            if golden is None or golden.provenance.chunks != judged:
                golden = record(checkpoint, oracle, tokens, chunks=judged, taps=few, beside=Path())
                known: dict[str, tuple[Mapping[str, np.ndarray], Report]] = {}
            for mode, backend in backends.items():
                taps = backend.run(tokens, chunks, golden.provenance.taps)
                if mode not in known or not same_bits(taps, known[mode][0]):
                    known[mode] = taps, check(golden, checkpoint, taps, "cpu", profile_named(backend.profile))
                yield mode, told, known[mode][1]


def same_bits(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Whether two runs computed the same, as mode exact does for all chunkings: one check is that of both then."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def sweep(prompts: Sequence[int], only: str, modes: Sequence[str] = MODES) -> int:
    """Check all and print the table; how many did not match."""
    print(f"largest local error over the noise of the mode; the allowance is {ALLOWANCE:g}")
    print("| checkpoint | container | mode | checks | match | largest | at | s |\n|---|---|---|---|---|---|---|---|")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, checkpoint in subjects(only, Path(folder)):
            started = time.perf_counter()
            rows = {mode: Row() for mode in modes}
            for mode, told, report in reports(checkpoint, prompts, modes):
                rows[mode].add(told, report)
            seconds = time.perf_counter() - started
            for mode, row in rows.items():
                wrong += row.count - row.matching
                print(
                    f"| {name} | {checkpoint.format} | {mode} | {row.count} | {row.matching} "
                    f"| {row.largest:.2f} | {row.where} | {seconds:.0f} |",
                    flush=True,
                )
    return wrong


class Row:
    """What is known of a checkpoint in a mode."""

    def __init__(self) -> None:
        self.count = self.matching = 0
        self.largest, self.where = 0.0, ""

    def add(self, told: str, report: Report) -> None:
        self.count += 1
        self.matching += report.verdict == "match"
        worst = max(report.taps, key=lambda tap: tap.ratio or 0.0)
        if report.verdict != "match":
            print(f"{report.verdict}: {told}, {report.first_divergence}", file=sys.stderr)
        if (worst.ratio or 0.0) > self.largest:
            self.largest, self.where = worst.ratio or 0.0, f"{worst.tap}, {told}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--only", default="", help="checkpoints whose name has this in it")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=CPU_MODES)
    arguments = parser.parse_args()
    sys.exit(1 if sweep(arguments.prompts, arguments.only, arguments.modes) else 0)
