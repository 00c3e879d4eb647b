"""The report of a check in the terminal."""

import itertools
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from assay.golden.check import Report, TapResult
from assay.golden.measure import ALLOWANCE
from assay.reference.taps import kind_of

LISTED = 6  # mistakes of each sort that the text names

VERDICT_STYLE = {
    "match": "bold green",
    "diverges": "bold red",
    "incomparable": "bold yellow",
    "known-deviation": "bold green",
}


def print_report(report: Report, console: Console) -> None:
    """Verdict, first divergence with its evidence, a table of taps, end-to-end figures."""
    print_verdict(report, console)
    if report.verdict == "incomparable":
        return
    print_taps(report, console)
    print_end_to_end(report, console)


def print_verdict(report: Report, console: Console) -> None:
    """The verdict; if it diverges, where first, by how much, and what the error looks like."""
    style = VERDICT_STYLE[report.verdict]
    console.print(
        f"[{style}]{report.verdict}[/]  {escape(report.backend)}, judged by the noise of {report.profile}",
        highlight=False,
    )
    if report.reason:
        console.print(escape(report.reason), highlight=False)
    if report.ignored:
        console.print(f"[bold yellow]ignored:[/] {escape(ignored_sentence(report.ignored))}", highlight=False)
    if report.not_checked and report.first_divergence is None:
        _print_not_checked(report, console)
    for deviation in report.deviations:
        _indented(
            console,
            f"by design: {escape(deviation['title'])} ({deviation['id']}), first at {deviation['first']}, "
            f"KL {deviation['kl_nats']:.2g} nats, most likely token changed at {deviation['top1_changes']} of "
            f"{deviation['of']} positions",
        )
    if report.first_divergence is not None:
        _print_divergence(report, report.first_divergence, console)


def print_taps(report: Report, console: Console) -> None:
    """The table of taps and how to read it."""
    console.print(_table(report))
    if report.scope == "forced":
        console.print(
            f"[dim]each row shows its worst layer; local: the error of this step alone, from the backend's own inputs; "
            f"inherited: what it brought along; allowed: {ALLOWANCE:g} x noise[/]"
        )


def print_end_to_end(report: Report, console: Console) -> None:
    """What the differences do to the predictions, and what was not looked at."""
    if report.logits:
        logits = report.logits
        console.print(
            f"end to end: KL {logits['kl_nats']:.3g} nats, same most likely token at "
            f"{100 * logits['top1_agreement']:.1f} % of positions, regret {logits['regret_nats']:.3g} nats"
        )
    if report.routing:
        routing = report.routing
        shown = f"{routing['flips']} of {routing['choices']} choices of experts differ from the golden's"
        console.print(
            f"routing: {shown if routing['choices'] else 'no choices of experts were handed over'}"
            + (f", largest margin {routing['largest_margin']:.3g}" if routing["flips"] else "")
            + (f"; {routing['followed']} near ties followed" if routing.get("followed") else "")
            + (f"; {routing['open']} not shown, that noise may have decided" if routing.get("open") else "")
        )
    if report.not_checked and report.first_divergence is not None:
        _print_not_checked(report, console)
    spanned = [name for name in report.not_supplied if name not in report.not_checked]
    if spanned:
        console.print(f"[dim]not supplied, spanned by the next tap: {escape(shortened(spanned))}[/]")
        coarsest = max(report.taps, key=lambda result: len(result.spans))
        if coarsest.spans and coarsest.detectable is not None:
            console.print(
                f"[dim]{escape(coarsest.tap)} stands for {len(coarsest.spans) + 1} steps: "
                f"an error of less than {coarsest.detectable:.2g} of it would not show[/]"
            )
    if report.reach is not None:
        console.print(f"[dim]{escape(' '.join(reach_sentences(report.reach)))}[/]", highlight=False)
    partial = [result for result in report.taps if result.positions is not None]
    if partial:
        count = len(partial[-1].positions or ())
        names = shortened([result.tap for result in partial])
        console.print(f"[dim]not computed for all positions, only for {count}: {escape(names)}[/]")


