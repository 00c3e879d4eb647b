"""Fuzz the readers: `python -m tests.loaders.fuzz --count 20000 --seed 0`.

Each case is one of tests/checkpoints, spoilt at random (see mutations.py), then opened, verified, one tensor
decoded and the tokenizer used, in a worker process and under limits that the kernel keeps:

- memory: RLIMIT_AS at what the process has plus the size of the checkpoint plus 64 MB. It counts address space, so
  every allocation of NumPy, Python and the Rust tokenizer library is in it whether it is touched or not, and our
  mappings of the files too. malloc is told to take and return large blocks from and to the kernel
  (MALLOC_MMAP_THRESHOLD_), so that nothing freed by an earlier case hides a large allocation. The peak of resident
  memory is measured besides (VmHWM, reset through /proc/self/clear_refs): that is the figure reported.
- time: ITIMER_PROF kills the worker after one second of CPU time, its threads included; the parent kills a worker that
  waits (on a pipe, say) for longer than a minute.

A case is fine if it opens, or ends in one CheckpointError of bounded length which `assay verify` reports as well. Any
other exception, a warning, a dead worker or a tensor with NaN in it that verify did not see is a violation. The same
seed gives the same cases; `--only N` repeats one.
"""

import argparse
import collections
import gc
import json
import os
import queue
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.checkpoint_files import CHECKPOINTS
from tests.loaders.mutations import BASES, make_case

ALLOWANCE = 64 << 20  # bytes beyond the size of the files
CPU_SECONDS, WALL_SECONDS = 1.0, 60
LONGEST_MESSAGE = 4000  # characters
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}


def examine(path: Path, rng: Random) -> str:
    """Open a checkpoint and use it: "opened" or "refused"; raises for whatever else happens."""
    from assay.loaders import CheckpointError, open_checkpoint
    from assay.loaders.verify import verify

    report = verify(path) if path.exists() else None
    checkpoint, message = None, ""
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        message = str(error)
    if checkpoint is None:
        assert 0 < len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters"
        assert report is None or not report.is_good, "verify is content with what cannot be opened"
        return "refused"
    assert report is not None
    tensor = rng.choice(list(checkpoint.tensors.values()))
    values = tensor.decode()
    assert values.shape == tensor.shape
    assert report.findings or np.isfinite(values).all(), f"verify does not see what is wrong with {tensor.name}"
    try:
        checkpoint.tokenizer.encode("The miller's wife, 1953.")
    except CheckpointError:
        assert report.findings, "verify does not see that the tokenizer cannot be read"
    return "opened"


# --- one worker ---


