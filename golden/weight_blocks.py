"""What went wrong block by block in a quantised weight: scales off by powers of two, or those of other blocks."""

import numpy as np

from assay.golden.places import numbers
from assay.reference.weights import Tensor

Array = np.ndarray
SIZES = (32, 16, 64, 128, 256)  # elements that share a scale, in the formats that are read
EXACT = 1e-6  # relative: decoding rounds to float32
SHIFTS = 4  # blocks that a scale is looked for before and after its own


def explain_blocks(tensor: Tensor, part: int | None, expected: Array, got: Array) -> str | None:
    """In words, how `got` comes of `expected` by other scales of blocks, powers of two; None if it does not."""
    if expected.ndim != 2 or not np.isfinite(got).all():
        return _lost(expected, got)
    for size in SIZES:
        if expected.shape[1] % size:
            continue
        ratio = _ratios(expected, got, size)
        if ratio is not None and (words := _described(ratio, size, _scales(tensor, part, ratio.shape))) is not None:
            return words
    return None


def _ratios(expected: Array, got: Array, size: int) -> Array | None:
    """The factor of each block, [rows, blocks]; None if some block is not a multiple of what it should be."""
    x, y = (a.astype(np.float64).reshape(len(a), -1, size) for a in (expected, got))
    energy = np.sum(x * x, axis=-1)
    factor = np.where(energy > 0, np.sum(x * y, axis=-1) / np.where(energy > 0, energy, 1), 1.0)
    left = np.abs(y - factor[..., None] * x).max(axis=-1)
    return factor if np.all(left <= EXACT * np.maximum(np.abs(x).max(axis=-1), np.abs(y).max(axis=-1))) else None


def _scales(tensor: Tensor, part: int | None, shape: tuple[int, ...]) -> Array | None:
    """The stored E8M0 bytes of the blocks, where that is how they are stored."""
    scales = tensor.parts.get("scales")
    if scales is None and tensor.encoding.name.startswith("MXFP4"):
        scales = next(iter(tensor.parts.values()))[..., 0]  # GGUF's blocks begin with theirs
    if scales is None or scales.dtype != np.uint8:
        return None
    scales = scales if part is None else scales[part]
    return scales.reshape(shape) if scales.size == np.prod(shape) else None


def _described(ratio: Array, size: int, scales: Array | None) -> str | None:
    off = np.abs(ratio - 1) > EXACT
    count, rows = int(off.sum()), np.flatnonzero(off.any(axis=1))
    if not count:
        return None
    at = (
        f"{count} of {ratio.size} blocks of {size}, the first in row {rows[0]}, block {np.flatnonzero(off[rows[0]])[0]}"
    )
    if (shift := _shifted(ratio, scales)) is not None:
        return f"each block has the scale of the block {abs(shift)} {'before' if shift > 0 else 'after'} it"
    factors = np.unique(np.round(ratio[off], 6))
    if np.all(ratio[off] == 0):
        return f"zero in {at}" + _codes(scales, off)
    powers = np.log2(np.abs(factors))
    if np.all(np.abs(powers - np.round(powers)) < EXACT):
        by = numbers(np.unique(np.round(powers)))
        return f"the scale's exponent is off by {by} in {at}" + _codes(scales, off)
    return None


def _codes(scales: Array | None, off: Array) -> str:
    """Whether it is the blocks of one scale byte and all of them."""
    if scales is None:
        return ""
    codes = np.unique(scales[off])
    alone = len(codes) <= 2 and np.array_equal(np.isin(scales, codes), off)
    return f": those whose scale byte is {' or '.join(map(str, codes))}, and no others" if alone else ""


def _shifted(ratio: Array, scales: Array | None) -> int | None:
    """By how many blocks the scales are shifted within their rows, or one row's end into the next."""
    if scales is None:
        return None
    exponent = scales.astype(np.int64)
    got = exponent + np.round(np.log2(np.where(ratio > 0, ratio, 1))).astype(np.int64)
    if not (ratio > 0).all() or not np.allclose(ratio, np.exp2(got - exponent), rtol=EXACT):
        return None
    for shift in (s * sign for s in range(1, SHIFTS + 1) for sign in (1, -1)):
        inside = slice(shift, None) if shift > 0 else slice(None, shift)
        if got[:, inside].size and np.array_equal(np.roll(exponent, shift, axis=1)[:, inside], got[:, inside]):
            return shift
    return None


def _lost(expected: Array, got: Array) -> str | None:
    """Values that are no numbers."""
    lost = ~np.isfinite(got)
    return f"{int(lost.sum())} of {got.size} values are not finite" if lost.any() else None
