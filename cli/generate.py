"""assay generate: continue a prompt, token by token."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from assay.loaders.checkpoint import Checkpoint
    from assay.reference.generate import Step


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
    mode: Annotated[str, typer.Option(help="Numerics of cpu: exact (float32) or q8 (int8 inputs, faster).")] = "exact",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of cpu; default: one a core.")] = None,
) -> None:
    """Generate text, streamed as it comes; token ids where the checkpoint has no tokenizer.

    Example: assay generate SmolLM2.gguf --prompt "Gravity is" --max-tokens 24
    """
    from assay.cli.shared import messages, tokens_from
    from assay.golden.record import validated_tokens
    from assay.loaders import CheckpointError, open_checkpoint
    from assay.reference.generate import Sampling
    from assay.reference.generate import generate as continuation

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
    step = _step(checkpoint, backend, mode, threads)
    started, count, written = time.perf_counter(), 0, ""
    out: list[int] = []
    for token in continuation(step, ids, min(max_tokens, room), sampling, frozenset(checkpoint.stop_tokens)):
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
    how = f", mode {mode}" if backend == "cpu" else ""
    messages.print(f"[dim]{count} tokens in {seconds:.1f} s by {backend}{how}[/]")


def _step(checkpoint: "Checkpoint", backend: str, mode: str, threads: int | None) -> "Step":
    """An engine that remembers what it has run."""
    from assay.loaders import CheckpointError

    if backend == "reference":
        import assay.reference as reference

        model, past = checkpoint.model(), reference.KVCache()
        return lambda new: reference.forward(model, new, cache=past)
    if backend == "cpu":
        from assay.fast.cpu.engine import CpuModel

        try:
            engine = CpuModel(checkpoint.config, checkpoint.tensors, mode=mode, threads=threads)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        cache = engine.new_cache()
        return lambda new: engine.forward(new, cache=cache)
    if backend == "metal":
        from assay.fast.metal import MetalModel

        model_mlx = MetalModel(checkpoint.config, checkpoint.tensors)
        cache_mlx = model_mlx.new_cache()
        return lambda new: model_mlx.forward(new, cache=cache_mlx)
    raise CheckpointError(f"cannot generate with backend {backend!r}", expected="reference, cpu or metal")
