"""The one kind of error that unreadable, inconsistent or unsupported input raises."""

from collections.abc import Sequence
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


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... ({len(text)} characters)"
