"""Run the command line inside this process."""

import contextlib
import io
from dataclasses import dataclass

import pytest

from assay.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a user would see."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Standard output with line breaks and columns joined by single spaces."""
        return " ".join(self.out.split())


def run(*arguments: object) -> Result:
    """`assay ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return Result(int(exit.value.code or 0), out.getvalue(), err.getvalue())


def refused(*arguments: object) -> str:
    """The message of a command that cannot be carried out: status 2, one message on stderr, nothing on stdout."""
    result = run(*arguments)
    assert result.status == 2, result
    assert result.out == ""
    assert result.err.startswith("assay: ")
    assert "Traceback" not in result.err
    return result.err
