"""The `assay` command."""

import os

# Read when NumPy loads its BLAS. After a product its threads spin for some 20 ms in case another follows, on the cores
# that decode the next matrix: 11 s for what the oracle does in 7.5 s without. 2^4 cycles are the least it takes.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
