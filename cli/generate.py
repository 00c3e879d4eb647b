"""assay generate: continue a prompt, token by token."""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from assay.loaders.checkpoint import Checkpoint
    from assay.reference.generate import Sampling, Step


def generate(
    path: Annotated[Path, typer.Argument(help="GGUF file, or Hugging Face or MLX directory.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    tokens: Annotated[str | None, typer.Option(help='Or token ids, "1,2,3" or @FILE.')] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k most likely; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens already seen less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same tokens.")] = 0,
    backend: Annotated[str, typer.Option(help="reference, cpu or metal.")] = "cpu",
    mode: Annotated[
        str | None,
        typer.Option(help="Numerics: exact or q8 (int8 inputs, faster) of cpu, float32 or bfloat16 of metal."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of cpu; default: one a core.")] = None,
) -> None:
    """Generate text, streamed as it comes; token ids where the checkpoint has no tokenizer.

    Example: assay generate SmolLM2.gguf --prompt "Gravity is" --max-tokens 24
    """
    from assay.cli.shared import messages, tokens_from
    from assay.golden.record import validated_tokens
    from assay.loaders import CheckpointError, open_checkpoint
    from assay.reference.generate import Sampling

    try:
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    checkpoint = open_checkpoint(path)
    ids = validated_tokens(tokens_from(checkpoint, prompt, tokens), checkpoint.config)
    room = checkpoint.config.max_position_embeddings - len(ids)
    if room < 1:
        raise CheckpointError(
            "the prompt fills the context", expected=f"fewer than {len(ids) + room} tokens", got=len(ids)
        )
    mode = _mode(backend, mode)
    chosen = _continuation(checkpoint, backend, mode, threads, ids, min(max_tokens, room), sampling)
    started, count, written = time.perf_counter(), 0, ""
    out: list[int] = []
    for token in chosen:
        out.append(token)
        count += 1
        if prompt is None:
            print(token, end=" ", flush=True)
            continue
        text = checkpoint.tokenizer.decode(out, skip_special_tokens=False)
        if not text.endswith("\ufffd"):  # an unfinished character: wait for its other bytes
            print(text[len(written) :], end="", flush=True)
            written = text
    if prompt is not None:
        print(checkpoint.tokenizer.decode(out, skip_special_tokens=False)[len(written) :], end="")
    print()
    seconds = time.perf_counter() - started
    messages.print(f"[dim]{count} tokens in {seconds:.1f} s by {backend}{f', mode {mode}' if mode else ''}[/]")


MODES = {"reference": (), "cpu": ("exact", "q8"), "metal": ("float32", "bfloat16")}  # the first is the default


def _mode(backend: str, mode: str | None) -> str:
    """The backend's mode: the one asked for, or its default; empty where it has none."""
    from assay.loaders import CheckpointError

    if backend not in MODES:
        raise CheckpointError(f"cannot generate with backend {backend!r}", expected="reference, cpu or metal")
    if mode is not None and mode not in MODES[backend]:
        known = ", ".join(MODES[backend]) or "none: it computes in float64"
        raise CheckpointError(f"backend {backend!r} has no mode {mode!r}", expected=known)
    return mode or next(iter(MODES[backend]), "")


def _continuation(
    checkpoint: "Checkpoint",
    backend: str,
    mode: str,
    threads: int | None,
    ids: list[int],
    limit: int,
    sampling: "Sampling",
) -> Iterator[int]:
    """Up to `limit` tokens after those given; the MLX path, where nothing is drawn, works a token ahead."""
    import numpy as np

    from assay.cli.shared import messages
    from assay.reference.generate import generate as continuation

    stop = frozenset(checkpoint.stop_tokens)
    if backend != "metal":
        return continuation(_step(checkpoint, backend, mode, threads), ids, limit, sampling, stop)
    from assay.fast.metal import MetalModel

    engine = MetalModel(checkpoint.config, checkpoint.tensors, mode)
    for notice in engine.notices:
        messages.print(f"[dim]metal: {notice}[/]")
    if sampling.temperature == 0 and sampling.repetition_penalty == 1:
        return _until(stop, islice(engine.greedy(np.array(ids)), limit))
    cache = engine.new_cache()
    return continuation(lambda new: engine.forward(new, cache=cache), ids, limit, sampling, stop)


def _until(stop: frozenset[int], tokens: Iterator[int]) -> Iterator[int]:
    """The tokens up to the first of `stop`, and that one."""
    for token in tokens:
        yield token
        if token in stop:
            return


def _step(checkpoint: "Checkpoint", backend: str, mode: str, threads: int | None) -> "Step":
    """An engine that remembers what it has run."""
    if backend == "reference":
        import assay.reference as reference

        model, past = checkpoint.model(), reference.KVCache()
        return lambda new: reference.forward(model, new, cache=past)
    from assay.fast.cpu.engine import CpuModel
    from assay.loaders import CheckpointError

    try:
        engine = CpuModel(checkpoint.config, checkpoint.tensors, mode=mode, threads=threads)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    cache = engine.new_cache()
    return lambda new: engine.forward(new, cache=cache)
