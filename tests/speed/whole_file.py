"""How long a GGUF takes to open, in a process of its own, and to be scanned for bad values, beside what can be read.

    python -m tests.speed.whole_file FILE.gguf

Two limits stand beside the scan, all taken in turn: what the machine reads from memory, and what it reads of this file
into a buffer when nothing is done with the bytes.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from assay.loaders.file_bytes import COPIED
from assay.loaders.gguf_file import read_gguf
from assay.loaders.scan import gguf_stored, scan
from tests.speed.limits import read_bandwidth

OPEN = """
import resource, sys, time
started = time.perf_counter()
from assay.loaders import open_checkpoint
imported = time.perf_counter()
checkpoint = open_checkpoint(sys.argv[1])
opened = time.perf_counter()
from tests.speed.resident import peak
print(imported - started, opened - imported, peak(resource.getrusage(resource.RUSAGE_SELF)))
"""


def opening(path: Path) -> list[float]:
    """Seconds to import, seconds to open, and the most that was resident, MB, of a new process."""
    command = [sys.executable, "-c", OPEN, str(path)]
    return [float(figure) for figure in subprocess.check_output(command, text=True).split()]


def read_all(path: Path) -> None:
    """Read the file once, each thread a share of it into a buffer of its own."""
    size, threads = path.stat().st_size, os.cpu_count() or 1

    def read(thread: int) -> None:
        buffer, left = memoryview(bytearray(COPIED)), size // threads
        with open(path, "rb", buffering=0) as file:
            file.seek(thread * left)
            while left > 0:
                left -= file.readinto(buffer)  # type: ignore[attr-defined]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))


def rate(work: Callable[[], object], nbytes: int) -> float:
    """GB/s."""
    started = time.perf_counter()
    work()
    return nbytes / (time.perf_counter() - started) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Times to open and to scan a GGUF file that is in the system's cache.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    opened = [opening(given.path) for _ in range(given.rounds)]
    for what, figures in zip(("import, s", "open, s", "resident, MB"), zip(*opened, strict=True), strict=True):
        print(f"{what:24} median {median(figures):8.3f}  worst {max(figures):8.3f}")
    tensors = gguf_stored(read_gguf(given.path))
    nbytes = sum(tensor.nbytes for tensor in tensors if tensor.fields)
    works = {
        "memory, GB/s": lambda: read_bandwidth() / 1e9,
        "plain reading, GB/s": lambda: rate(lambda: read_all(given.path), given.path.stat().st_size),
        "scan, GB/s": lambda: rate(lambda: list(scan(tensors, lambda _: None)), nbytes),
    }
    rows = [[work() for work in works.values()] for _ in range(given.rounds + 1)][1:]
    for what, figures in zip(works, zip(*rows, strict=True), strict=True):
        print(f"{what:24} median {median(figures):8.1f}  {min(figures):.1f} to {max(figures):.1f}")
    shares = (
        median(scanned / read for _, read, scanned in rows),
        median(scanned / memory for memory, _, scanned in rows),
    )
    print(f"the scan reads at {shares[0]:.0%} of plain reading, {shares[1]:.0%} of memory (medians over the rounds)")


if __name__ == "__main__":
    main()