def reach_sentences(reach: dict[str, Any], most: int = LISTED) -> Iterable[str]:
    """Which known mistakes the taps supplied can show, and which hide or look alike: at most so many of each."""
    hides, alike, not_tried = reach["hides"], reach["alike"], reach["not_tried"]
    tried = len(reach["shows"]) + len(hides)
    if tried:
        yield f"Of {tried} known mistakes in steps without a tap of their own {len(reach['shows'])} would show."
    if hides:
        yield f"May not show here: {_listed(hides, most)}."
    if alike:
        yield f"Not to be told apart here: {_listed([' = '.join(group) for group in alike], most)}."
    if not_tried:
        yield (
            f"{len(not_tried)} {'more' if tried else 'known mistakes'} were not tried, to keep the check short: "
            "`assay selftest --golden GOLDEN --taps GLOB` tries all."
        )


def ignored_sentence(names: list[str]) -> str:
    """That some tensors were not looked at, and what to do."""
    count = "one tensor that is no tap" if len(names) == 1 else f"{len(names)} tensors that are no taps"
    return f"{count} of this model: {_listed(names, LISTED)}. A map of names is given with --names MAP.json."


def _listed(names: list[str], most: int) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _print_not_checked(report: Report, console: Console) -> None:
    count = len(report.not_supplied) + sum(not result.tap.startswith("weights.") for result in report.taps)
    console.print(
        f"[bold yellow]not checked: {len(report.not_checked)} of {count} steps[/], since no tap handed over is "
        f"computed from them: {escape(by_layers(report.not_checked))}",
        highlight=False,
    )


def _print_divergence(report: Report, first: TapResult, console: Console) -> None:
    console.print(f"[bold]first divergence: {escape(first.tap)}[/]", highlight=False)
    if first.nonfinite:
        _indented(console, f"{first.nonfinite} values are not finite")
    if first.local_error is not None and first.ratio is not None and first.noise is not None:
        _indented(
            console,
            f"local error {first.local_error:.3g}, [bold]{_ratio(first.ratio)} x[/] the {report.profile} noise floor "
            f"({first.noise:.2g})",
        )
    if first.worst is not None:
        worst = first.worst
        expected, got = _value(worst["expected"]), _value(worst["got"])
        _indented(console, escape(f"worst at {worst['index']}: expected {expected}, got {got}"))
    if first.spans:
        _indented(console, escape(spanned_sentence(first.tap, first.spans)))
    if report.cause is not None:
        _print_cause(report.cause, console)
    elif report.scope == "forced":
        _indented(console, f"cause unknown: {none_fits(report)}")
    if report.structure is not None:
        for line in structure_lines(report.structure, report.cause is not None):
            _indented(console, escape(line))


def spanned_sentence(tap: str, spans: list[str]) -> str:
    """That a tap which diverges is the first that was handed over of several steps."""
    return (
        f"{len(spans) + 1} steps are judged together here, from {spans[0]} to {tap}: hand over taps between them "
        "to see which is wrong"
    )


def none_fits(report: Report) -> str:
    """Why there is no cause, in words."""
    if report.untried:
        return f"none of the mistakes tried leaves these values, but the search ended before {report.untried} others"
    return "no mistake in the catalogue leaves these values, nor any pair of them that was tried"


def _print_cause(cause: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]cause: {escape(cause['title'])}[/]  ({escape(cause['id'])})", highlight=False)
    _indented(console, escape(cause["explanation"]))
    _indented(
        console,
        f"with it in the oracle it falls from {cause['residual_before']:.2g} to {cause['residual_after']:.2g}, "
        f"{_ratio(cause['ratio_after'])} x noise; {cause['explained']['taps']} of {cause['explained']['of']} taps "
        "looked at are explained",
    )
    if cause["ambiguous_with"]:
        _indented(console, f"not to be told apart on these tokens: {', '.join(cause['ambiguous_with'])}")
    if cause["runner_up"] is not None:
        runner_up = cause["runner_up"]
        _indented(console, f"[dim]runner-up: {runner_up['id']}, leaves {runner_up['residual_after']:.2g}[/]")
    _indented(console, f"[bold]what to do:[/] {escape(cause['advice'])}")
    if cause["sources"]:
        _indented(console, f"[dim]seen in: {escape('; '.join(cause['sources']))}[/]")


