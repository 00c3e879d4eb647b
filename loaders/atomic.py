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
    try:
        _check_free(target, force)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror or error}", where=target) from error


def _check_free(target: Path, force: bool) -> None:
    if not target.absolute().parent.is_dir():
        raise CheckpointError("no such folder", where=target.absolute().parent)
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise CheckpointError("exists already", where=target, remedy=GIVE_FORCE)
    if target.is_dir() and any(target.iterdir()) and not _is_checkpoint(target):
        raise CheckpointError("a folder that is no checkpoint, which --force does not replace", where=target)
    if target.exists() and not target.is_dir() and not target.is_file():
        raise CheckpointError("neither a file nor a folder, so --force does not replace it", where=target)


def _is_checkpoint(folder: Path) -> bool:
    """Many a folder has a config.json, and more in it that nobody wants to lose."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


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
        _take_place(temporary, target)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror or error}", where=target) from error
    finally:
        with contextlib.suppress(OSError):  # a name may be too long even to be looked for
            temporary.unlink()


@contextlib.contextmanager
def replacing_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place once filled; nothing stays on failure or Ctrl-C."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        _take_place(temporary, target)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror or error}", where=target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, target: Path) -> None:
    """Rename to `target`; what was there goes only then, and comes back if the renaming ends early."""
    if not temporary.is_dir() and not target.is_dir():
        os.replace(temporary, target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        if os.path.lexists(target):
            os.replace(target, old)
        os.replace(temporary, target)
    finally:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.replace(old, target)
        elif old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        else:  # a file, or a link: what it points to stays
            old.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
