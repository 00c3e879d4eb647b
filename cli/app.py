"""The verbs, a module each, and what is told of an error: one message, and the exit status that the contract says."""

import errno
import io
import sys

import typer

from assay.cli import (
    check,
    convert,
    demo,
    generate,
    inspect,
    mistakes,
    record,
    selftest,
    synth,
    vectors,
    verify,
    warmup,
)
from assay.cli.main import drop, tell
from assay.loaders.errors import CheckpointError

app = typer.Typer(
    name="assay",
    help="Does an LLM inference backend compute the right numbers, and if not, at which tensor does it stop?",
    epilog="Start with: assay demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command()(inspect.inspect)
app.command()(record.record)
app.command()(check.check)
app.command()(generate.generate)
app.command()(mistakes.mistakes)
app.command()(selftest.selftest)
app.command()(convert.convert)
app.command()(synth.synth)
app.command()(verify.verify)
app.command()(warmup.warmup)
app.command()(vectors.vectors)


READER_GONE = 141  # as a shell says of a program that SIGPIPE ended
OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # nothing that is read has these


def run(arguments: list[str] | None = None) -> None:
    """Carry out a command; exits 0, 1 or 2 as the contract says, 130 on Ctrl-C, 141 if nobody reads the output."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # text that a terminal's encoding has no characters for
    try:
        try:
            app(args=arguments, standalone_mode=True)
        finally:
            if sys.stdout is not None:  # a shell can close it
                sys.stdout.flush()  # now: what cannot be written is told below
    except CheckpointError as error:
        tell(str(error))
        sys.exit(2)
    except OSError as error:
        is_output = error.filename is None and (error.errno in OF_WRITING or _cannot_be_flushed())
        if sys.stdout is not None:
            drop(sys.stdout)
        if isinstance(error, BrokenPipeError):
            sys.exit(READER_GONE)
        if not is_output:
            raise
        tell(f"the output cannot be written: {error.strerror}")
        sys.exit(2)
    except SystemExit as exit:
        if isinstance(exit.__context__, BrokenPipeError):  # which both typer and rich turn into status 1
            sys.exit(READER_GONE)
        raise


def _cannot_be_flushed() -> bool:
    """Whether it was standard output that could not be written: then it is still in the buffer, and fails again."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        return True
    return False
