"""Weights first: does a backend compute with the weights that the checkpoint holds? No forward pass is needed.

A backend hands its decoded weights over under their canonical names (docs/your-own-engine.md), behind the prefix
`weights.`. Each is compared with what the oracle decodes, and where one differs it is said how: by a mistake of the
catalogue that makes these very numbers, by a known slip of layout or scale, or by the error's structure.
"""

import re
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from assay.golden.errors import GoldenError
from assay.golden.measure import relative
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.mistake import Mistake
from assay.golden.mistakes.recipe import Recipe
from assay.golden.noise import Profile
from assay.golden.rounding import round_mantissa
from assay.golden.store import WEIGHTS
from assay.golden.structure import describe
from assay.golden.weight_blocks import explain_blocks
from assay.loaders.checkpoint import Checkpoint
from assay.loaders.explain import explain
from assay.reference.formats import F32
from assay.reference.weights import Tensor

Array = np.ndarray
ULPS = 8  # of float32, relative to a row's largest weight: affine groups decode by a product and a sum
STEPS = 2  # roundings of the profile's format that a weight may be off by: to it, and once more on the way
ROWS_AT_A_TIME = 16384


@dataclass(frozen=True)
class WeightFault:
    """A weight that differs: where, by how much, and why, if that is known."""

    name: str
    differing: int
    of: int
    error: float  # ||got - expected|| / ||expected||
    worst: dict[str, Any]
    nonfinite: int
    expected: Array  # the first piece with a difference: the whole, one expert, or some rows
    got: Array
    part: int | None  # which expert that is


class LazyWeights(Mapping[str, Array]):
    """Weights by name, each made when it is asked for and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Array]]):
        self._makers = makers

    def __getitem__(self, name: str) -> Array:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def weights_among(taps: Mapping[str, Array]) -> Mapping[str, Array]:
    """The weights among what a backend supplied, by canonical name."""
    names = [name for name in taps if name.startswith(WEIGHTS)]
    return LazyWeights({name.removeprefix(WEIGHTS): partial(taps.__getitem__, name) for name in names})


def with_weights(taps: Mapping[str, Array], backend: Any) -> Mapping[str, Array]:
    """A backend's taps and, if it hands them over by a method `weights()`, what it decoded."""
    if not hasattr(backend, "weights"):
        return taps
    weights = backend.weights()
    return ChainMap(
        dict(taps),
        LazyWeights({WEIGHTS + name: partial(weights.__getitem__, name) for name in weights}),  # type: ignore[arg-type]
    )


def compare_weights(checkpoint: Checkpoint, weights: Mapping[str, Array], profile: Profile) -> list[WeightFault]:
    """The weights that are not the checkpoint's, in the file's order; rounding to the profile's format is allowed.

    Raises GoldenError for a name that is no weight of this model, or another shape.
    """
    for name in weights:
        if name not in checkpoint.tensors:
            expected = ", ".join(list(checkpoint.tensors)[:3])
            raise GoldenError(f"{name!r} is no weight of this model", where=WEIGHTS + name, expected=f"{expected}, ...")
    found = (
        _compared(checkpoint.tensors[name], weights[name], profile) for name in checkpoint.tensors if name in weights
    )
    return [fault for fault in found if fault is not None]


