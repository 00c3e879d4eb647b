"""What is wrong with a checkpoint, one record a fault, and the faults gathered while reading goes on."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from assay.loaders.errors import CheckpointError

Severity = Literal["error", "warning"]
Check = Literal["structure", "settings", "vocabulary", "values"]
MOST = 100  # faults of the structure


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


class TooManyFaultsError(Exception):
    """`MOST` faults are gathered: the rest of the file is not worth the time."""


class Faults:
    """A `Report` that gathers faults, the first of each tensor: its others may follow from that one."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._tensors: set[str] = set()

    def __call__(self, error: CheckpointError) -> None:
        for finding in from_error(error):
            self.add(finding)

    def hide(self, tensors: Set[str]) -> None:
        """Say nothing more of these tensors: what is wrong with their file is said."""
        self._tensors |= tensors

    def add(self, finding: Finding) -> None:
        """Raises TooManyFaultsError with the last that is kept."""
        if finding.tensor in self._tensors or finding in self.findings:
            return
        if finding.tensor is not None:
            self._tensors.add(finding.tensor)
        self.findings.append(finding)
        if len(self.findings) == MOST:
            raise TooManyFaultsError
