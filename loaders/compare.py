"""Do two checkpoints hold the same weights? Decoded bits are compared, whatever the containers and layouts."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from assay.loaders.checkpoint import Checkpoint
from assay.loaders.explain import explain
from assay.reference.config import Config
from assay.reference.rope import inverse_frequencies
from assay.reference.weights import Tensor

PIECE = 1 << 22  # elements decoded at a time
ROUNDING = 1e-6  # relative; GGUF keeps RoPE's numbers as float32


@dataclass(frozen=True)
class Difference:
    """A tensor that differs: how many elements, the first one's index and both values, and why if that is known.

    `relative_error` is ||A - B|| / ||A||. Pairs are of A and B; None where one has no such tensor or the shapes differ.
    """

    name: str
    what: str
    explanation: str | None = None
    encodings: tuple[str | None, str | None] = (None, None)
    sha256: tuple[str | None, str | None] = (None, None)
    differing: int | None = None
    relative_error: float | None = None
    first: tuple[int, ...] | None = None
    values: tuple[str, str] | None = None


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints have in common: `sha256` is of each tensor of A, of its float32 bits, little-endian."""

    a: str
    b: str
    config: dict[str, tuple[str, str]]
    sha256: dict[str, str]
    differences: tuple[Difference, ...]

    @property
    def is_same(self) -> bool:
        """Whether every weight has the same bits and every config field the same value."""
        return not self.differences and not self.config

    def as_json(self) -> dict[str, Any]:
        """The comparison as a JSON object; docs/verify.md says what each key means."""
        return {"verdict": "same" if self.is_same else "different", **asdict(self)}


def compare(a: Checkpoint, b: Checkpoint, advance: Callable[[str], None] = lambda name: None) -> Comparison:
    """Compare every config field and every decoded weight; `advance` is told each tensor's name once it is done."""
    digests: dict[str, str] = {}
    found: list[Difference] = []
    for name, tensor in a.tensors.items():
        other = b.tensors.get(name)
        digests[name], difference = _compare(tensor, other)
        if difference is not None:
            found.append(difference)
        advance(name)
    found += [Difference(name, "only B has it") for name in b.tensors if name not in a.tensors]
    return Comparison(
        str(a.path), str(b.path), _config_differences(a.config, b.config), digests, _explained(found, a, b, digests)
    )


def _compare(a: Tensor, b: Tensor | None) -> tuple[str, Difference | None]:
    """The digest of A, and how B differs from it."""
    if b is None or a.shape != b.shape:
        what = "only A has it" if b is None else f"shape {list(a.shape)} in A, {list(b.shape)} in B"
        digest = _digest(a)
        both = (digest, None if b is None else _digest(b))
        return digest, Difference(a.name, what, encodings=_encodings(a, b), sha256=both)
    hash_a, hash_b = hashlib.sha256(), None
    differing, first, at, error, norm = 0, None, 0, 0.0, 0.0
    for x, y in zip(*_pieces(a, b), strict=True):
        before = hash_a.copy()
        hash_a.update(x.astype("<f4", copy=False).data)
        places = np.flatnonzero(x.view(np.uint32) != y.view(np.uint32))
        if places.size:
            differing += places.size
            first = first or (at + int(places[0]), x[places[0]], y[places[0]])
            hash_b = hash_b or before
        if hash_b is not None:
            hash_b.update(y.astype("<f4", copy=False).data)
        wide = x.astype(np.float64)
        norm += float(wide @ wide)
        wide -= y
        error += float(wide @ wide)
        at += x.size
    if first is None or hash_b is None:
        return hash_a.hexdigest(), None
    index = tuple(int(i) for i in np.unravel_index(first[0], a.shape))
    relative = (error / norm) ** 0.5 if norm else float("inf")
    digests = hash_a.hexdigest(), hash_b.hexdigest()
    what = f"{differing} of {a.size} elements differ"
    values = repr(float(first[1])), repr(float(first[2]))
    return digests[0], Difference(a.name, what, None, _encodings(a, b), digests, differing, relative, index, values)


def _encodings(a: Tensor, b: Tensor | None) -> tuple[str, str | None]:
    return a.encoding.name, None if b is None else b.encoding.name


def _pieces(*tensors: Tensor) -> list[Iterator[np.ndarray]]:
    """Decoded elements of tensors of one shape, flat float32, all cut at the same places."""
    rows = tensors[0].shape[0] if tensors[0].shape else 0
    can_cut = rows and all(part.shape[0] == rows for tensor in tensors for part in tensor.parts.values())
    step = max(1, PIECE * rows // max(1, tensors[0].size)) if can_cut else 0
    return [_cut(tensor, step) for tensor in tensors]


def _cut(tensor: Tensor, step: int) -> Iterator[np.ndarray]:
    """The tensor's elements in pieces of `step` rows; 0 for all at once."""
    if not step:
        yield tensor.decode().ravel()
        return
    for i in range(0, tensor.shape[0], step):
        yield tensor[i : i + step].decode().ravel()


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(tensor)[0]:
        digest.update(piece.astype("<f4", copy=False).data)
    return digest.hexdigest()


def _explained(
    found: list[Difference], a: Checkpoint, b: Checkpoint, digests: Mapping[str, str]
) -> tuple[Difference, ...]:
    """The differences with their reasons, where a known change explains them."""
    explained, in_vain = [], Counter[str]()
    for difference in found:
        name, theirs = difference.name, difference.sha256[1]
        role = re.sub(r"\d+", "*", name)
        same = [n for n in digests if digests[n] == theirs and a.tensors[n].shape == b.tensors[name].shape]
        words = f"B holds here what A calls {same[0]}" if same else None
        # requantised models differ everywhere: two layers say as much as all, in far less time
        if words is None and difference.differing is not None and in_vain[role] < 2:
            words = explain(name, a.tensors, b.tensors, a.config)
            in_vain[role] += words is None
        explained.append(replace(difference, explanation=words))
    return tuple(explained)


def _config_differences(a: Config, b: Config) -> dict[str, tuple[str, str]]:
    """The fields that differ; RoPE scaling by its frequencies, for containers write it in different ways."""
    if type(a) is not type(b):
        return {"architecture": (type(a).__name__, type(b).__name__)}
    names = [field.name for field in fields(a) if getattr(a, field.name) != getattr(b, field.name)]
    if "rope_scaling" in names and _same_rope(a, b):
        names.remove("rope_scaling")
    return {name: (repr(getattr(a, name)), repr(getattr(b, name))) for name in names}


def _same_rope(a: Config, b: Config) -> bool:
    """Whether both turn every pair at the same rate, to float32 rounding, at the shortest and the longest length."""
    if a.head_dim != b.head_dim:
        return False

    def numbers(config: Config, length: int) -> np.ndarray:
        factor = getattr(config.rope_scaling, "attention_factor", 1.0)
        return np.append(inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, length), factor)

    lengths = (1, max(a.max_position_embeddings, b.max_position_embeddings))
    return all(np.allclose(numbers(a, n), numbers(b, n), rtol=ROUNDING, atol=0) for n in lengths)
