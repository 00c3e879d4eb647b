"""The Numba path. Importing it imports Numba: do so where it is used, not at the top of a module."""

from assay.fast.cpu.cache import CpuCache
from assay.fast.cpu.engine import CpuModel

__all__ = ["CpuCache", "CpuModel"]
