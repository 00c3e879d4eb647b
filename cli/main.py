"""The `assay` command: one module a verb, errors as one message, exit status 0, 1 or 2 as the contract says."""

import io
import os
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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Exits 0 matches, 1 diverges or invalid, 2 could not be carried out, 130 on Ctrl-C, 141 if nobody reads the output.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # text that a terminal's encoding has no characters for
    try:
        try:
            app(args=arguments, standalone_mode=True)
        finally:
            if sys.stdout is not None:  # a shell can close it
                sys.stdout.flush()  # now: what cannot be written is told below
    except CheckpointError as error:
        print(f"assay: {error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print("assay: out of memory; run fewer tokens, shorter --chunks or fewer --taps", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        _drop_output()
        if isinstance(error, BrokenPipeError):
            sys.exit(READER_GONE)
        told = error if error.filename else f"the output cannot be written: {error.strerror or error}"
        print(f"assay: {told}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as exit:
        if isinstance(exit.__context__, BrokenPipeError):  # which both typer and rich turn into status 1
            sys.exit(READER_GONE)
        raise


def _drop_output() -> None:
    """Let what is left in the buffer go nowhere: the interpreter flushes it once more as it ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