def _indented(console: Console, markup: str) -> None:
    """A line that stays indented where it is wrapped."""
    console.print(Padding.indent(Text.from_markup(markup), 2))


def _value(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def structure_line(structure: dict[str, Any]) -> str:
    """What an error looks like, in one line."""
    return str(structure["sentence"])


def structure_lines(structure: dict[str, Any], explained: bool = False) -> Iterable[str]:
    """What the error looks like: the sentence, where it is, and the patterns that come nearest.

    Of an error whose cause is known only a pattern that fits is worth telling.
    """
    if explained and str(structure["sentence"]).startswith("no pattern"):
        return
    yield f"what it looks like: {structure_line(structure)}"
    for entry in structure["patterns"][1:3]:
        also = "also fits" if entry["fits"] else f"leaves {_ratio(entry['residual'])} x noise"
        yield f"  {also}: {entry['sentence']}"


def _table(report: Report) -> Table:
    """One row for each kind of tap, with the figures of its worst layer."""
    table = Table(box=None, pad_edge=False)
    table.add_column("tap", no_wrap=True)
    for column in ("local", "inherited", "noise", "x noise", "layer"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for kind, results in _by_kind(report.taps):
        worst = max(results, key=lambda r: (r.nonfinite > 0, r.ratio if r.ratio is not None else 0.0))
        layer = worst.tap.split(".")[1] if worst.tap.startswith("layers.") else ""
        layer = worst.tap.split(".")[3] if worst.tap.startswith("weights.model.layers.") else layer
        bad = sum(r.verdict == "diverges" for r in results)
        known = any(r.verdict == "known-deviation" for r in results)
        mark = f"[red]diverges {bad}/{len(results)}[/]" if bad else "[green]by design[/]" if known else "[green]ok[/]"
        numbers = [_number(value) for value in (worst.local_error, worst.inherited_error, worst.noise)]
        table.add_row(escape(kind), *numbers, _ratio(worst.ratio), layer, mark)
    return table


def _by_kind(results: Iterable[TapResult]) -> list[tuple[str, list[TapResult]]]:
    """Taps grouped by their name within a layer, in the order of computation."""
    groups: dict[str, list[TapResult]] = {}
    for result in results:
        kind = "weights" if result.tap.startswith("weights.") else kind_of(result.tap)
        groups.setdefault(kind, []).append(result)
    return list(groups.items())


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


def shortened(names: list[str]) -> str:
    """Tap names with `layers.{i}.` taken together."""
    kinds = dict.fromkeys(name if not name.startswith("layers.") else f"layers.*.{kind_of(name)}" for name in names)
    return ", ".join(kinds)


def by_layers(names: list[str]) -> str:
    """Tap names, those of a layer together, and neighbouring layers that have the same ones."""
    groups: list[tuple[int | None, int | None, list[str]]] = []  # first and last layer, kinds
    for layer, found in itertools.groupby(names, lambda name: name.split(".")[1] if "." in name else None):
        kinds = [kind_of(name) for name in found]
        i = None if layer is None else int(layer)
        if groups and i is not None and groups[-1][1] == i - 1 and groups[-1][2] == kinds:
            groups[-1] = groups[-1][0], i, kinds
        else:
            groups.append((i, i, kinds))
    return "; ".join(f"{_layers(first, last)}{', '.join(kinds)}" for first, last, kinds in groups)


def _layers(first: int | None, last: int | None) -> str:
    return "" if first is None else f"layer {first}: " if first == last else f"layers {first} to {last}: "
