"""safetensors written as a stream: the header first, then one tensor after another, a piece at a time.

The layout is in `loaders.safetensors_file`. The safetensors library wants every tensor in memory at once; a header
is a few lines of JSON, so it is written here.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from assay.loaders.errors import CheckpointError
from assay.loaders.safetensors_file import DTYPES, INDEX, SINGLE
from assay.loaders.weight import WHOLE, Weight, Written
from assay.reference.formats import MLX_MODES, MXFP4, AffineGroups, Microscaled
from assay.reference.formats.floats import FloatFormat


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file: name, dtype and shape as in the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Stream:
    """Tensors whose data come together, piece by piece: an array for each of them at a time."""

    entries: tuple[Entry, ...]
    pieces: Callable[[], Iterator[tuple[np.ndarray, ...]]]

    @property
    def nbytes(self) -> int:
        """Bytes of the data of all of them."""
        return sum(entry.nbytes for entry in self.entries)


def write_set(
    directory: Path, streams: Sequence[Stream], metadata: Mapping[str, str], shard_bytes: int, written: Written
) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` (one stream at least) and their index."""
    shards: list[list[Stream]] = [[]]
    for stream in streams:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + stream.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(stream)
    if len(shards) == 1:
        _write(directory / SINGLE, shards[0], metadata, written)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write(directory / name, shard, metadata, written)
    weight_map = {e.name: name for name, shard in zip(names, shards, strict=True) for s in shard for e in s.entries}
    index = {
        "metadata": {"total_size": sum(stream.nbytes for stream in streams)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write(path: Path, streams: Sequence[Stream], metadata: Mapping[str, str], written: Written) -> None:
    # widest elements first, as the library does: every tensor then starts at a multiple of its element's size
    entries = [entry for stream in streams for entry in stream.entries]
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begins, at = {}, 0
    for entry in sorted(entries, key=lambda entry: -DTYPES[entry.dtype].itemsize):
        begins[entry.name] = at
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at := at + entry.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for stream in streams:
            places = [8 + len(text) + begins[entry.name] for entry in stream.entries]
            ends = [place + entry.nbytes for place, entry in zip(places, stream.entries, strict=True)]
            for arrays in stream.pieces():
                for i, array in enumerate(arrays):
                    file.seek(places[i])
                    file.write(np.ascontiguousarray(array).data.cast("B"))
                    places[i] += array.nbytes
                    written(array.nbytes)
            assert places == ends, stream.entries


def hf_streams(weights: Mapping[str, Weight]) -> list[Stream]:
    """The tensors of a Hugging Face directory: gate and up interleaved in one, experts in MXFP4 or [N, in, out].

    Raises CheckpointError for an encoding that Hugging Face's layout has no place for.
    """
    streams: list[Stream] = []
    for weight in weights.values():
        experts, found, matrix = weight.name.partition(".mlp.experts.")
        if not found:
            streams.append(_plain(weight))
        elif matrix.startswith("gate_proj"):
            up = weights[weight.name.replace("gate_proj", "up_proj")]
            streams.append(_expert_stream(f"{experts}.mlp.experts.gate_up_proj", [weight, up]))
        elif matrix.startswith("down_proj"):
            streams.append(_expert_stream(f"{experts}.mlp.experts.down_proj", [weight]))
    return streams


def _plain(weight: Weight) -> Stream:
    if not isinstance(weight.encoding, FloatFormat):
        raise CheckpointError(f"{weight.name}: Hugging Face's layout has no place for {weight.encoding.name}")
    return _stream(weight, {"values": Entry(weight.name, weight.encoding.name, weight.shape)})


def _stream(weight: Weight, entries: Mapping[str, Entry]) -> Stream:
    """Each part of a weight as a tensor of its own."""

    def pieces() -> Iterator[tuple[np.ndarray, ...]]:
        return (tuple(parts[name] for name in entries) for parts in weight.pieces(weight.rows_at_a_time))

    return Stream(tuple(entries.values()), pieces)


def _expert_stream(stem: str, matrices: list[Weight]) -> Stream:
    """One expert tensor, whose rows (of a bias [N, F]: whose columns) are those of `matrices` taken in turn."""
    first, count = matrices[0], len(matrices)
    if len({m.encoding.name for m in matrices}) > 1:
        raise CheckpointError(f"{stem}: gate and up have different encodings")
    if first.name.endswith(".bias"):
        N, F = first.shape
        biases = Entry(f"{stem}_bias", first.encoding.name, (N, count * F))
        return Stream((biases,), lambda: _interleaved(matrices, ("values",), WHOLE, axis=2))
    N, F, D = first.shape
    if first.encoding is MXFP4:
        blocks = Entry(f"{stem}_blocks", "U8", (N, count * F, D // 32, 16))
        scales = Entry(f"{stem}_scales", "U8", (N, count * F, D // 32))
        rows = first.rows_at_a_time
        return Stream((blocks, scales), lambda: _interleaved(matrices, ("blocks", "scales"), rows, axis=1))
    if not isinstance(first.encoding, FloatFormat):
        raise CheckpointError(f"{stem}: Hugging Face's layout has no place for {first.encoding.name}")

    def transposed() -> Iterator[tuple[np.ndarray, ...]]:  # unquantised experts are [N, in, out] there
        return ((expert.T,) for (expert,) in _interleaved(matrices, ("values",), WHOLE, axis=1))

    return Stream((Entry(stem, first.encoding.name, (N, D, count * F)),), transposed)


def _interleaved(
    matrices: list[Weight], names: tuple[str, ...], rows: int, axis: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """The named parts, a piece at a time, with the entries before `axis` those of the matrices in turn."""
    for pieces in zip(*(m.pieces(rows) for m in matrices), strict=True):
        merged = []
        for name in names:
            arrays = [piece[name] for piece in pieces]
            shape = list(arrays[0].shape)
            shape[axis - 1] *= len(arrays)
            merged.append(np.stack(arrays, axis=axis).reshape(shape))
        yield tuple(merged)


def mlx_streams(weights: Mapping[str, Weight]) -> list[Stream]:
    """The tensors of an MLX directory: canonical names, quantised ones as weight, scales and, if affine, biases."""
    return [_mlx_stream(weight) for weight in weights.values()]


def _mlx_stream(weight: Weight) -> Stream:
    stem = weight.name.removesuffix(".weight")
    *rows, columns = weight.shape
    match weight.encoding:
        case AffineGroups(bits=bits, group_size=group, scale_format=scale):
            entries = {
                "weight": Entry(weight.name, "U32", (*rows, columns * bits // 32)),
                "scales": Entry(f"{stem}.scales", scale.name, (*rows, columns // group)),
                "biases": Entry(f"{stem}.biases", scale.name, (*rows, columns // group)),
            }
        case Microscaled(group_bytes=packed, group=group):
            entries = {
                "blocks": Entry(weight.name, "U32", (*rows, columns // group * packed // 4)),
                "scales": Entry(f"{stem}.scales", "U8", (*rows, columns // group)),
            }
        case _:
            return _plain(weight)
    return _stream(weight, entries)


def mlx_quantization(weights: Mapping[str, Weight]) -> dict[str, object]:
    """mlx-lm's `quantization` entry: the most frequent settings, then the others by module; empty if there is none."""
    settings = {
        weight.name.removesuffix(".weight"): found
        for weight in weights.values()
        if (found := _mlx_settings(weight)) is not None
    }
    if not settings:
        return {}
    kinds = list(settings.values())
    default = max(kinds, key=kinds.count)
    return {**default, **{module: own for module, own in settings.items() if own != default}}


def _mlx_settings(weight: Weight) -> dict[str, object] | None:
    match weight.encoding:
        case AffineGroups(bits=bits, group_size=group):
            return {"group_size": group, "bits": bits, "mode": "affine"}
        case Microscaled(element=element, group=group) as encoding:
            mode = next(mode for mode, format in MLX_MODES.items() if format is encoding)
            return {"group_size": group, "bits": element.bits, "mode": mode}
    return None