def _compared(tensor: Tensor, got: Array, profile: Profile) -> WeightFault | None:
    if tuple(got.shape) != tensor.shape:
        raise GoldenError(
            "a weight of another shape", where=tensor.name, expected=list(tensor.shape), got=list(got.shape)
        )
    if got.dtype.kind != "f":
        raise GoldenError("a weight that is not decoded", where=tensor.name, expected="floats", got=got.dtype)
    first, differing, nonfinite = None, 0, 0
    error = norm = 0.0
    worst, worst_by = {}, -1.0
    for part, start, expected, piece in _pieces(tensor, got):
        off = ~_allowed(expected, piece, profile)
        wide = expected.astype(np.float64)
        difference = np.where(np.isfinite(piece), piece - wide, 0)
        error, norm = error + float(np.sum(difference**2)), norm + float(np.sum(wide**2))
        if not off.any():
            continue
        differing += int(off.sum())
        nonfinite += int(np.count_nonzero(~np.isfinite(piece)))
        size = np.where(np.isfinite(piece), np.abs(difference), np.inf) * off
        if float(size.max()) > worst_by:
            index = np.unravel_index(size.argmax(), size.shape)
            place = [int(index[0]) + start, *map(int, index[1:])]
            place = place if part is None else [part, *place]
            worst, worst_by = (
                {"index": place, "expected": float(expected[index]), "got": float(piece[index])},
                size.max(),
            )
        first = first or (expected, piece, part)
    if first is None:
        return None
    share = (error / norm) ** 0.5 if norm else float("inf")
    return WeightFault(tensor.name, differing, tensor.size, share, worst, nonfinite, *first)


def _pieces(tensor: Tensor, got: Array) -> Iterator[tuple[int | None, int, Array, Array]]:
    """An expert's index or None, the first row, and both sides as float32: the whole, each expert, or some rows."""
    got = np.asarray(got)
    if len(tensor.shape) == 3:
        for e in range(tensor.shape[0]):
            yield e, 0, tensor[e].decode(), got[e].astype(np.float32)
        return
    split = any(part.shape[0] != tensor.shape[0] for part in tensor.parts.values())  # rows permuted when read
    if tensor.shape[0] <= ROWS_AT_A_TIME or split:
        yield None, 0, tensor.decode(), got.astype(np.float32)
        return
    for row in range(0, tensor.shape[0], ROWS_AT_A_TIME):
        end = row + ROWS_AT_A_TIME
        yield None, row, tensor[row:end].decode(), got[row:end].astype(np.float32)


def _allowed(expected: Array, got: Array, profile: Profile) -> Array:
    """Whether each element is the expected one, up to float32's rounding or to the format's."""
    largest = np.abs(expected).max(axis=-1, keepdims=True, initial=0.0)
    slack = ULPS * 2.0**-24 * largest
    if profile.mantissa < 23:
        slack = slack + STEPS * profile.unit_roundoff * np.abs(expected)
    with np.errstate(invalid="ignore"):
        return np.abs(got - expected) <= slack


# --- why


