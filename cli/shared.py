"""What several verbs need: the console, token arguments, progress bars, JSON files."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from assay.loaders.errors import CheckpointError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from assay.loaders.checkpoint import Checkpoint

console = Console()
messages = Console(stderr=True)


def tokens_from(checkpoint: "Checkpoint", prompt: str | None, tokens: str | None) -> list[int]:
    """Token ids from --prompt (by the checkpoint's tokenizer; "-" reads it) or from --tokens, "1,2,3" or @FILE."""
    if (prompt is None) == (tokens is None):
        raise CheckpointError("give either --prompt or --tokens")
    if prompt is not None:
        return list(checkpoint.tokenizer.encode(text_of("--prompt", prompt)).ids)
    assert tokens is not None
    text = tokens
    if tokens.startswith("@"):
        try:
            text = Path(tokens[1:]).read_text("utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=tokens[1:] or "@") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"cannot be read: {error}", where=tokens[1:]) from error
    words = re.split(r"[\s,\[\]]+", text.strip())
    try:
        return [int(word) for word in words if word]
    except ValueError as error:
        raise CheckpointError("--tokens must be integers, separated by commas or spaces", got=text[:60]) from error


def text_of(option: str, text: str) -> str:
    """An option's text: its own, or for "-" what standard input holds, without the line break that ends it."""
    try:
        if text == "-":
            return _standard_input(option).decode().removesuffix("\n").removesuffix("\r")
        # bytes that are no text in the locale are handed on by Python as surrogates: in an ASCII one, all UTF-8 is
        return os.fsencode(text).decode() if any("\ud800" <= c <= "\udfff" for c in text) else text
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{option} is not UTF-8: {error.reason} at position {error.start}") from error


def _standard_input(option: str) -> bytes:
    try:
        if sys.stdin is not None:  # a shell can close it
            return sys.stdin.buffer.read()
        why = "it is closed"
    except OSError as error:
        why = error.strerror or str(error)
    raise CheckpointError(f"{option} - reads standard input, which cannot be read: {why}", remedy="pipe a text into it")


def lengths_from(chunks: str | None) -> list[int] | None:
    """Chunk lengths from --chunks, "1,8,..."."""
    if chunks is None:
        return None
    try:
        return [int(word) for word in chunks.replace("...", "").split(",") if word.strip()]
    except ValueError as error:
        raise CheckpointError("--chunks must be integers, separated by commas", got=chunks) from error


def lines(*texts: str | None) -> Text:
    """Texts from a file, a line each: control characters visible, and no markup taken from it."""
    shown = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in text) for text in texts if text)
    return Text("\n".join(shown), overflow="fold")


Advance = Callable[[str], None]


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """A progress bar on stderr that advances by one for each block_out tap; silent when stderr is no terminal."""
    with _bars() as bars:
        yield _by_layer(bars, label, total)


@contextlib.contextmanager
def check_progress(total: int) -> Iterator[tuple[Advance, Callable[[int, int], None]]]:
    """The same for a check's forced passes, and a bar of its own for the search of causes: so many tried, of so many.

    The second comes only when it is called.
    """
    with _bars() as bars:
        searches: list[TaskID] = []

        def search(tried: int, of: int) -> None:
            if not searches:
                searches.append(bars.add_task("search for the cause", unit="mistakes"))
            bars.update(searches[0], completed=tried, total=of)

        yield _by_layer(bars, "forced pass", total), search


def _bars() -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal)


def _by_layer(bars: "Progress", label: str, total: int) -> Advance:
    task = bars.add_task(label, total=total, unit="layers")

    def advance(name: str) -> None:
        if name.endswith("block_out"):
            bars.advance(task)

    return advance


def write_json(value: Any, path: str) -> None:
    """Write JSON to a file, whole or not at all, or to standard output for "-"."""
    text = json.dumps(value, indent=2, allow_nan=False)
    if path == "-":
        sys.stdout.write(text + "\n")
        return
    from assay.golden.store import replacing

    with replacing(Path(path)) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def free_memory() -> int:
    """Bytes that can be had without swapping; where the system does not say, all there is."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
