"""The Numba path. Importing it imports Numba: do so where it is used, not at the top of a module."""

from assay.fast.numba_support import require_numba

require_numba()  # before any module here imports it

from assay.fast.cpu.cache import CpuCache  # noqa: E402
from assay.fast.cpu.engine import CpuModel  # noqa: E402

__all__ = ["CpuCache", "CpuModel"]
