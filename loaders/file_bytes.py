"""The bytes of a file for a pass over all of them: where they lie in the system's cache, or read into a buffer.

Touching a mapped page that the disk can't deliver, or that a file cut short no longer has, ends the process. Linux
can be asked to bring the pages in first and answers with an error instead; elsewhere the bytes are copied.
"""

import errno
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from assay.loaders.mapped_file import map_file

POPULATE_READ = 22  # MADV_POPULATE_READ of Linux's mman.h, from 5.14 on; `mmap` has no name for it
HUGE = 1 << 21  # bytes of a large page: letting go of a part of one is slow
IN_PLACE = 1 << 23  # bytes of an array: between two of them threads wait for each other's turn at the interpreter
COPIED = 1 << 19  # the same where they are copied: into a buffer that stays in the second-level cache

Pieces = Callable[[int, int, int], Iterator[np.ndarray]]


def file_bytes(path: Path) -> Pieces:
    """A function of `begin`, `nbytes` and `unit`: these bytes of the file as uint8 arrays of so many units each.

    Any thread may call it. An array is good until the next one is asked for, which raises EOFError where the file ends
    before the bytes do, and OSError for what cannot be read. Raises CheckpointError for a file that cannot be opened.
    """
    mapping = map_file(path)
    if _brings_pages(mapping):
        return lambda begin, nbytes, unit: _in_place(mapping, begin, nbytes, IN_PLACE // unit * unit)
    return lambda begin, nbytes, unit: _copied(path, begin, nbytes, COPIED // unit * unit)


def _brings_pages(mapping: mmap.mmap) -> bool:
    if sys.platform != "linux":  # the number has another meaning there
        return False
    try:
        mapping.madvise(POPULATE_READ, 0, mmap.PAGESIZE)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def _in_place(mapping: mmap.mmap, begin: int, nbytes: int, most: int) -> Iterator[np.ndarray]:
    first, end = begin // mmap.PAGESIZE * mmap.PAGESIZE, begin + nbytes
    if end > len(mapping):
        raise EOFError
    try:
        mapping.madvise(POPULATE_READ, first, end - first)
    except OSError as error:
        if mapping.size() < end:
            raise EOFError from error
        raise OSError(errno.EIO, os.strerror(errno.EIO)) from error  # it says "bad address", which was fine
    for at in range(begin, end, most):
        yield np.frombuffer(mapping, np.uint8, min(most, end - at), at)
    if mapping.size() < end:  # behind a new end the last page shows zeros
        raise EOFError
    _let_go(mapping, begin, end)


def _let_go(mapping: mmap.mmap, begin: int, end: int) -> None:
    """Take bytes out of our memory, the rest of the large page where they begin too, of the one where they end none."""
    begin, end = begin // HUGE * HUGE, end // HUGE * HUGE
    if begin < end:
        mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _copied(path: Path, begin: int, nbytes: int, most: int) -> Iterator[np.ndarray]:
    buffer = np.empty(min(most, nbytes), np.uint8)
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        for done in range(0, nbytes, most):
            piece = buffer[: min(most, nbytes - done)]
            view = piece.data
            while view:  # one read of an ordinary file, unless a signal or a network file system splits it
                got = file.readinto(view)
                if not got:
                    raise EOFError
                view = view[got:]
            yield piece
