"""Goldens of the small checkpoints, and backends that are the oracle with one fault in it."""

import functools
from collections.abc import Callable

import numpy as np

import assay.reference as reference
from assay.golden.backends import open_backend
from assay.golden.check import Report, check
from assay.golden.noise import profile_named
from assay.golden.record import record
from assay.golden.store import Golden
from assay.loaders.checkpoint import Checkpoint
from assay.reference.taps import Recorder, default_taps
from tests.checkpoint_files import opened, tokens_of

GPT_OSS = "gpt_oss/hf"
Taps = dict[str, np.ndarray]


@functools.cache
def golden_of(name: str = GPT_OSS, chunks: tuple[int, ...] = (40,)) -> Golden:
    """The oracle's taps of transformers' tokens."""
    checkpoint = opened(name)
    return record(checkpoint, open_backend("reference", checkpoint), tokens_of(name.split("/")[0]), chunks=chunks)


def taps_with(
    faults: dict[str, Callable[[np.ndarray], np.ndarray]],
    checkpoint: Checkpoint | None = None,
    dtype: type = np.float64,
    chunks: tuple[int, ...] = (40,),
) -> Taps:
    """What a backend supplies that is the oracle, but for what the faults make of some taps, which it goes on with."""
    checkpoint = checkpoint or opened(GPT_OSS)
    recorder = Recorder(checkpoint.config, default_taps(checkpoint.config))
    model, cache, start = checkpoint.model(dtype), reference.KVCache(), 0
    for T in chunks:
        tokens = np.array(tokens_of("gpt_oss")[start : start + T])
        faulty = lambda name, array: recorder(name, faults[name](array) if name in faults else array)  # noqa: E731
        reference.forward(model, tokens, cache=cache, tap=faulty)
        start += T
    return recorder.values


def report_of(
    taps: Taps,
    profile: str = "float64",
    golden: Golden | None = None,
    checkpoint: Checkpoint | None = None,
    reach_work: float = 0,
) -> Report:
    """The check of such a backend."""
    golden, checkpoint = golden or golden_of(), checkpoint or opened(GPT_OSS)
    return check(golden, checkpoint, taps, "faulty", profile_named(profile), reach_work=reach_work)


def diverging(report: Report) -> list[str]:
    """The taps out of their allowance."""
    return [result.tap for result in report.taps if result.verdict == "diverges"]


def jolted(array: np.ndarray) -> np.ndarray:
    """A fault of a thousandth that no norm takes out: neighbours go up and down in turn."""
    return array * np.where(np.arange(array.shape[-1]) % 2, 1.001, 0.999)


def scaled(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    """A fault: everything a little larger."""
    return lambda array: array * factor
