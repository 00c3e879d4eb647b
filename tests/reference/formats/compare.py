"""What every test of a codec needs: bit patterns to compare, and how many random blocks to try."""

import os

import numpy as np

# 10^6 for the full run (`python -m tests.reference.formats.full`, or this variable)
BLOCKS = int(os.environ.get("ASSAY_BLOCKS", "2000"))


def bits(array: np.ndarray) -> np.ndarray:
    """float32 codes, all NaN as one."""
    return np.where(np.isnan(array), np.uint32(0x7FC00000), np.ascontiguousarray(array, np.float32).view(np.uint32))


def assert_same_bits(got: np.ndarray, wanted: np.ndarray) -> None:
    """Equal float32 values, signs of zeros and NaN included."""
    np.testing.assert_array_equal(bits(got), bits(wanted))
