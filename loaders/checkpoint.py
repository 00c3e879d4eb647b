"""Checkpoints: the format found by content, the config read strictly, every tensor used exactly once or reported."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from assay.loaders.config import require_plausible_depth
from assay.loaders.errors import CheckpointError, Report, refuse, reporting
from assay.loaders.layout import GATE_FIRST, Layout
from assay.loaders.mapped_file import release
from assay.reference.config import Config, LlamaConfig
from assay.reference.model import Model
from assay.reference.weights import Encoding, Tensor, weight_shapes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Stored = tuple[Encoding, dict[str, np.ndarray], tuple[str, ...]]  # encoding, parts, the file's names for them
ROWS = 64  # of a matrix are digested at a time: few enough for the cache


@dataclass(frozen=True)
class Checkpoint:
    """Weights, config and tokenizer on disk; tensors are views of the mapped files, decoded when asked.

    `unused` lists stored tensors that the model does not need, each with the reason.
    """

    path: Path
    format: str
    config: Config
    tensors: Mapping[str, Tensor]
    unused: Mapping[str, str]
    _find_stop_tokens: Callable[[], tuple[int, ...]]
    _load_tokenizer: Callable[[], "Tokenizer"]

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids after which generation ends."""
        return self._find_stop_tokens()

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The checkpoint's own tokenizer; CheckpointError if it has none that can be read."""
        return self._load_tokenizer()

    @property
    def is_phi3(self) -> bool:
        """Whether this is a phi-3: in numbers a Llama, but with gate and up stored as one matrix."""
        fused = (GATE_FIRST.name in tensor.layout for tensor in self.tensors.values())
        return isinstance(self.config, LlamaConfig) and any(fused)

    def model(self, dtype: np.dtype | type = np.float64) -> Model[Config]:
        """The oracle's model of these weights, computing in `dtype`."""
        return Model(self.config, self.tensors, np.dtype(dtype))

    @cached_property
    def config_sha256(self) -> str:
        """Digest of every config field that enters the numbers; the same for every container."""
        fields = {"class": type(self.config).__name__, **asdict(self.config)}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        """Digest of every weight's decoded values under its canonical name; the same for every container."""
        pieces = [(name, piece) for name in sorted(self.tensors) for piece in _matrices(self.tensors[name])]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = pool.map(lambda piece: _digest(piece[1]), pieces)
        digest = hashlib.sha256()
        for (name, _), values in zip(pieces, digests, strict=True):
            digest.update(f"{name} {self.tensors[name].shape}\n".encode())
            digest.update(values)
        return digest.hexdigest()

    def layer_done(self, tap: str) -> None:
        """Release a layer's weights once its last tap, block_out, is computed: until the next chunk nobody reads them.

        A check of gpt-oss-20b then holds a layer's weights in memory, not the file's 12 GB.
        """
        if tap.endswith("block_out"):
            self.release(f"model.{tap.removesuffix('block_out')}")

    def release(self, prefix: str = "") -> None:
        """Take the pages of the tensors of these names out of our memory: they are mapped, and read again if needed."""
        for name, tensor in self.tensors.items():
            if name.startswith(prefix):
                for part in tensor.parts.values():
                    release(part)


def _matrices(tensor: Tensor) -> list[Tensor]:
    """One expert at a time keeps the memory small."""
    return [tensor[e] for e in range(tensor.shape[0])] if len(tensor.shape) == 3 else [tensor]


