"""assay convert: the same model in another container."""

import json
import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.loaders.errors import CheckpointError

if TYPE_CHECKING:
    from assay.loaders.convert import Change, Conversion, Progress


def convert(
    source: Annotated[Path, typer.Argument(help="GGUF file, or Hugging Face or MLX directory.")],
    target: Annotated[Path, typer.Argument(help="The GGUF file or the directory to write.")],
    to: Annotated[str, typer.Option("--to", help="gguf, safetensors (Hugging Face) or mlx.")],
    quant: Annotated[
        str | None, typer.Option(help="Encoding for matrices that are floats, e.g. Q8_0, affine4/64, mxfp4, BF16.")
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Largest safetensors file, 5GB unless said; a GGUF is one file.")
    ] = None,
    pre: Annotated[str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, where not found.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write a checkpoint in another container, every value kept unless --quant is given.

    Says of each tensor what became of it. Nothing is written over without --force, and nothing stays after a failure.

    Examples:

    assay convert gpt-oss-20b gpt-oss-20b.gguf --to gguf

    assay convert model.gguf model-mlx --to mlx --quant affine4/64
    """
    from assay.loaders import open_checkpoint
    from assay.loaders.convert import CONTAINERS
    from assay.loaders.convert import convert as write
    from assay.loaders.quantise import encoder_of

    to = chosen(to, "--to", CONTAINERS)
    encoder = None if quant is None else encoder_of(encoder_name(quant, to))
    shard_bytes = shard_bytes_from(shard_size, to)
    checkpoint = open_checkpoint(source)
    if pre is not None and (to != "gguf" or checkpoint.format == "gguf"):
        raise CheckpointError("--pre is for a GGUF made of a Hugging Face or MLX directory", remedy="leave it out")
    with transfer_progress() as progress:
        done = write(
            checkpoint, target, to, quant=encoder, shard_bytes=shard_bytes, force=force, pre=pre, progress=progress
        )
    if as_json:
        print(json.dumps(asdict(done) | {"path": str(done.path)}, indent=2))
    else:
        _print(done)


def chosen(value: str, option: str, allowed: Iterable[str]) -> str:
    """The value, if it is one of those allowed."""
    if value not in allowed:
        raise CheckpointError(f"unknown {option} {value!r}", expected=f"one of {', '.join(allowed)}")
    return value


def shard_bytes_from(text: str | None, to: str) -> int:
    """Bytes of the largest file from --shard-size; CheckpointError where it was given for a GGUF."""
    if text is not None and to == "gguf":
        raise CheckpointError(
            "--shard-size is for safetensors; a GGUF is written as one file",
            got=text,
            remedy="leave it out, and split the file with llama.cpp's llama-gguf-split",
        )
    return size_from(text or "5GB")


def encoder_name(quant: str, to: str) -> str:
    """The encoder that a name means in a container: MXFP4 is ggml's in a GGUF, mx.quantize's in MLX."""
    from assay.loaders.quantise import ENCODERS

    floats = ["F32", "F16", "BF16"]
    if to == "gguf":
        known = [name for name in ENCODERS if re.fullmatch(r"Q\d_\d|TQ.*|GGUF .*", name)]
    elif to == "mlx":
        known = [name for name in ENCODERS if name.startswith(("affine", "MLX "))]
    else:
        known = ["MXFP4"]
    short = {re.sub(r"^(GGUF|MLX) | \(by gguf-py\)$", "", name): name for name in known + floats}
    named = {name.lower(): full for name, full in short.items()}
    if quant.lower() not in named:
        remedy = None
        if to == "gguf" and re.fullmatch(r"(q\d_k(_[sml])?|iq\w+)", quant.lower()):  # gguf-py has no encoder for these
            remedy = (
                "convert to GGUF without --quant, or with --quant BF16, then: "
                f"llama-quantize MODEL.gguf MODEL-{quant.upper()}.gguf {quant.upper()}"
            )
        raise CheckpointError(f"no --quant {quant!r} for {to}", expected=f"one of {', '.join(short)}", remedy=remedy)
    return named[quant.lower()]


def size_from(text: str) -> int:
    """Bytes from a size such as 5GB or 500 MB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    value = float(match[1]) * 1000 ** " KMGT".index(match[2] or " ") if match else 0
    if not 1 <= value < float("inf"):
        raise CheckpointError(f"{text!r} is no size", expected="a number and KB, MB, GB or TB, e.g. 5GB")
    return int(value)


@contextmanager
def transfer_progress() -> Iterator["Progress"]:
    """A progress bar on stderr for work told as (what, done, total); silent when stderr is no terminal.

    Meanwhile a plain `kill`, or a terminal that is closed, ends the work as Ctrl-C does, so that no half-written
    files stay.
    """
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from assay.cli.shared import messages

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as it is under nohup
            signal.signal(ending, signal.default_int_handler)
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as bar:

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield advance


def _print(done: "Conversion") -> None:
    from rich.table import Table

    from assay.cli.shared import console

    table = Table(title="tensors", title_justify="left", box=None)
    table.add_column("canonical name", overflow="fold")
    has_errors = any(change.kept == "rounded" for change in done.changes)
    for column in ("encoding", "values", "median, worst error")[: 3 if has_errors else 2]:
        table.add_column(column, no_wrap=True)
    for name, change in _by_layer(done.changes):
        same = change.before == change.after
        row = name, change.before if same else f"{change.before} -> {change.after}", _kept(change), _errors(change)
        table.add_row(*row[: len(table.columns)])
    console.print(table)
    for layout, count in Counter(filter(None, map(_layout, done.changes))).items():
        console.print(f"layout of {count} tensors: {layout}", highlight=False)
    for note in done.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    before, after = (sum(getattr(c, key) for c in done.changes) for key in ("bytes_before", "bytes_after"))
    rounded = sum(change.kept == "rounded" for change in done.changes)
    verdict = f"{rounded} tensors rounded" if rounded else "every value kept"
    console.print(
        f"{done.path}: {done.format}, {len(done.changes)} tensors, {before / 1e6:,.1f} MB to {after / 1e6:,.1f} MB, "
        f"{verdict}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _kept(change: "Change") -> str:
    if change.kept == "rounded":
        return "rounded" if change.sqnr_db is None else f"SQNR {change.sqnr_db:.1f} dB"
    return {"bits": "same bits", "values": "same, -0 is +0"}[change.kept]


def _errors(change: "Change") -> str:
    """Median and worst relative error of an element; the worst is infinite where a zero became another number."""
    if change.kept != "rounded":
        return ""
    figures = (change.median_relative_error, change.worst_relative_error)
    return ", ".join("infinite" if figure is None else f"{figure:.1e}" for figure in figures)


def _layout(change: "Change") -> str:
    if change.layout_before == change.layout_after:
        return ""
    before, after = (", ".join(names) or "plain" for names in (change.layout_before, change.layout_after))
    return f"{before} -> {after}"


def _by_layer(changes: "Iterable[Change]") -> "list[tuple[str, Change]]":
    """Changes with those that are the same in several layers shown once, the least accurate of them."""
    groups: dict[tuple[Any, ...], list[Change]] = {}
    for change in changes:
        general = re.sub(r"model\.layers\.\d+\.", "layers.*.", change.name)
        key = general, change.before, change.after, change.kept, change.layout_before, change.layout_after
        groups.setdefault(key, []).append(change)
    rows = []
    for (general, *_), members in groups.items():
        worst = min(members, key=lambda c: float("inf") if c.sqnr_db is None else c.sqnr_db)
        rows.append((f"{general} (x{len(members)})" if len(members) > 1 else worst.name, worst))
    return rows
