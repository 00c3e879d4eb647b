"""assay warmup: compile the CPU path's kernels now, so that no later command waits for them."""

import time


def warmup() -> None:
    """Compile and cache every kernel of the cpu backend; seconds when it was done before.

    Example: assay warmup
    """
    import numpy as np
    from rich.progress import track

    from assay.cli.shared import console, messages
    from assay.fast.cpu import CpuModel
    from assay.fast.cpu.warmup import steps
    from assay.golden.tiny_model import TINY
    from assay.loaders import open_checkpoint

    def one_token() -> None:
        """The kernel of a single token serves every model and mode; the bundled one is at hand."""
        tiny = open_checkpoint(TINY)
        CpuModel(tiny.config, tiny.tensors).forward(np.zeros(1, np.int64))

    started = time.perf_counter()
    for step in track([*steps(), one_token], "compiling kernels", console=messages, transient=True):
        step()
    console.print(f"kernels ready in {time.perf_counter() - started:.1f} s")
