"""Engines in turn, A B A B, on one file in one run: medians, ratios, errors, memory, and the machine's own limits.

Each engine lives in a process of its own. Where the machine's memory holds all of them they live together and take
turns piece by piece; otherwise one ends before the next begins, round by round, and the file is read through between,
so that each finds it in the system's cache.
"""

import argparse
import json
import mmap
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from assay.loaders import Checkpoint, open_checkpoint
from assay.loaders.mapped_file import map_file
from tests.speed.limits import measure
from tests.speed.report import Findings, Work, print_findings

EXACT = {"cpu": "cpu:exact", "metal": "metal:float32"}  # the mode that the logits of all are compared with
TOGETHER = 0.2  # of the free memory: files up to this are given to all engines at once


class Worker:
    """An engine's process."""

    def __init__(self, engine: str, path: Path, threads: int, longest: int, sequences: int, vocabulary: int) -> None:
        command = [sys.executable, "-m", "tests.speed.worker", engine, str(path)]
        command += map(str, (threads, longest, sequences, vocabulary))
        started = perf_counter()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello = self._answer()
        self.first_token = perf_counter() - started
        self.memory = self.hello["memory"]

    def do(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.memory = answer["memory"]
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine's process ended with status {self.process.wait()}: {self.process.args}")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def options(description: str | None) -> argparse.ArgumentParser:
    """What every paired command takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompt", type=int, nargs="*", default=[64, 256], help="lengths of prompts")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded one by one; 0: none")
    parser.add_argument("--past", type=int, default=64, help="tokens before those that are decoded one by one")
    parser.add_argument("--batch", type=int, default=20, help="sequences decoded together; 0: none")
    parser.add_argument("--steps", type=int, default=8, help="tokens of each sequence of the batch")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine")
    parser.add_argument("--repeats", type=int, default=1, help="times that each piece of work is done in a turn")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)) if sys.platform == "linux" else None
    )
    parser.add_argument("--error-tokens", type=int, default=16, help="tokens whose logits are compared; 0: none")
    parser.add_argument("--golden", type=Path, help="logits to compare with: assay record FILE --taps logits")
    parser.add_argument("--check", type=int, default=0, help="tokens that assay check judges each engine on (slow)")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    return parser


def run(baseline: str, ours: Sequence[str], arguments: argparse.Namespace) -> None:
    """Measure the engines in turn, and print what was found."""
    engines = [baseline, *ours]
    path, threads = arguments.file, arguments.threads or os.cpu_count() or 1
    checkpoint = open_checkpoint(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    found = Findings(path.name, nbytes / 1e9, machine(), threads)
    if arguments.check:
        found.checks = {engine: checked(checkpoint, engine, arguments.check) for engine in engines}
    longest = max([arguments.past + max(arguments.decode, arguments.steps), *arguments.prompt]) + 8
    settings = path, threads, longest, max(arguments.batch, 1), checkpoint.config.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        turns = Turns(engines, settings, list(pieces(arguments)), arguments.repeats, files, found)
        orders = logit_orders(engines, error_tokens(checkpoint, arguments), Path(folder)) if arguments.rounds else {}
        if nbytes < TOGETHER * free_memory():
            turns.together(arguments.rounds, orders)
        else:
            turns.apart(arguments.rounds, orders)
        if orders:
            compare_logits(engines, EXACT[ours[0].partition(":")[0]], arguments.golden, Path(folder), found)
    print_findings(found, engines, baseline, turns.work, checkpoint, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(found), indent=2) + "\n", "utf-8")


@dataclass
class Turns:
    """The engines' turns, of which `found` is told."""

    engines: Sequence[str]
    settings: tuple[Path, int, int, int, int]
    work: Sequence[Work]
    repeats: int
    files: Sequence[Path]
    found: Findings

    def together(self, rounds: int, orders: dict[str, list[dict[str, Any]]]) -> None:
        """All engines alive, A B A B piece by piece; one more process each shows how long the start takes."""
        with ExitStack() as stack:
            alive = {engine: stack.enter_context(Worker(engine, *self.settings)) for engine in self.engines}
            for number in range(rounds):
                self.found.limits.append(measure())
                for item in self.work:
                    for _ in range(self.repeats):
                        for engine in self.engines:
                            self._do(alive[engine], engine, item, number)
                for engine in self.engines:
                    with Worker(engine, *self.settings) as started:
                        self._note(alive[engine], engine, started)
            for engine in orders:
                for order in orders[engine]:
                    alive[engine].do(order)

    def apart(self, rounds: int, orders: dict[str, list[dict[str, Any]]]) -> None:
        """One engine at a time, A B A B round by round."""
        for number in range(rounds):
            self.found.limits.append(measure())
            for engine in self.engines:
                read_through(self.files)
                with Worker(engine, *self.settings) as worker:
                    for item in self.work:
                        for _ in range(self.repeats):
                            self._do(worker, engine, item, number)
                    self._note(worker, engine, worker)
                    if number == 0:
                        for order in orders.get(engine, []):
                            worker.do(order)

    def _do(self, worker: Worker, engine: str, item: Work, number: int) -> None:
        answer = worker.do(item.order | {"seed": number + 1})
        self.found.seconds.setdefault(item.name, {}).setdefault(engine, []).append(answer["seconds"])

    def _note(self, worker: Worker, engine: str, started: Worker) -> None:
        """The engine's versions and largest memory, and the time that a start took."""
        self.found.info[engine] = worker.hello["info"]
        self.found.start.setdefault(engine, []).append(started.first_token)
        before = self.found.memory.get(engine, {})
        self.found.memory[engine] = {what: max(value, before.get(what, 0)) for what, value in worker.memory.items()}


def pieces(arguments: argparse.Namespace) -> Iterator[Work]:
    """What is timed."""
    for T in arguments.prompt:
        yield Work(f"prefill {T}", {"do": "prefill", "T": T}, T)
    if arguments.decode:
        yield Work(
            f"decode {arguments.decode}",
            {"do": "decode", "past": arguments.past, "N": arguments.decode},
            arguments.decode,
        )
    if arguments.batch:
        B, N = arguments.batch, arguments.steps
        yield Work(f"decode {N}, batch of {B}", {"do": "batch", "B": B, "N": N}, B * N)


def read_through(files: Sequence[Path]) -> None:
    """Bring files into the system's cache, as a program does that maps them."""
    for file in files:
        np.frombuffer(map_file(file), np.uint8)[:: mmap.PAGESIZE].max()  # looks at every page


def error_tokens(checkpoint: Checkpoint, arguments: argparse.Namespace) -> list[int]:
    """The golden's, or random ones."""
    if arguments.golden:
        from assay.golden.store import load_golden

        return list(load_golden(arguments.golden).provenance.tokens)
    V = checkpoint.config.vocab_size
    return np.random.default_rng(7).integers(0, V, arguments.error_tokens).tolist()


def logit_orders(engines: Sequence[str], tokens: list[int], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """For each engine: write its logits and, where it is one of ours, those of its exact mode; none without tokens."""
    orders: dict[str, list[dict[str, Any]]] = {}
    for engine in engines if tokens else ():
        exact = EXACT.get(engine.partition(":")[0])
        orders[engine] = [
            {"do": "logits", "tokens": tokens, "engine": name, "out": str(folder / f"{name}.npy")}
            for name in {engine, exact or engine}
        ]
    return orders


def compare_logits(engines: Sequence[str], exact: str, golden: Path | None, folder: Path, found: Findings) -> None:
    """End to end: a legal flip between two nearly tied experts counts in full. `--check` looks at each step instead."""
    from assay.golden.measure import logit_view

    if golden:
        from assay.golden.store import load_golden

        want = np.asarray(load_golden(golden).taps["logits"], np.float64)
    else:
        want = np.load(folder / f"{exact}.npy", allow_pickle=False).astype(np.float64)
    for engine in engines:
        got = np.load(folder / f"{engine}.npy", allow_pickle=False).astype(np.float64)
        nmse = float(np.sum((got - want) ** 2) / np.sum((want - want.mean()) ** 2))
        found.errors[engine] = {"nmse": nmse} | {key: float(value) for key, value in logit_view(want, got).items()}


def checked(checkpoint: Checkpoint, engine: str, T: int) -> dict[str, Any]:
    """What assay check says: the largest local error of a tap, in multiples of the noise of the engine's profile."""
    from assay.golden.backends import open_backend
    from assay.golden.check import check
    from assay.golden.noise import profile_named
    from assay.golden.record import record

    name, _, mode = engine.partition(":")
    tokens = np.random.default_rng(7).integers(0, checkpoint.config.vocab_size, T).tolist()
    golden = record(checkpoint, open_backend("reference", checkpoint), tokens)
    backend = open_backend(name, checkpoint, mode if name != "llama.cpp" else "default")
    taps = backend.run(tokens, [T], golden.provenance.taps)
    report = check(golden, checkpoint, taps, engine, profile_named(backend.profile))
    worst = max(report.taps, key=lambda result: result.ratio or 0.0)
    return {
        "verdict": report.verdict,
        "profile": backend.profile,
        "largest ratio": worst.ratio,
        "at": worst.tap,
        "first divergence": report.first_divergence.tap if report.first_divergence else None,
    }


def machine() -> dict[str, Any]:
    names = {"processor": platform.processor() or platform.machine(), "cores": f"{os.cpu_count()} cores"}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names["processor"] = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")
    return names | {"system": platform.system(), "Python": f"Python {platform.python_version()}"}


def free_memory() -> float:
    """Bytes that could be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
