"""Files and directories that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from assay.loaders.errors import CheckpointError

GIVE_FORCE = "give --force to replace it"


def check_free(target: Path, force: bool) -> None:
    """Raise CheckpointError if something is at `target` that must not be replaced, or its folder is missing."""
    if not target.absolute().parent.is_dir():
        raise CheckpointError("no such folder", where=target.absolute().parent)
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise CheckpointError("exists already", where=target, remedy=GIVE_FORCE)
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise CheckpointError("a folder that is no checkpoint, which --force does not replace", where=target)


def check_room(target: Path, nbytes: int) -> None:
    """Raise CheckpointError if the disk of `target` has less than `nbytes` left."""
    free = shutil.disk_usage(target.absolute().parent).free
    if nbytes > free:
        raise CheckpointError(
            "not enough room on the disk", where=target, expected=f"{nbytes / 1e9:.2f} GB", got=f"{free / 1e9:.2f} GB"
        )


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place once written; nothing stays on failure or Ctrl-C."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror or error}", where=target) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place once filled; nothing stays on failure or Ctrl-C."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror or error}", where=target) from error
    finally:
        if old.exists() and not target.exists():  # stopped between the two renames
            os.replace(old, target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        if old.is_file():
            old.unlink()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
