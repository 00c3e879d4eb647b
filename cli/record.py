"""assay record: write the taps of a backend, by default the oracle, to a golden."""

from pathlib import Path
from typing import Annotated

import typer

LISTED = 100  # token ids that are printed


def record(
    path: Annotated[Path, typer.Argument(help="GGUF file, or Hugging Face or MLX directory.")],
    out: Annotated[Path, typer.Option(help="The golden to write, NAME.safetensors.")],
    prompt: Annotated[
        str | None, typer.Option(help="Text, encoded by the checkpoint's tokenizer; - reads standard input.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help='Token ids, "1,2,3", or @FILE that holds them.')] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="Who computes: reference, cpu, metal, transformers, llama.cpp, mlx-lm, openai-torch or a plugin."
        ),
    ] = "reference",
    mode: Annotated[str | None, typer.Option(help="The backend's numerics, e.g. float32 or bfloat16.")] = None,
    taps: Annotated[
        str | None, typer.Option(help='Which taps, e.g. "layers.0.*,logits". Default: all but T x S ones.')
    ] = None,
    chunks: Annotated[
        str | None, typer.Option(help='Chunk lengths, the last repeating: "8,1" is 8, then one by one.')
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Record what every intermediate tensor should be.

    Examples:

    assay record model.gguf --prompt "The capital of France" --out france.safetensors

    assay record hf-dir --tokens @tokens.txt --chunks 64,1 --taps "layers.*.block_out,logits" --out g.safetensors
    """
    from assay.cli.shared import console, lengths_from, progress, tokens_from
    from assay.golden.backends import open_backend
    from assay.golden.errors import GoldenError
    from assay.golden.record import record as record_taps
    from assay.golden.record import split_into_chunks
    from assay.golden.store import save_golden
    from assay.loaders import open_checkpoint

    if out.suffix != ".safetensors":
        raise GoldenError("a golden is a .safetensors file", got=str(out))
    for existing in (out, out.with_suffix(".safetensors.index.json")):
        if existing.exists() and not force:
            raise GoldenError("exists already", where=existing, remedy="give --force to replace it")
    if not out.parent.is_dir():
        raise GoldenError("no such folder", where=out.parent)
    checkpoint = open_checkpoint(path)
    ids = tokens_from(checkpoint, prompt, tokens)
    lengths = lengths_from(chunks)
    total = len(split_into_chunks(len(ids), lengths)) * checkpoint.config.num_hidden_layers
    with progress(f"{backend} runs {len(ids)} tokens", total) as advance:
        engine = open_backend(backend, checkpoint, mode)
        golden = record_taps(checkpoint, engine, ids, chunks=lengths, taps=taps, beside=out.parent, progress=advance)
    written = save_golden(golden, out)
    size = sum(array.nbytes for array in golden.taps.values()) / 1e6
    console.print(
        f"{written}: {len(golden.taps)} taps of {len(ids)} tokens, {size:,.1f} MB, by {backend}", highlight=False
    )
    listed = ",".join(map(str, ids[:LISTED])) + (",..." if len(ids) > LISTED else "")
    console.print(f"  token ids: {listed}", highlight=False, soft_wrap=True)
    for what, value in golden.provenance.coverage.items():
        console.print(
            f"  {what.replace('_', ' ')}: {value:.4g}"
            if isinstance(value, float)
            else f"  {what.replace('_', ' ')}: {value}"
        )
