"""assay vectors: decode vectors for kernels in any language."""

from pathlib import Path
from typing import Annotated

import typer


def _folder(text: str) -> Path:
    """An empty text, of a shell variable that is not set, would mean the current folder."""
    if not text:
        raise typer.BadParameter("the folder's name is empty")
    return Path(text)


def vectors(
    out: Annotated[
        Path,
        typer.Option(
            parser=_folder, metavar="<path>", help="Folder to write; files of the same names in it are replaced."
        ),
    ],
) -> None:
    """Write, per encoding, blocks and the exact float32 values that they decode to.

    Example: assay vectors --out vectors
    """
    from assay.cli.shared import console
    from assay.golden.vectors import write_vectors

    with console.status("writing vectors"):
        entries = write_vectors(out)
    size = sum((out / entry["file"]).stat().st_size for entry in entries)
    blocks = sum(entry["blocks"] for entry in entries)
    console.print(
        f"{len(entries)} encodings, {blocks:,} blocks, {size / 1e6:.1f} MB in {out}; start with index.json",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