def _kilobytes(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{key}:"))


def _size(path: Path) -> int:
    """Bytes of the files of a checkpoint; what is no file counts nothing."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _limited(path: Path, rng: Random) -> dict[str, Any]:
    """Examine under the limits; what came out and what it took."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = _kilobytes("VmRSS")
    size = _size(path)
    resource.setrlimit(resource.RLIMIT_AS, (_kilobytes("VmSize") * 1024 + size + ALLOWANCE, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    started = time.process_time()
    try:
        outcome = examine(path, rng)
    except BaseException:
        outcome = traceback.format_exc(limit=-8)
    cpu = time.process_time() - started
    signal.setitimer(signal.ITIMER_PROF, 0)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"outcome": outcome, "cpu": cpu, "beyond": (_kilobytes("VmHWM") - before) * 1024 - size}


def work(seed: int, scratch: Path) -> None:
    """Answer case numbers from standard input with a line of JSON each."""
    warnings.simplefilter("error")
    for base in BASES:  # import and warm up whatever is loaded once
        folder = CHECKPOINTS / base
        examine(folder / "model.gguf" if (folder / "model.gguf").exists() else folder, Random(0))
    gc.freeze()
    for line in sys.stdin:
        folder = scratch / f"case-{int(line)}"
        rng = Random(f"{seed}/{int(line)}")
        path, done = make_case(rng, folder)
        print(json.dumps({"done": done}), flush=True)
        print(json.dumps(_limited(path, rng)), flush=True)
        shutil.rmtree(folder)


# --- the parent ---


class Worker:
    """A worker process; `run` answers a case and starts another process if this one died of it."""

    def __init__(self, seed: int, scratch: Path):
        self.seed, self.scratch, self.process = seed, scratch, None

    def run(self, case: int) -> dict[str, Any]:
        if self.process is None:
            command = [
                sys.executable,
                "-m",
                "tests.loaders.fuzz",
                "--worker",
                str(self.scratch),
                "--seed",
                str(self.seed),
            ]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | ENVIRONMENT, bufsize=0
            )
        assert self.process.stdin
        self.process.stdin.write(f"{case}\n".encode())
        answer = {"case": case, "done": "?", "cpu": 0.0, "beyond": 0} | self._line() | self._line()
        if "outcome" not in answer:
            state = self._state()
            self.process.kill()
            answer["outcome"] = f"the worker died or hung: exit status {self.process.wait()}, {state}"
            self.process = None
        return answer

    def _state(self) -> str:
        """What the kernel says the worker does: D waits for a disk, S for something else, R runs, Z is dead."""
        assert self.process
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return f"state {fields[0]} after {seconds:.1f} s of CPU time"

    def _line(self) -> dict[str, Any]:
        """The next line of the worker; empty if it is dead or late."""
        assert self.process
        assert self.process.stdout
        raw, waited = b"", 0
        while not raw.endswith(b"\n"):
            # second by second: a pause of the whole machine is one of them, and no fault of the worker's
            ready, _, _ = select.select([self.process.stdout], [], [], 1.0)
            if not ready and (waited := waited + 1) < WALL_SECONDS:
                continue
            got = os.read(self.process.stdout.fileno(), 1) if ready else b""
            if not got:
                return {}
            raw += got
        return json.loads(raw)

    def close(self) -> None:
        if self.process and self.process.stdin:
            self.process.stdin.close()
            self.process.wait()


def run(cases: range, seed: int, workers: int, quiet: bool = True) -> list[dict[str, Any]]:
    """The answers to all cases, in order."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for case in cases:
        todo.put(case)
    answers: list[dict[str, Any]] = []

    def serve(scratch: Path) -> None:
        worker = Worker(seed, scratch)
        while True:
            try:
                answers.append(worker.run(todo.get_nowait()))
            except queue.Empty:
                return worker.close()
            if not quiet and len(answers) % 500 == 0:
                print(f"{len(answers)} of {len(cases)}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        threads = [threading.Thread(target=serve, args=(Path(scratch),)) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sorted(answers, key=lambda answer: answer["case"])


def summary(answers: list[dict[str, Any]]) -> str:
    """Counts, maxima and every violation."""
    outcomes = collections.Counter(a["outcome"] if is_fine(a) else "violation" for a in answers)
    cpu, beyond = max(answers, key=lambda a: a["cpu"]), max(answers, key=lambda a: a["beyond"])
    lines = [
        f"{len(answers)} cases: " + ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())),
        f"most CPU time {cpu['cpu']:.3f} s (case {cpu['case']}: {cpu['done'][:100]!a})",
        f"most resident memory beyond the files' size {beyond['beyond'] / 2**20:.1f} MB "
        f"(case {beyond['case']}: {beyond['done'][:100]!a})",
    ]
    lines += [f"case {a['case']}: {a['done']!a}\n{a['outcome']}" for a in answers if not is_fine(a)]
    return "\n".join(lines)


def is_fine(answer: dict[str, Any]) -> bool:
    """Whether a case kept to the limits and ended well."""
    return answer["outcome"] in ("opened", "refused") and answer["beyond"] <= ALLOWANCE


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz assay's readers with spoilt checkpoints.")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this one case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(given.seed, given.worker)
    cases = range(given.count) if given.only is None else range(given.only, given.only + 1)
    answers = run(cases, given.seed, given.workers, quiet=False)
    print(summary(answers))
    sys.exit(0 if all(map(is_fine, answers)) else 1)


if __name__ == "__main__":
    main()
