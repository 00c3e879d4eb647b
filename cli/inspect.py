"""assay inspect: what is in a checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from assay.loaders.checkpoint import Checkpoint


def inspect(
    path: Annotated[Path, typer.Argument(help="GGUF file, or Hugging Face or MLX directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show a checkpoint's format, architecture, config and tensors.

    Example: assay inspect gpt-oss-20b.gguf
    """
    from assay.loaders import open_checkpoint

    checkpoint = open_checkpoint(path)
    if as_json:
        print(json.dumps(_summary(checkpoint), indent=2))
    else:
        _print(checkpoint)


def _summary(checkpoint: "Checkpoint") -> dict[str, Any]:
    tensors = checkpoint.tensors.values()
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": type(checkpoint.config).__name__.removesuffix("Config"),
        "config": asdict(checkpoint.config),
        "parameters": sum(tensor.size for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "encoding": tensor.encoding.name,
                "bytes": tensor.nbytes,
                "stored_as": list(tensor.stored_as),
                "layout": list(tensor.layout),
            }
            for tensor in tensors
        ],
        "unused": dict(checkpoint.unused),
    }


def _print(checkpoint: "Checkpoint") -> None:
    from rich.table import Table

    from assay.cli.shared import console, lines

    summary = _summary(checkpoint)
    console.print(lines(summary["path"]), style="bold", highlight=False, soft_wrap=True)
    console.print(
        f"{summary['format']}, {summary['architecture']}, {summary['parameters']:,} parameters "
        f"in {summary['bytes'] / 1e6:,.1f} MB, {len(summary['tensors'])} tensors"
    )
    config = Table(title="config", title_justify="left", show_header=False, box=None)
    for key, value in summary["config"].items():
        config.add_row(key, lines(_compact(value)))
    console.print(config)
    table = Table(title="tensors", title_justify="left", box=None)
    table.add_column("canonical name, and how it is stored if otherwise")
    for column in ("shape", "encoding"):
        table.add_column(column, no_wrap=True)
    for row in _by_layer(summary["tensors"]):
        own = [row["name"].split(" ")[0]]
        stored = [name for name in row["stored_as"] if row["stored_as"] != own] + row["layout"]
        table.add_row(lines(row["name"], *(f"  {line}" for line in stored)), str(row["shape"]), row["encoding"])
    console.print(table)
    for name, reason in summary["unused"].items():
        console.print(lines(f"not used: {name} ({reason})"), highlight=False)


def _compact(value: Any) -> str:
    """A config value on one line; long lists by their runs."""
    if isinstance(value, (list, tuple)) and len(value) > 4:
        return f"{value[0]}, {value[1]}, ... ({len(value)})"
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _by_layer(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors with equal layers shown once, as `model.layers.{0..23}.` of the first."""
    import re

    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for tensor in tensors:
        general = re.sub(r"layers\.\d+\.", "layers.*.", tensor["name"])
        key = general, tuple(tensor["shape"]), tensor["encoding"], tuple(tensor["layout"])
        groups.setdefault(key, []).append(tensor)
    rows = []
    for (general, *_), members in groups.items():
        stored = [re.sub(r"(layers|blk)\.\d+\.", r"\1.*.", name) for name in members[0]["stored_as"]]
        count = f" (x{len(members)})" if len(members) > 1 else ""
        rows.append(members[0] | ({"name": general + count, "stored_as": stored} if len(members) > 1 else {}))
    return rows
