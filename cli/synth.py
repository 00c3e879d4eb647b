"""assay synth: random checkpoints of released shapes."""

import time
from pathlib import Path
from typing import Annotated

import typer


def synth(
    name: Annotated[
        str, typer.Argument(help="gpt-oss-20b, gpt-oss-120b, tinyllama-1.1b, mistral-7b, phi-3-mini, smollm2-135m.")
    ],
    to: Annotated[str, typer.Option("--to", help="gguf, safetensors (Hugging Face) or mlx.")],
    out: Annotated[Path, typer.Option(help="The GGUF file or the directory to write.")],
    layers: Annotated[int | None, typer.Option(help="Keep only the first layers.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other values.", min=0)] = 0,
    quant: Annotated[
        str | None, typer.Option(help="Encoding of the matrices outside experts, e.g. Q4_0, affine4/64, BF16.")
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Largest safetensors file, 5GB unless said; a GGUF is one file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
) -> None:
    """Write a random checkpoint with the true shapes of a released model, to measure speed and memory on.

    The values are scaled so that activations stay sane; the tokenizer encodes any text; what it generates is noise.

    Example: assay synth gpt-oss-20b --to gguf --out random-20b.gguf
    """
    from assay.cli.convert import chosen, encoder_name, shard_bytes_from, transfer_progress
    from assay.cli.shared import console
    from assay.loaders.convert import CONTAINERS
    from assay.loaders.registry import find_shape
    from assay.loaders.synth import synth as write

    shape = find_shape(name)
    to = chosen(to, "--to", CONTAINERS)
    encoder = None if quant is None else encoder_name(quant, to)
    shard_bytes = shard_bytes_from(shard_size, to)
    started = time.perf_counter()
    with transfer_progress() as progress:
        nbytes = write(
            shape,
            out,
            to,
            layers=layers,
            seed=seed,
            encoder=encoder,
            shard_bytes=shard_bytes,
            force=force,
            progress=progress,
        )
    count = layers or shape.config.num_hidden_layers
    console.print(
        f"{out}: {to}, the shape of {shape.source}, {count} layer{'s' * (count != 1)}, {nbytes / 1e9:,.2f} GB "
        f"in {time.perf_counter() - started:.1f} s",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
