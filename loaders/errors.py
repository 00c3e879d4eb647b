"""The one kind of error that unreadable, inconsistent or unsupported input raises, and what to do with it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LONGEST = 600  # characters of one line: a hostile name or value must not fill the terminal


class CheckpointError(ValueError):
    """Bad input, said in one message: what is wrong, where, and where it helps expected, got and the remedy.

    `byte` is the place in the file `where`, `tensors` the names of those concerned.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        byte: int | None = None,
        tensors: Sequence[str] = (),
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ):
        self.what, self.where, self.byte, self.tensors = _short(what), where, byte, tuple(tensors)
        self.expected = None if expected is None else _short(str(expected))
        self.got = None if got is None else _short(str(got))
        self.remedy = remedy
        place = where if byte is None else f"{where}, byte {byte}"
        lines = [self.what if where is None else f"{place}: {self.what}"]
        if expected is not None:
            lines.append(f"  expected: {self.expected}")
        if got is not None:
            lines.append(f"  got: {self.got}")
        if remedy is not None:
            lines.append(f"  what to do: {remedy}")
        super().__init__("\n".join(lines))


Report = Callable[[CheckpointError], None]  # is handed a fault, and returns if reading is to go on without that part


def refuse(error: CheckpointError) -> None:
    """What opening does with a fault: reading ends there."""
    raise error


@contextmanager
def reporting(report: Report) -> Iterator[None]:
    """Hand the error that ends the block to `report`; what follows the block may then lack what was to be read."""
    try:
        yield
    except CheckpointError as error:
        report(error)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... ({len(text)} characters)"
