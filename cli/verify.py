"""assay verify: is a checkpoint whole, and does it hold the same weights as another?"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.loaders.errors import CheckpointError

if TYPE_CHECKING:
    from assay.loaders.compare import Comparison, Difference
    from assay.loaders.verify import Verification


def verify(
    path: Annotated[Path, typer.Argument(help="GGUF file, or Hugging Face or MLX directory.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Look at headers and settings only, not at every value.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    same_as: Annotated[
        Path | None, typer.Option("--same-as", help="Another checkpoint: prove that both hold the same weights.")
    ] = None,
) -> None:
    """Check that a checkpoint is whole and consistent, or that it holds the same weights as another.

    Exit status: 0 good (or the same), 1 faults found (or different), 2 could not be carried out.

    Examples:

    assay verify gpt-oss-20b.gguf

    assay verify gpt-oss-20b.gguf --same-as gpt-oss-20b-hf/
    """
    if same_as is not None:
        if quick:
            raise CheckpointError("--quick and --same-as exclude each other: weights are compared value by value")
        raise typer.Exit(_compare(path, same_as, as_json))
    from assay.loaders.verify import verify as verify_checkpoint

    with _byte_progress(f"reading {path.name}") as progress:
        result = verify_checkpoint(path, quick=quick, progress=progress)
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        _print(result)
    raise typer.Exit(0 if result.is_good else 1)


@contextlib.contextmanager
def _byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr that counts bytes; silent when stderr is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from assay.cli.shared import messages

    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(result: "Verification") -> None:
    from rich.table import Table

    from assay.cli.shared import console, lines

    faults = sum(finding.severity == "error" for finding in result.findings)
    odd = len(result.findings) - faults
    size = f"{result.tensors} tensors, {result.bytes / 1e6:,.1f} MB in {result.files} file{'s' * (result.files != 1)}"
    looked = "headers and settings only" if result.quick else f"every value, {result.seconds:.1f} s"
    verdict = f"{faults} fault{'s' * (faults != 1)}" if faults else "good"
    warned = f", {odd} warning{'s' * (odd != 1)}" if odd else ""
    console.print(f"{result.path}: {verdict}{warned} ({size}; {looked})", highlight=False, markup=False, soft_wrap=True)
    if not result.findings:
        return
    table = Table("", "where", "what", box=None, pad_edge=False)
    for finding in result.findings:
        place = Path(finding.file).name if finding.file else ""
        place += "" if finding.byte is None else f", byte {finding.byte}"
        expected = "" if finding.expected is None else f"expected: {finding.expected}"
        got = "" if finding.got is None else f"got: {finding.got}"
        table.add_row(finding.severity, lines(finding.tensor, place), lines(finding.what, expected, got))
    console.print(table, highlight=False)


def _compare(path: Path, same_as: Path, as_json: bool) -> int:
    """Print the comparison; answers the exit status."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from assay.cli.shared import messages
    from assay.loaders import open_checkpoint
    from assay.loaders.compare import compare

    a, b = open_checkpoint(path), open_checkpoint(same_as)
    columns = TextColumn("comparing"), BarColumn(), MofNCompleteColumn(), TextColumn("tensors")
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as bar:
        task = bar.add_task("", total=len(a.tensors))
        result = compare(a, b, lambda name: bar.advance(task))
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        _print_comparison(result)
    return 0 if result.is_same else 1


def _print_comparison(result: "Comparison") -> None:
    from rich.table import Table

    from assay.cli.shared import console, lines

    console.print(f"A  {result.a}\nB  {result.b}", highlight=False, markup=False, soft_wrap=True)
    count = len(result.sha256)
    if result.is_same:
        console.print(f"the same: {count} tensors, every bit of every decoded value; every config field")
        return
    console.print(f"different: {len(result.differences)} of {count} tensors, {len(result.config)} config fields")
    table = Table("", "difference", box=None, pad_edge=False, show_header=False)
    for name, (a, b) in result.config.items():
        table.add_row(lines(name), lines(f"A: {a}", f"B: {b}"))
    for difference in result.differences:
        first, values = difference.first, difference.values
        at = f"first at {list(first)}: {values[0]} in A, {values[1]} in B" if first is not None and values else ""
        table.add_row(lines(difference.name), lines(difference.what, at, _why(difference)))
    console.print(table, highlight=False)


def _why(difference: "Difference") -> str:
    """The explanation, or how far off the tensor is."""
    if difference.explanation is not None or difference.relative_error is None:
        return difference.explanation or ""
    a, b = difference.encodings
    lossy = f": {a} in A, {b} in B" if a != b else ", and no known change explains it"
    return f"off by {difference.relative_error:.2g} of A's norm{lossy}"
