"""assay mistakes: the catalogue that diagnosis starts from."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from assay.golden.mistakes import Mistake

EXAMPLE = "gpt-oss-20b"


def mistakes(
    id: Annotated[str | None, typer.Argument(help="One mistake, in full.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", help='Write the list as JSON; "-" for stdout.')] = None,
) -> None:
    """List the known mistakes that `assay check` looks for, or show one with the bugs behind it."""
    from assay.cli.shared import console, write_json
    from assay.golden.mistakes import FAMILIES, mistake_named

    shown = [mistake_named(id)] if id is not None else [m for family in FAMILIES.values() for m in family]
    family_of = {mistake.id: name for name, family in FAMILIES.items() for mistake in family}
    if json_file is not None:
        write_json([_as_json(mistake, family_of[mistake.id]) for mistake in shown], json_file)
    if json_file == "-":
        return
    if id is not None:
        _show(shown[0], family_of[id])
        return
    from rich.table import Table

    for name, family in FAMILIES.items():
        table = Table(title=f"{name} ({len(family)})", title_justify="left", box=None, pad_edge=False)
        for column in ("id", "what goes wrong", "first at", "to show, it needs", "bugs"):
            table.add_column(column, overflow="fold", no_wrap=column == "id")
        for mistake in family:
            needs = _needs(mistake)
            table.add_row(mistake.id, mistake.title, ", ".join(mistake.taps), needs, _counted(mistake.sources))
        console.print(table)
        console.print()
    console.print(f"{len(shown)} mistakes; one in full: assay mistakes ID")


def _show(mistake: "Mistake", family: str) -> None:
    from rich.markup import escape

    from assay.cli.shared import console

    console.print(f"[bold]{mistake.id}[/]  {escape(mistake.title)}  [dim]({family})[/]")
    console.print(escape(mistake.explanation))
    console.print(f"first at: {', '.join(mistake.taps)}")
    console.print(f"to show, it needs: {_needs(mistake) or 'one token'}")
    console.print(f"what to do: {escape(mistake.advice)}")
    if mistake.sources:
        console.print(f"seen in: {escape('; '.join(mistake.sources))}")


def _as_json(mistake: "Mistake", family: str) -> dict[str, Any]:
    fields = ("id", "title", "explanation", "taps", "advice", "sources")
    return {"family": family, "needs": _needs(mistake)} | {name: getattr(mistake, name) for name in fields}


def _needs(mistake: "Mistake") -> str:
    """What a prompt must have, with the numbers of a model that everybody knows."""
    from assay.loaders.registry import SHAPES

    needs = mistake.needs(SHAPES[EXAMPLE].config)
    parts = [f"{needs.tokens} tokens" + (f" ({EXAMPLE})" if needs.tokens > 3 else "")] * (needs.tokens > 1)
    parts += ["a second chunk"] * (needs.chunks > 1)
    return ", ".join([*parts, *([needs.else_] if needs.else_ else [])])


def _counted(sources: tuple[str, ...]) -> str:
    return str(sum(source.count("#") or 1 for source in sources)) if sources else ""
