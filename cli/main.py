"""The `assay` command: one module a verb, errors as one message, exit status 0, 1 or 2 as the contract says."""

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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits 0 matches, 1 diverges or invalid, 2 could not be carried out, 130 on Ctrl-C."""
    try:
        try:
            app(args=arguments, standalone_mode=True)
        finally:
            if sys.stdout is not None:  # closed by the shell: >&-
                sys.stdout.flush()
    except CheckpointError as error:
        print(f"assay: {error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print("assay: out of memory; run fewer tokens, shorter --chunks or fewer --taps", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer's 1 would say that something is invalid
            sys.exit(2)
        raise
    except OSError as error:
        _give_up_output()
        if not isinstance(error, BrokenPipeError):
            print(f"assay: {error}", file=sys.stderr)
        sys.exit(2)


def _give_up_output() -> None:
    """If standard output cannot be written, forget what is left of it: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
