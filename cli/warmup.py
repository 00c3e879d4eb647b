"""assay warmup: compile the CPU path's kernels now, so that no later command waits for them."""

import time


def warmup() -> None:
    """Compile and cache every kernel of the cpu backend; seconds when it was done before.

    Example: assay warmup
    """
    from rich.progress import track

    from assay.cli.shared import console, messages
    from assay.fast.cpu.warmup import steps

    started = time.perf_counter()
    for step in track(list(steps()), "compiling kernels", console=messages, transient=True):
        step()
    console.print(f"kernels ready in {time.perf_counter() - started:.1f} s")
