"""The full run: every witness on 10^6 blocks, encoders on 10^6 groups. `python -m tests.reference.formats.full [N]`."""

import sys
import time
from collections.abc import Callable

from tests.reference.formats.encoding_witnesses import ENCODING_WITNESSES
from tests.reference.formats.witnesses import ggml_library, gguf_py, mlx, transformers, with_ml_dtypes


def main(n: int) -> int:
    """Print one line a pair; answers how many disagree."""
    witnesses = (*gguf_py(), *ggml_library(), *with_ml_dtypes(), *mlx(), *transformers())
    runs: list[tuple[str, Callable[[int], tuple[int, int]]]] = [
        *((f"decode {witness.form} by {witness.who}", witness.mismatches) for witness in witnesses),
        *((f"encode {name}", run) for name, run in ENCODING_WITNESSES.items()),
    ]
    failed = 0
    for name, run in runs:
        start = time.perf_counter()
        wrong, judged = run(n)
        failed += wrong > 0
        print(f"{name:42} {judged:>9,} blocks {wrong:>6} wrong {time.perf_counter() - start:6.1f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10**6) > 0)
