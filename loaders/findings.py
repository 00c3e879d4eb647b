"""What is wrong with a checkpoint, one record a fault."""

from dataclasses import dataclass
from typing import Literal

from assay.loaders.errors import CheckpointError

Severity = Literal["error", "warning"]
Check = Literal["structure", "settings", "vocabulary", "values"]


@dataclass(frozen=True)
class Finding:
    """One fault. An `error` makes the checkpoint invalid; a `warning` is odd, but can be meant so.

    `check` is what looked for it. `byte` counts from the start of `file`.
    """

    severity: Severity
    check: Check
    what: str
    tensor: str | None = None
    file: str | None = None
    byte: int | None = None
    expected: str | None = None
    got: str | None = None


def from_error(error: CheckpointError, check: Check = "structure") -> list[Finding]:
    """A reader's error, once for each tensor that it names."""
    where = None if error.where is None else str(error.where)
    return [
        Finding("error", check, error.what, name, where, error.byte, error.expected, error.got)
        for name in error.tensors or (None,)
    ]
