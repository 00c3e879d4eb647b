"""The golden file: taps as safetensors, and in the header what they are the taps of.

Any language with a safetensors reader can use one. The header's metadata holds one entry, `assay`, a JSON
object with the fields of `Provenance`. Large goldens are shards with an index, as Hugging Face does it.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from assay.golden.errors import GoldenError
from assay.loaders.safetensors_file import SafeTensor, SafetensorsFile, read_safetensors
from assay.reference.formats.floats import bfloat16_to_float32

SCHEMA = 1
SHARD_BYTES = 4 << 30
WEIGHTS = "weights."  # in a dump, before the canonical name of a decoded weight: all other tensors are taps


@dataclass(frozen=True)
class Provenance:
    """What a set of taps was recorded from, and how."""

    tokens: list[int]
    chunks: list[int]
    config_sha256: str
    weights_sha256: str
    checkpoint: str
    backend: str
    profile: str
    versions: dict[str, str]
    taps: list[str]
    coverage: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


class Taps(Mapping[str, np.ndarray]):
    """Recorded tensors by name, read from the mapped file when asked for; 16-bit floats widened to float32."""

    def __init__(self, files: Mapping[str, tuple[SafetensorsFile, SafeTensor]]):
        self._files = files

    def __getitem__(self, name: str) -> np.ndarray:
        file, tensor = self._files[name]
        array = file.array(tensor)
        if tensor.dtype == "BF16":
            return bfloat16_to_float32(array)
        return array.astype(np.float32) if tensor.dtype == "F16" else array

    @property
    def dtypes(self) -> set[str]:
        """The taps' stored dtypes, as safetensors names them."""
        return {tensor.dtype for name, (_, tensor) in self._files.items() if not name.startswith(WEIGHTS)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclass(frozen=True)
class Golden:
    """Taps with their provenance."""

    provenance: Provenance
    taps: Mapping[str, np.ndarray]
    path: Path | None = None


def read_taps(path: Path) -> tuple[Taps, dict[str, str]]:
    """The tensors of a safetensors file, or of the shards that an index lists, and the first header's metadata.

    Raises GoldenError or CheckpointError for anything that is not such a file.
    """
    if path.suffix == ".json":
        return _read_shards(path)
    file = read_safetensors(path)
    return Taps({name: (file, tensor) for name, tensor in file.tensors.items()}), dict(file.metadata)


def _read_shards(index: Path) -> tuple[Taps, dict[str, str]]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise GoldenError("names a shard outside its folder", where=index)
    except OSError as error:
        raise GoldenError(f"cannot be read: {error.strerror}", where=index) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise GoldenError("not the index of a sharded golden", where=index) from error
    files = {name: read_safetensors(index.parent / name) for name in names}
    if len({file.metadata.get("assay") for file in files.values()}) != 1:
        raise GoldenError("the shards are of different goldens, or there are none", where=index)
    held = {tensor: (file, spec) for file in files.values() for tensor, spec in file.tensors.items()}
    if missing := sorted(set(weight_map) - set(held)):
        raise GoldenError(f"tensor {missing[0]!r} is in no shard", where=index)
    return Taps(held), dict(files[names[0]].metadata)


def load_golden(path: str | Path) -> Golden:
    """Read a golden; GoldenError if the file is not one or is of another schema."""
    path = Path(path)
    taps, metadata = read_taps(path)
    if "assay" not in metadata:
        raise GoldenError(
            "not a golden: its header has no 'assay' entry",
            where=path,
            remedy="record one with `assay record`; taps of another engine go to `assay check --dump`",
        )
    try:
        stored = json.loads(metadata["assay"])
        if stored.get("schema") != SCHEMA:
            raise GoldenError("golden of another schema", where=path, expected=SCHEMA, got=stored.get("schema"))
        provenance = Provenance(**stored)
        _require_types(provenance)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, GoldenError):
            raise
        raise GoldenError(f"damaged provenance: {error}", where=path) from error
    if sum(provenance.chunks) != len(provenance.tokens):
        raise GoldenError("chunks do not add up to the tokens", where=path)
    if missing := [name for name in provenance.taps if name not in taps]:
        raise GoldenError(f"tap {missing[0]!r} is in the header's list but not in the file", where=path)
    return Golden(provenance, taps, path)


def _require_types(provenance: Provenance) -> None:
    """Raise TypeError for what JSON allows and a check would trip over."""
    p = provenance
    if not isinstance(p.taps, list):
        raise TypeError("taps must be a list")
    if not all(
        isinstance(t, str) for t in (p.config_sha256, p.weights_sha256, p.checkpoint, p.backend, p.profile, *p.taps)
    ):
        raise TypeError("digests, checkpoint, backend, profile and the taps' names must be text")
    if not p.tokens or not all(type(token) is int and token >= 0 for token in p.tokens):
        raise TypeError("tokens must be integers from 0, at least one")
    if not all(type(length) is int and length >= 1 for length in p.chunks):
        raise TypeError("chunks must be integers from 1")


def save_golden(golden: Golden, path: str | Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a golden whole or not at all: to a temporary file, synced, then renamed.

    Above `shard_bytes` it becomes shards `NAME-00001-of-0000N.safetensors` beside `NAME.safetensors.index.json`.
    Answers the path to hand to `load_golden`.
    """
    path = Path(path)
    metadata = {"assay": json.dumps(asdict(golden.provenance), sort_keys=True)}
    shards: list[dict[str, np.ndarray]] = [{}]
    room = shard_bytes
    for name, array in golden.taps.items():
        if array.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = np.ascontiguousarray(array)
        room -= array.nbytes
    if len(shards) == 1:
        _write(shards[0], path, metadata)
        return path
    stem = path.name.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {tap: name for shard, name in zip(shards, names, strict=True) for tap in shard}
    index = path.with_name(f"{stem}.safetensors.index.json")
    text = json.dumps(
        {"metadata": {"total_size": sum(a.nbytes for a in golden.taps.values())}, "weight_map": weight_map}
    )
    written: list[Path] = []
    try:
        for shard, name in zip(shards, names, strict=True):
            _write(shard, path.with_name(name), metadata)
            written.append(path.with_name(name))
        with replacing(index) as temporary:
            temporary.write_text(text)
    except BaseException:  # Ctrl-C too: shards without their index are of no use
        for shard_path in written:
            shard_path.unlink(missing_ok=True)
        raise
    return index


def _write(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # how the library reports a full disk, among others
            raise OSError(str(error)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once written and synced; nothing stays on failure."""
    if not path.name:  # as of an empty text
        raise GoldenError("not the name of a file to write", got=str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors writes files that only their owner may read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise GoldenError(f"cannot be written: {error.strerror or error}", where=path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
