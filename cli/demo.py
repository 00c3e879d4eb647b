"""assay demo: the main job on the bundled tiny gpt-oss: record, check, break, find."""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from assay.golden.check import Report
    from assay.golden.store import Golden
    from assay.loaders.checkpoint import Checkpoint


def demo(
    keep: Annotated[Path | None, typer.Option(help="Keep the golden in this folder, to try commands on.")] = None,
) -> None:
    """Show the main job on a bundled tiny gpt-oss, in under a minute.

    Records what every tensor should be, checks the Numba path against it, breaks one thing and finds it.

    Exit status: 0 if the clean run matches and the fault is found, 1 if not.
    """
    from assay.cli.shared import console, progress
    from assay.golden.backends import open_backend
    from assay.golden.errors import GoldenError
    from assay.golden.record import record
    from assay.golden.report import print_report
    from assay.golden.store import load_golden, save_golden
    from assay.golden.tiny_model import PROMPT, TINY
    from assay.loaders import open_checkpoint

    if keep is not None and not keep.is_dir():
        raise GoldenError("no such folder", where=keep)
    checkpoint = open_checkpoint(TINY)
    config = checkpoint.config
    layers = config.num_hidden_layers
    tokens = checkpoint.tokenizer.encode(PROMPT).ids

    console.rule("[bold]1. record what every tensor should be", align="left")
    console.print(
        f"A tiny gpt-oss with random weights ({layers} layers, {config.dims['N']} experts, "
        f"{config.dims['A']} of them per token, sliding window, sinks, YaRN) reads {len(tokens)} tokens. "
        "The oracle, plain NumPy in float64, computes every intermediate tensor and keeps it: a golden."
    )
    with tempfile.TemporaryDirectory() as scratch, progress("oracle", layers) as advance:
        folder = keep or Path(scratch)
        golden = record(checkpoint, open_backend("reference", checkpoint), tokens, beside=folder, progress=advance)
        golden = load_golden(save_golden(golden, folder / "tiny.safetensors"))
        console.print(f"{len(golden.taps)} tensors ([italic]taps[/]) recorded, from embed to logits.\n")

        console.rule("[bold]2. check a backend that is right", align="left")
        console.print(
            "The Numba path runs the same tokens in float32. Each of its tensors is compared with what the oracle "
            "makes of the backend's [italic]own[/] previous tensors, so every error is that of one step, "
            "and it is judged by the noise that float32 makes there."
        )
        clean, seconds = _checked(golden, checkpoint, checkpoint)
        _clean_summary(clean)
        console.print(f"[dim]({seconds:.1f} s, compiling included)[/]\n")

        console.rule("[bold]3. break one thing on purpose", align="left")
        console.print(
            "Now the same path with a known mistake: the ends of YaRN's ramp rounded to whole numbers, which "
            "llama.cpp and mlx-lm do to gpt-oss. No crash, no NaN, fluent text; just other numbers."
        )
        broken, _ = _checked(golden, checkpoint, _with_rounded_ramp(checkpoint))
        print_report(broken, console)
    _conclusion(broken, keep)
    found = broken.first_divergence
    as_it_should = clean.verdict == "match" and found is not None and found.tap == "layers.0.q_rope"
    raise typer.Exit(0 if as_it_should else 1)


def _with_rounded_ramp(checkpoint: "Checkpoint") -> "Checkpoint":
    """The same checkpoint with a config that rounds: the backend is handed the mistake, the oracle is not."""
    scaling = dataclasses.replace(checkpoint.config.rope_scaling, truncate=True)  # type: ignore[type-var]
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, rope_scaling=scaling))


def _checked(golden: "Golden", oracle: "Checkpoint", backend: "Checkpoint") -> tuple["Report", float]:
    """The Numba path on one checkpoint, checked against the oracle on another; and the seconds it took."""
    from assay.cli.shared import check_progress, progress
    from assay.golden.backends import open_backend
    from assay.golden.check import check
    from assay.golden.noise import profile_named

    started = time.perf_counter()
    layers = oracle.config.num_hidden_layers
    with progress("cpu (compiles at first)", layers) as advance:
        engine = open_backend("cpu", backend)
        taps = engine.run(golden.provenance.tokens, golden.provenance.chunks, golden.provenance.taps, advance)
    with check_progress(2 * layers) as (advance, search):
        report = check(golden, oracle, taps, "cpu", profile_named(engine.profile), advance, search)
    return report, time.perf_counter() - started


def _clean_summary(report: "Report") -> None:
    from assay.cli.shared import console
    from assay.golden.report import print_end_to_end, print_verdict

    print_verdict(report, console)
    worst = max(report.taps, key=lambda result: result.ratio or 0)
    console.print(
        f"{len(report.taps)} tensors, each within its allowance; the largest error is {worst.ratio:.1f} x the noise, "
        f"{worst.local_error:.1e}, at {worst.tap}"
    )
    print_end_to_end(report, console)


def _conclusion(broken: "Report", keep: Path | None) -> None:
    from assay.cli.shared import console

    wrong_end_to_end = sum((r.inherited_error or 0) > 1e-4 for r in broken.taps)
    wrong_locally = sum(r.verdict == "diverges" for r in broken.taps)
    console.print(
        f"\n[bold]What to read from this.[/] {wrong_end_to_end} of {len(broken.taps)} tensors carry a wrong value on, "
        f"but only {wrong_locally} are computed wrongly: q_rope and k_rope of each layer. Everything else does its own "
        "step right from wrong inputs. A plain comparison of two dumps cannot tell these apart."
    )
    golden = f"{keep}/tiny.safetensors" if keep else "GOLDEN"
    console.print(
        "\nNext, on your own model and engine:\n"
        "  assay record MODEL --prompt TEXT --out GOLDEN      GGUF, Hugging Face or MLX\n"
        f"  assay check {golden} --backend transformers\n"
        f"  assay check {golden} --dump TAPS.safetensors        tensors that your engine wrote",
        highlight=False,
    )
