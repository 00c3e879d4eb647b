"""Files mapped into memory, read-only."""

import errno
import mmap
from contextlib import suppress
from pathlib import Path

import numpy as np

from assay.loaders.errors import CheckpointError

WORTH_RELEASING = 1 << 16  # bytes: of less, the system call costs more than the pages are worth
DAMAGED = "the file is cut short or damaged: fetch it again and compare its size"
ULIMIT = "raise the limit that `ulimit -v` shows: a file is mapped as a whole"


def map_file(path: Path) -> mmap.mmap:
    """The whole file mapped read-only; raises CheckpointError for a missing, unreadable or empty one."""
    try:
        if not path.is_file():  # also keeps us from waiting on a pipe
            raise CheckpointError("no such file", where=path)
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise CheckpointError("the file is empty (0 bytes)", where=path, remedy="fetch it again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with suppress(AttributeError, OSError):  # not every system has such pages
                # Where the file is not in the system's cache yet, Linux reads it there in pages of 2 MB if the file
                # system can: from these two threads read a third more a second than from pages of 4 KB.
                data.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        remedy = ULIMIT if error.errno == errno.ENOMEM else None
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=path, remedy=remedy) from error
    if data[:24] == b"version https://git-lfs.":
        raise CheckpointError("a Git LFS pointer, not the file itself", where=path, remedy="run `git lfs pull`")
    return data


def release(view: np.ndarray) -> None:
    """Take the pages under a view of a mapped file out of our memory; the system's cache still has them.

    Without this, the peak of converting gpt-oss-20b is the file's 12 GB instead of 0.7 GB. Small views stay.
    """
    if view.nbytes < WORTH_RELEASING:
        return
    root = view
    while isinstance(root.base, np.ndarray):
        root = root.base
    mapping = root.base.obj if isinstance(root.base, memoryview) else root.base
    if not isinstance(mapping, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    low, high = (address - root.ctypes.data for address in np.lib.array_utils.byte_bounds(view))
    first = low // mmap.PAGESIZE * mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, first, high - first)
