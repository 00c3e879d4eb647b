"""Files mapped into memory, read-only."""

import mmap
from pathlib import Path

from assay.loaders.errors import CheckpointError

DAMAGED = "the file is cut short or damaged: fetch it again and compare its size"


def map_file(path: Path) -> mmap.mmap:
    """The whole file mapped read-only; raises CheckpointError for a missing, unreadable or empty one."""
    try:
        if not path.is_file():  # also keeps us from waiting on a pipe
            raise CheckpointError("no such file", where=path)
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise CheckpointError("the file is empty (0 bytes)", where=path, remedy="fetch it again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=path) from error
    if data[:24] == b"version https://git-lfs.":
        raise CheckpointError("a Git LFS pointer, not the file itself", where=path, remedy="run `git lfs pull`")
    return data
