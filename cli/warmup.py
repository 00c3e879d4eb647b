"""assay warmup: compile the CPU path's kernels now, so that no later command waits for them."""

import atexit
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

WORKERS = 4  # more would wait for the longest piece


def warmup() -> None:
    """Compile and cache every kernel of the cpu backend; seconds when it was done before.

    Example: assay warmup
    """
    from rich.progress import Progress

    from assay.cli.shared import console, messages
    from assay.fast.cpu.warmup import run_step, steps

    started, count = time.perf_counter(), len(steps())
    with Progress(console=messages, transient=True) as progress:
        task = progress.add_task("compiling kernels", total=count)
        workers = min(WORKERS, os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, get_context("spawn"), _end_at_once) as pool:
            for step in as_completed([pool.submit(run_step, number) for number in range(count)]):
                step.result()
                progress.advance(task)
    console.print(f"kernels ready in {time.perf_counter() - started:.1f} s")


def _end_at_once() -> None:
    """Let this process not take its many objects apart when it ends: that takes two seconds, and somebody waits."""
    atexit.register(os._exit, 0)