def _digest(tensor: Tensor) -> bytes:
    """SHA-256 of decoded values, by pieces of ROWS rows; the upper halves alone of a piece that bfloat16 can hold."""
    digest = hashlib.sha256()
    whole = None if tensor.has_rows else tensor.decode()  # rows of a permuted matrix lie apart
    for start in range(0, tensor.shape[0], ROWS):
        values = tensor[start : start + ROWS].decode() if whole is None else whole[start : start + ROWS]
        codes = np.ascontiguousarray(values, "<f4").view("<u4").ravel()
        narrow = not np.bitwise_or.reduce(codes) & 0xFFFF
        digest.update(b"bf16" if narrow else b"f32")
        digest.update((np.ascontiguousarray(codes.view("<u2")[1::2]) if narrow else codes).data)
    for part in tensor.parts.values():
        release(part)
    return digest.digest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file, or a Hugging Face or MLX directory (or a safetensors file in one).

    Raises CheckpointError, with what is wrong where, for anything that is not a whole, supported checkpoint.
    """
    from assay.loaders.gguf_checkpoint import open_gguf
    from assay.loaders.safetensors_checkpoint import open_directory

    source = locate(path)
    try:
        return open_directory(source) if source.is_dir() else open_gguf(source)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=source) from error


def locate(path: str | Path) -> Path:
    """The GGUF file, or the directory with config.json and safetensors, that a path means; by content, not by name."""
    path = Path(path)
    try:
        if path.is_dir():
            ggufs = sorted(path.glob("*.gguf"))
            return ggufs[0] if len(ggufs) == 1 and not (path / "config.json").exists() else path
        if path.exists() and not path.is_file():
            raise CheckpointError("neither a file nor a directory", where=path)
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=path) from error
    if magic == b"GGUF":
        return path
    if path.suffix == ".safetensors":
        return path.parent
    raise CheckpointError(
        "not a checkpoint" if magic else "the file is empty",
        where=path,
        expected="a GGUF file, or a directory with config.json and safetensors",
        got=f"a file that starts with {magic!r}",
    )


def assemble(
    config: Config,
    where: Path,
    targets: Mapping[str, list[tuple[str, tuple[Layout, ...]]]],
    stored: Mapping[str, Stored | None],
    known_unused: Mapping[str, str],
    report: Report = refuse,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Canonical tensors from stored ones, checked against the config: none missing, none twice, shapes right.

    `stored` gives each stored tensor's encoding, parts [rows..., ...] and the file's names for them, or None if its
    fault was reported; `targets` the canonical tensors that it holds.
    """
    require_plausible_depth(config.num_hidden_layers, len(stored), str(where))
    shapes = weight_shapes(config)
    tensors: dict[str, Tensor] = {}
    faulty: set[str] = set()
    unused = dict(known_unused)
    for name, value in stored.items():
        used = [(canonical, changes) for canonical, changes in targets[name] if canonical in shapes]
        if value is None:
            faulty |= {canonical for canonical, _ in used}
            continue
        stored_as = value[2]
        for canonical, changes in used:
            with reporting(report):
                if canonical in tensors:
                    raise CheckpointError(
                        f"{canonical} is stored twice",
                        where=where,
                        tensors=stored_as,
                        got=f"{', '.join(tensors[canonical].stored_as)} and {', '.join(stored_as)}",
                    )
                faulty.add(canonical)
                tensors[canonical] = _tensor(canonical, shapes[canonical], value, changes, config, where)
        if not used:
            unused |= dict.fromkeys(stored_as, "unknown to this architecture")
    if unknown := sorted(name for name in unused if name not in known_unused):
        error = CheckpointError(
            f"{len(unknown)} tensor{'s' * (len(unknown) > 1)} that this model has no use for: {', '.join(unknown[:5])}"
            + (" ..." if len(unknown) > 5 else ""),
            where=where,
            tensors=unknown,
            remedy="check that config and weights belong together",
        )
        report(error)
    if missing := [name for name in shapes if name not in tensors and name not in faulty]:
        error = CheckpointError(
            f"{len(missing)} tensor{'s' * (len(missing) > 1)} missing: {', '.join(missing[:5])}"
            + (" ..." if len(missing) > 5 else ""),
            where=where,
            tensors=missing,
            remedy="check that all shards are there and that config and weights belong together",
        )
        report(error)
    return {name: tensors[name] for name in shapes if name in tensors}, unused


def _tensor(
    name: str,
    shape: tuple[int, ...],
    stored: Stored,
    changes: tuple[Layout, ...],
    config: Config,
    where: Path,
) -> Tensor:
    """One canonical tensor: shape checked, then layout changes applied to every part."""
    encoding, parts, stored_as = stored
    try:
        for change in changes:
            parts = {key: change.apply(part, config) for key, part in parts.items()}
        got = encoding.shape(parts)
    except (ValueError, IndexError):  # axes that the change needs are not there
        got = encoding.shape(parts)
    permuted = bool(changes) and len(got) == len(shape) + 2  # [heads, half, pair, ...] of un-permuted RoPE rows
    flat = (got[0] * got[1] * got[2], *got[3:]) if permuted else got
    if flat != shape:
        what = f"{' + '.join(stored_as)}: wrong shape for {name}"
        raise CheckpointError(what, where=where, tensors=stored_as, expected=list(shape), got=list(got))
    return Tensor(name, shape, encoding, parts, stored_as, tuple(change.name for change in changes))
