"""assay selftest: are known mistakes, made in a real backend, found and named?"""

from pathlib import Path
from typing import Annotated, Any

import typer


def selftest(
    model: Annotated[Path | None, typer.Option(help="The checkpoint; default: the bundled tiny gpt-oss.")] = None,
    profile: Annotated[str, typer.Option(help="The backend's numerics: float32, bfloat16 or q8.")] = "float32",
    golden: Annotated[
        Path | None, typer.Option(help="Instead: say which mistakes this golden's tokens and chunks can show.")
    ] = None,
    taps: Annotated[
        str | None, typer.Option(help="Globs of the taps that are handed over, as 'logits' or '*.block_out,logits'.")
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", help='Write the matrix as JSON; "-" for stdout.')] = None,
) -> None:
    """Make every known mistake in the Numba path and see whether `assay check` finds and names it.

    Exit status: 0 if all are found and a backend without a mistake matches, 1 if not.
    """
    from assay.cli.shared import console, messages, write_json
    from assay.golden.coverage import coverage
    from assay.golden.noise import profile_named
    from assay.golden.reach import reach_of
    from assay.golden.selftest import selftest as run
    from assay.golden.store import load_golden
    from assay.golden.tiny_model import TINY
    from assay.loaders import open_checkpoint

    checkpoint = open_checkpoint(model or TINY)
    if golden is not None:
        recorded, judged_by = load_golden(golden), profile_named(profile)
        result = coverage(recorded, checkpoint, judged_by)
        if taps is not None:
            result["reach"] = reach_of(recorded, checkpoint, taps, judged_by)
    else:
        with messages.status("") as status:
            result = run(checkpoint, profile, lambda id: status.update(id), taps=taps)
    if json_file is not None:
        write_json(result, json_file)
    if json_file != "-":
        if golden is not None:
            console.print(_coverage_text(result), soft_wrap=True, highlight=False)  # tokens to be copied as they are
        else:
            console.print(_table(result))
    if golden is None:
        raise typer.Exit(0 if result["found"] == result["injected"] and result["clean"] == "match" else 1)


def _table(result: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("injected", "first divergence", "cause", "x noise", "left", "runner-up"):
        table.add_column(column, overflow="fold", no_wrap=column in ("injected", "cause"))
    for row in result["rows"]:
        good = row["named"] and row["right_tap"]
        cause = row["cause"] or "unknown"
        tied = f" (or {', '.join(row['ambiguous_with'])})" if row["ambiguous_with"] else ""
        table.add_row(
            row["id"],
            row["tap"] or "[red]not found[/]",
            f"[{'green' if good else 'red'}]{cause}[/]{tied}",
            _number(row["ratio"]),
            _number(row["ratio_after"]),
            row["runner_up"] or "",
        )
    n = result["injected"]
    summary = (
        f"{result['found']} of {n} found, {result['right_tap']} at the right tap, {result['named']} named "
        f"({result['named_alone']} without a tie), noise of {result['profile']}; without a mistake: {result['clean']}"
    )
    return Group(table, summary)


def _coverage_text(result: dict[str, Any]) -> str:
    from assay.golden.coverage import LONGEST
    from assay.golden.report import reach_sentences

    lines = [f"{len(result['visible'])} mistakes can show on these {result['tokens']} tokens."]
    if result["hidden"]:
        lines.append("cannot show: " + ", ".join(entry["id"] for entry in result["hidden"]))
    if (suggestion := result["suggestion"]) is not None:
        tokens, chunks = (",".join(map(str, suggestion[key])) for key in ("tokens", "chunks"))
        lines.append(f"these {suggestion['length']} tokens show {len(suggestion['shows'])} more:")
        lines.append(f"--tokens {tokens} --chunks {chunks}")
        lines.append("namely: " + ", ".join(suggestion["shows"]))
    long = {e["id"]: e["needs"]["tokens"] for e in result["hidden"] if e["needs"]["tokens"] > LONGEST}
    lines += [f"{id} needs {length} tokens" for id, length in long.items()]
    if result.get("reach") is not None:
        lines += ["With these taps alone:", *reach_sentences(result["reach"], most=len(result["visible"]))]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