def weights_cause(
    checkpoint: Checkpoint, weights: Mapping[str, Array], faults: list[WeightFault], profile: Profile
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The cause of the first wrong weight, as a check's report has it, and the structure of its error."""
    first = faults[0]
    structure = _structure(checkpoint, weights, first, profile)
    tried = [mistake for mistake in CATALOGUE.values() if mistake.acts(checkpoint)]
    explaining = []
    for mistake in tried:
        made = _made_by(mistake, checkpoint, first.name, first.part)
        if made is not None and made.shape == first.got.shape and _allowed(made, first.got, profile).all():
            explaining.append(mistake)
    if not explaining:
        return None, structure
    roles = {_role(name): name for name in weights if _layer(name) in (None, _layer(first.name))}
    scores = {m.id: _explained(m, checkpoint, weights, list(roles.values()), profile) for m in explaining}
    best = max(explaining, key=lambda m: scores[m.id])
    tied = [m.id for m in explaining if m is not best and scores[m.id] == scores[best.id]]
    other = sorted((m for m in explaining if m is not best), key=lambda m: -scores[m.id])
    made = _made_by(best, checkpoint, first.name, first.part)
    assert made is not None
    left = relative(first.got.astype(np.float64) - made, first.expected)
    return {
        "id": best.id,
        "title": best.title,
        "explanation": best.explanation,
        "residual_before": first.error,
        "residual_after": left,
        "ratio_before": first.error / profile.unit_roundoff,
        "ratio_after": left / profile.unit_roundoff,
        "explained": {"taps": scores[best.id], "of": len(roles)},
        "ambiguous_with": tied,
        "runner_up": {"id": other[0].id, "residual_after": left} if other else None,
        "advice": best.advice,
        "sources": list(best.sources),
        "tried": len(tried),
    }, structure


def _made_by(mistake: Mistake, checkpoint: Checkpoint, name: str, part: int | None) -> Array | None:
    """A weight as a mistake makes it; None if it leaves it alone, or cannot be made on it."""
    honest = lambda name, part=None: _decoded(checkpoint, name, part)  # noqa: E731
    try:
        weight = mistake.variant(Recipe(checkpoint.config, honest)).weight
        if weight is honest:
            return None
        made, true = weight(name, part), honest(name, part)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return None if made.shape == true.shape and np.array_equal(made, true) else made


def _decoded(checkpoint: Checkpoint, name: str, part: Any) -> Array:
    tensor = checkpoint.tensors[name]
    return (tensor if part is None else tensor[part]).decode()


def _explained(
    mistake: Mistake, checkpoint: Checkpoint, weights: Mapping[str, Array], names: list[str], profile: Profile
) -> int:
    """Of these weights, how many are what the mistake makes of them, be it that it leaves them alone."""
    count = 0
    for name in names:
        experts = len(checkpoint.tensors[name].shape) == 3
        got = np.asarray(weights[name][0] if experts else weights[name], dtype=np.float32)
        made = _made_by(mistake, checkpoint, name, 0 if experts else None)
        made = _decoded(checkpoint, name, 0 if experts else None) if made is None else made
        count += made.shape == got.shape and bool(_allowed(made, got, profile).all())
    return count


def _structure(
    checkpoint: Checkpoint, weights: Mapping[str, Array], fault: WeightFault, profile: Profile
) -> dict[str, Any]:
    """What was done to a weight: another stands there, a slip of layout, its blocks' scales, or a pattern found."""
    expected, got = (x.astype(np.float64).reshape(len(x), -1) for x in (fault.expected, fault.got))
    noisy = expected * (1 + profile.unit_roundoff)
    structure = describe(expected, got, noisy, "OI", profile.unit_roundoff)
    if fault.part is not None:
        structure["places"]["N"] = {"affected": None, "of": len(weights[fault.name]), "first": fault.part}
    words = _elsewhere(checkpoint, fault, profile) or _slip(checkpoint, weights, fault.name, profile)
    words = words or explain_blocks(checkpoint.tensors[fault.name], fault.part, fault.expected, fault.got)
    if words is not None:
        structure["sentence"] = words
    return structure


def _elsewhere(checkpoint: Checkpoint, fault: WeightFault, profile: Profile) -> str | None:
    """Another weight of the checkpoint that stands in this one's place."""
    layer = _layer(fault.name)
    for name, tensor in checkpoint.tensors.items():
        same_kind = _role(name) == _role(fault.name) or _layer(name) == layer
        if name == fault.name or tensor.shape != checkpoint.tensors[fault.name].shape or not same_kind:
            continue
        if _allowed(_decoded(checkpoint, name, fault.part), fault.got, profile).all():
            return f"it holds {name}"
    return None


def _slip(checkpoint: Checkpoint, weights: Mapping[str, Array], name: str, profile: Profile) -> str | None:
    """The loaders' search, on bits: A is the checkpoint in the backend's format, B the backend."""
    related = [n for n in weights if _layer(n) == _layer(name) and (n == name or "gate" in n or "up" in n)]
    stored = lambda x: round_mantissa(x, profile.mantissa) if profile.mantissa < 23 else x  # noqa: E731
    ours = {n: _plain(n, stored(checkpoint.tensors[n].decode())) for n in related}
    theirs = {n: _plain(n, np.asarray(weights[n], dtype=np.float32)) for n in related}
    try:
        words = explain(name, ours, theirs, checkpoint.config)
    except KeyError:  # gate without up
        return None
    return None if words is None else f"{words} (A is the checkpoint, B the backend)"


def _plain(name: str, values: Array) -> Tensor:
    values = np.ascontiguousarray(values, dtype="<f4")
    return Tensor(name, values.shape, F32, {"values": values})


def _role(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _layer(name: str) -> str | None:
    return match.group() if (match := re.search(r"layers\.\d+", name)) else None
