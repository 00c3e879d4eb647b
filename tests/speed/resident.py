"""The most memory that a process had, as the system counts it: in bytes on macOS, in kilobytes elsewhere."""

import resource
import sys


def peak(usage: resource.struct_rusage) -> float:
    """Megabytes that were resident at most."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
