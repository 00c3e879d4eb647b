"""assay check: is every tensor of a backend what it should be?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from assay.golden.detail import Details
    from assay.golden.noise import Profile
    from assay.golden.store import Golden
    from assay.loaders.checkpoint import Checkpoint


def check(
    golden: Annotated[Path, typer.Argument(help="A golden that `assay record` wrote.")],
    backend: Annotated[
        str | None,
        typer.Option(
            help="Run this backend: reference, cpu, metal, transformers, llama.cpp, mlx-lm, openai-torch or a plugin's."
        ),
    ] = None,
    dump: Annotated[
        Path | None, typer.Option(help="Or check taps that an engine wrote: docs/your-own-engine.md.")
    ] = None,
    names: Annotated[str | None, typer.Option(help="The dump's names: llama.cpp, hf, mlx, or MAP.json.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="The checkpoint; default: where the golden was recorded from.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="The backend's numerics, e.g. float32 or bfloat16.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Judge by this noise: float64, float32, bfloat16, float16.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="The profile's known deviations diverge too.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file that needs no network.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", help='Write the report as JSON; "-" for stdout.')] = None,
) -> None:
    """Check a backend, or another engine's dump, against a golden: tap by tap, each step by itself.

    Exit status: 0 matches, or differs only as the profile says by design; 1 diverges, 2 could not be carried out.

    Examples:

    assay check france.safetensors --backend cpu --html report.html

    assay check france.safetensors --dump my_engine.safetensors --names map.json --profile bfloat16 --json report.json
    """
    from assay.cli.shared import check_progress, console, progress, write_json
    from assay.golden.backends import open_backend
    from assay.golden.backends.dump import open_dump
    from assay.golden.check import check as check_taps
    from assay.golden.check import incomparable_tokens, require_same_checkpoint
    from assay.golden.errors import GoldenError
    from assay.golden.noise import profile_named
    from assay.golden.record import checkpoint_of
    from assay.golden.report import print_report
    from assay.golden.store import load_golden
    from assay.golden.weights import with_weights

    if (backend is None) == (dump is None):
        raise GoldenError("give either --backend or --dump")
    if names is not None and dump is None:
        raise GoldenError("--names goes with --dump")
    if mode is not None and backend is None:
        raise GoldenError("--mode goes with --backend; a dump is judged by --profile")
    if html is not None and not html.absolute().parent.is_dir():
        raise GoldenError("no such folder", where=html.absolute().parent)
    recorded = load_golden(golden)
    checkpoint = checkpoint_of(recorded, model)
    tokens, chunks = recorded.provenance.tokens, recorded.provenance.chunks
    report, versions = None, {}
    if dump is not None:
        opened = open_dump(
            dump,
            checkpoint.config if checkpoint else None,
            names,
            is_phi3=checkpoint is not None and checkpoint.is_phi3,
        )
        label, taps = str(dump), opened.taps
        judged_by = profile_named(profile or opened.profile)
        if opened.tokens is not None:
            report = incomparable_tokens(recorded, opened.tokens, label, judged_by)
    else:
        assert backend is not None
        if checkpoint is None:
            raise GoldenError(
                "a backend needs the checkpoint, and it is not where the golden was recorded from",
                where=recorded.provenance.checkpoint,
                remedy="give it with --model",
            )
        require_same_checkpoint(recorded, checkpoint)
        label = backend
        with progress(
            f"{backend} runs {len(tokens)} tokens", len(chunks) * checkpoint.config.num_hidden_layers
        ) as advance:
            engine = open_backend(backend, checkpoint, mode)
            taps = with_weights(engine.run(tokens, chunks, recorded.provenance.taps, advance), engine)
        judged_by, versions = profile_named(profile or engine.profile), dict(engine.versions)
    details = _details(recorded, checkpoint, judged_by) if html is not None else None
    if report is None:
        layers = checkpoint.config.num_hidden_layers if checkpoint else 0
        with check_progress(2 * len(chunks) * layers) as (advance, search):
            report = check_taps(
                recorded, checkpoint, taps, label, judged_by, advance, search, strict=strict, observe=details
            )
    report.versions = versions
    if json_file is not None:
        write_json(report.as_json(), json_file)
    if html is not None:
        from assay.golden.html.page import about_of, write_page

        write_page(html, report, details.taps if details else {}, about_of(recorded, checkpoint))
    if json_file != "-":
        print_report(report, console)
    raise typer.Exit({"match": 0, "known-deviation": 0, "diverges": 1, "incomparable": 2}[report.verdict])


def _details(golden: "Golden", checkpoint: "Checkpoint | None", profile: "Profile") -> "Details":
    from assay.golden.detail import Details

    layers = checkpoint.config.num_hidden_layers if checkpoint else None
    return Details(golden.provenance.tokens, profile.unit_roundoff, layers)
