"""The `assay` command: one module a verb, errors as one message, exit status 0, 1 or 2 as the contract says."""

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
        app(args=arguments, standalone_mode=True)
    except CheckpointError as error:
        print(f"assay: {error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print("assay: out of memory; run fewer tokens, shorter --chunks or fewer --taps", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
