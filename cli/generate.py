"""assay generate: continue a prompt, token by token."""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np

    from assay.fast.cpu import CpuCache
    from assay.fast.cpu.engine import CpuModel
    from assay.fast.speculate import Guesses
    from assay.loaders.checkpoint import Checkpoint
    from assay.reference.config import Config
    from assay.reference.generate import Sampling, Step


def generate(
    path: Annotated[Path, typer.Argument(help="GGUF file, or Hugging Face or MLX directory.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; - reads standard input.")] = None,
    tokens: Annotated[str | None, typer.Option(help='Or token ids, "1,2,3" or @FILE.')] = None,
    chat: Annotated[
        str | None, typer.Option(help="Or what a user says (- too), put into the checkpoint's chat template.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k most likely; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens already seen less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same tokens.")] = 0,
    backend: Annotated[str, typer.Option(help="reference, cpu or metal.")] = "cpu",
    mode: Annotated[
        str | None,
        typer.Option(
            help="Numerics: exact or q8 (int8 inputs, faster) of cpu, exact-f16 or q8-f16 with keys and values in "
            "float16 (half the memory); float32 or bfloat16 of metal."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of cpu; default: one a core.")] = None,
    guess: Annotated[
        int,
        typer.Option("--speculate", min=0, help="Guess so many tokens ahead from the text itself; greedy cpu, exact."),
    ] = 0,
) -> None:
    """Generate text, streamed as it comes; token ids where the checkpoint has no tokenizer.

    Ctrl-C ends it with what there is. `--speculate` changes the time, never the tokens.

    Standard input is UTF-8, taken as it is but for one line break at its end.

    Examples:

    assay generate SmolLM2.gguf --prompt "Gravity is" --max-tokens 24

    assay generate SmolLM2.gguf --chat "What is gravity?" --mode q8

    assay generate SmolLM2.gguf --prompt - < question.txt
    """
    from assay.cli.shared import messages, tokens_from
    from assay.fast.speculate import Guesses
    from assay.golden.record import validated_tokens
    from assay.loaders import CheckpointError, open_checkpoint
    from assay.reference.generate import Sampling

    try:
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    checkpoint = open_checkpoint(path)
    given = tokens_from(checkpoint, prompt, tokens) if chat is None else _chat_tokens(checkpoint, chat, prompt, tokens)
    ids = validated_tokens(given, checkpoint.config)
    room = checkpoint.config.max_position_embeddings - len(ids)
    if room < 1:
        raise CheckpointError(
            "the prompt fills the context", expected=f"fewer than {len(ids) + room} tokens", got=len(ids)
        )
    mode = _mode(backend, mode)
    if threads is not None and backend != "cpu":
        raise CheckpointError("--threads goes with --backend cpu", got=f"--backend {backend}")
    limit = min(max_tokens, room)
    require_memory(checkpoint.config, len(ids) + limit, mode if backend == "cpu" else "exact")
    guesses = Guesses()
    if guess:
        require_lossless(checkpoint.config, backend, mode, sampling)
        chosen = _guessing(checkpoint, mode, threads, ids, limit, guess, guesses)
    else:
        chosen = _continuation(checkpoint, backend, mode, threads, ids, limit, sampling)
    started = time.perf_counter()
    try:
        count, interrupted = _stream(chosen, checkpoint if tokens is None else None)
    except FloatingPointError as error:
        remedy = "see `assay verify` for what the weights hold, or take other sampling settings"
        raise CheckpointError(str(error), where=path, remedy=remedy) from error
    seconds = time.perf_counter() - started
    how = f"{backend}{f', mode {mode}' if mode else ''}"
    if guess:
        how += f"; {guesses.right} of {guesses.tried} guesses right ({guesses.acceptance:.0%})"
    messages.print(f"[dim]{'interrupted: ' if interrupted else ''}{count} tokens in {seconds:.1f} s by {how}[/]")
    if interrupted:
        raise typer.Exit(130)


def _stream(chosen: Iterator[int], checkpoint: "Checkpoint | None") -> tuple[int, bool]:
    """Print tokens as they come, as text where there is a checkpoint to say it; their number, and whether cut short."""
    out: list[int] = []
    written, interrupted = "", False
    try:
        for token in chosen:
            out.append(token)
            if checkpoint is None:
                print(token, end=" ", flush=True)
                continue
            text = checkpoint.tokenizer.decode(out, skip_special_tokens=False)
            if not text.endswith("\ufffd"):  # an unfinished character: wait for its other bytes
                print(text[len(written) :], end="", flush=True)
                written = text
    except KeyboardInterrupt:
        interrupted = True
    if checkpoint is not None:
        print(checkpoint.tokenizer.decode(out, skip_special_tokens=False)[len(written) :], end="")
    print(flush=True)
    return len(out), interrupted


def _chat_tokens(checkpoint: "Checkpoint", chat: str, prompt: str | None, tokens: str | None) -> list[int]:
    from assay.cli.shared import text_of
    from assay.loaders import CheckpointError
    from assay.loaders.chat import chat_tokens

    if prompt is not None or tokens is not None:
        raise CheckpointError("give one of --prompt, --tokens and --chat")
    return chat_tokens(checkpoint, [{"role": "user", "content": text_of("--chat", chat)}])


def require_memory(config: "Config", length: int, mode: str) -> None:
    """Refuse a cache of a mode of the CPU path that the machine's memory cannot hold; asked before weights are read."""
    from assay.cli.shared import free_memory
    from assay.fast.engine import cache_bytes, products_and_cache
    from assay.loaders import CheckpointError

    _, dtype = products_and_cache(mode)
    needed, free = cache_bytes(config, length, dtype), free_memory()
    if needed > free:
        raise CheckpointError(
            f"the keys and values of {length} tokens do not fit into memory",
            expected=f"at most {free / 1e9:.2f} GB, which are free",
            got=f"{needed / 1e9:.2f} GB",
            remedy="give fewer --max-tokens or a shorter prompt",
        )


def require_lossless(config: "Config", backend: str, mode: str, sampling: "Sampling") -> None:
    """Refuse guesses where they could change the tokens."""
    from assay.loaders import CheckpointError
    from assay.reference.config import LongRopeScaling

    why = None
    if backend != "cpu" or mode not in ("exact", "exact-f16"):
        why = f"logits of {backend} {mode}".rstrip() + " may depend on how tokens are cut into chunks"
    elif sampling.temperature != 0 or sampling.repetition_penalty != 1:
        why = "only greedy tokens can be guessed: temperature 0 and no repetition penalty"
    elif isinstance(config.rope_scaling, LongRopeScaling):
        why = "LongRoPE changes its factors on the way"
    if why:
        raise CheckpointError(
            f"--speculate could change the tokens: {why}", expected="--backend cpu --mode exact, greedy"
        )


def _guessing(
    checkpoint: "Checkpoint", mode: str, threads: int | None, ids: list[int], limit: int, most: int, guesses: "Guesses"
) -> Iterator[int]:
    """What `_continuation` gives, greedy in an exact mode, with guesses."""
    from assay.fast.cpu.batch import forward_batch, forward_some
    from assay.fast.speculate import speculate

    engine = _cpu_model(checkpoint, mode, threads)
    cache = engine.new_cache()
    return speculate(
        lambda new: forward_batch(engine, [new], [cache]),
        lambda new, keep: forward_some(engine, new, cache, keep),
        ids,
        limit,
        most,
        guesses,
        frozenset(checkpoint.stop_tokens),
    )


PROMPT_PIECE = 512  # tokens of a prompt that the cpu backend takes at a time: what is between its layers stays small


def _mode(backend: str, mode: str | None) -> str:
    """The backend's mode: the one asked for, or its default, the first; empty where it has none."""
    from assay.fast.engine import CPU_MODES
    from assay.loaders import CheckpointError

    modes = {"reference": (), "cpu": CPU_MODES, "metal": ("float32", "bfloat16")}
    if backend not in modes:
        raise CheckpointError(f"cannot generate with backend {backend!r}", expected="reference, cpu or metal")
    if mode is not None and mode not in modes[backend]:
        known = ", ".join(modes[backend]) or "none: it computes in float64"
        raise CheckpointError(f"backend {backend!r} has no mode {mode!r}", expected=known)
    return mode or next(iter(modes[backend]), "")


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
    from assay.reference.generate import crosses_long_rope, remembering
    from assay.reference.generate import generate as continuation

    stop = frozenset(checkpoint.stop_tokens)
    if backend != "metal":
        return continuation(_step(checkpoint, backend, mode, threads), ids, limit, sampling, stop)
    from assay.fast.metal import MetalModel

    engine = MetalModel(checkpoint.config, checkpoint.tensors, mode)
    for notice in engine.notices:
        messages.print(f"[dim]metal: {notice}[/]")
    greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
    if greedy and not crosses_long_rope(checkpoint.config, len(ids), limit):
        return _until(stop, islice(engine.greedy(np.array(ids)), limit))
    step = remembering(lambda new, cache: engine.forward(new, cache=cache), engine.new_cache, checkpoint.config)
    return continuation(step, ids, limit, sampling, stop)


def _until(stop: frozenset[int], tokens: Iterator[int]) -> Iterator[int]:
    """The tokens up to the first of `stop`, and that one."""
    for token in tokens:
        yield token
        if token in stop:
            return


def _step(checkpoint: "Checkpoint", backend: str, mode: str, threads: int | None) -> "Step":
    """An engine that remembers what it has run."""
    from assay.cli.shared import messages
    from assay.reference.config import LongRopeScaling
    from assay.reference.generate import remembering

    config = checkpoint.config
    if backend == "reference":
        import assay.reference as reference

        model = checkpoint.model()
        return remembering(lambda new, past: reference.forward(model, new, cache=past), reference.KVCache, config)
    from assay.fast.cpu.batch import forward_batch

    engine = _cpu_model(checkpoint, mode, threads)
    for notice in engine.notices:
        messages.print(f"[dim]cpu: {notice}[/]")
    # LongRoPE's factors follow from where a pass ends: there a prompt is one pass, as in the oracle
    longest = config.max_position_embeddings if isinstance(config.rope_scaling, LongRopeScaling) else PROMPT_PIECE

    def run(new: "np.ndarray", cache: "CpuCache") -> "np.ndarray":
        if len(new) == 1:
            return engine.forward(new, cache=cache)
        for start in range(0, len(new), longest):
            logits_1V = forward_batch(engine, [new[start : start + longest]], [cache])
        return logits_1V

    return remembering(run, engine.new_cache, config)


def _cpu_model(checkpoint: "Checkpoint", mode: str, threads: int | None) -> "CpuModel":
    from assay.fast.cpu.engine import CpuModel
    from assay.loaders import CheckpointError

    try:
        return CpuModel(checkpoint.config, checkpoint.tensors, mode=mode, threads=threads)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
