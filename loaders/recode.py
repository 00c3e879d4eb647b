"""The same values in another encoding: re-ordered, widened, narrowed where nothing is lost. Nothing here rounds.

Whether a recoding keeps every value can depend on the values (an affine scale may not fit float16); `keeps` decodes
both sides and compares. ggml's integers with a zero point z in the middle become MLX's affine form with s = d and
b = -z d: both products and their sum are exact in float32, so the values are equal; but s q + b gives +0 where
d (q - z) with a negative d gives -0. Q4_K and Q5_K have d and m for each 32 elements as products of a float16 and a
6-bit integer: affine, too, with scales in float32.
"""

from enum import IntEnum

import numpy as np

from assay.loaders.delegated import DelegatedBlocks
from assay.loaders.weight import Parts, Weight
from assay.reference.formats import (
    BF16,
    F16,
    F32,
    MLX_MODES,
    MXFP4,
    MXFP4_BLOCKS,
    NVFP4,
    NVFP4_BLOCKS,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    AffineGroups,
    BlockFormat,
)
from assay.reference.formats.blocks import float16_at
from assay.reference.formats.floats import FloatFormat
from assay.reference.formats.kquants import NIBBLES, ONE_BIT, planes, six_bit_pairs
from assay.reference.formats.packing import as_bytes, pack_codes, pack_split_half, split_half_nibbles, unpack_codes
from assay.reference.weights import Encoding


class Kept(IntEnum):
    """How much of the values a recoding keeps."""

    NOT = 0
    BUT_ZERO_SIGN = 1  # equal as numbers, some -0 became +0
    BITS = 2


def recode(source: Encoding, parts: Parts, target: Encoding) -> Parts:
    """The parts [rows, ...] of one encoding in another; ValueError for a pair that has no recoding.

    Exact only where `keeps` says so.
    """
    if source is target or source == target:
        return parts
    if isinstance(target, FloatFormat):
        return {"values": narrowed(source.decode(parts), target)}
    if source is MXFP4 and target is MXFP4_BLOCKS:
        return {"blocks": np.concatenate((parts["scales"][..., None], _split_halves(parts["blocks"])), axis=-1)}
    if source is MXFP4_BLOCKS and target is MXFP4:
        scales = np.ascontiguousarray(parts["blocks"][..., 0])
        return {"blocks": _adjacent(parts["blocks"][..., 1:]), "scales": scales}
    if source is NVFP4_BLOCKS and target is NVFP4:
        return _nvfp4_from_blocks(parts["blocks"])
    if source is NVFP4 and target is NVFP4_BLOCKS:
        return {"blocks": _nvfp4_to_blocks(parts)}
    if isinstance(source, BlockFormat) and isinstance(target, AffineGroups) and source.name in _BITS:
        with np.errstate(over="ignore", invalid="ignore"):  # infinite and NaN scales: `keeps` decides
            return _to_affine(source, parts["blocks"], target)
    if isinstance(source, AffineGroups) and isinstance(target, BlockFormat) and target in _STORABLE:
        return _from_affine(source, parts, target)
    raise ValueError(f"no recoding from {source.name} to {target.name}")


def keeps(weight: Weight, target: Encoding) -> Kept:
    """Whether recoding this weight keeps its values; reads all of them unless the two encodings decide it."""
    source = weight.encoding
    if source == target or {source.name, target.name} == {"MXFP4"} or (source, target) in ((BF16, F32), (F16, F32)):
        return Kept.BITS
    if target is NVFP4_BLOCKS and weight.shape[-1] % 64:
        return Kept.NOT
    kept = Kept.BITS
    for parts in weight.pieces(weight.rows_at_a_time):
        kept = min(kept, compare(source.decode(parts), target.decode(recode(source, parts, target))))
        if kept is Kept.NOT:
            break
    return kept


def compare(before: np.ndarray, after: np.ndarray) -> Kept:
    """How much of float32 values is left; a NaN counts as equal to a NaN."""
    if np.array_equal(before.view(np.uint32), after.view(np.uint32)):
        return Kept.BITS
    return Kept.BUT_ZERO_SIGN if np.array_equal(before, after, equal_nan=True) else Kept.NOT


def candidates(source: Encoding, container: str, expert: bool) -> list[Encoding]:
    """Encodings of the container that may hold exactly what a quantised weight of `source` holds, smallest first."""
    if container == "gguf":
        if isinstance(source, AffineGroups):
            return [f for f in _STORABLE if _BITS[f.name] == source.bits and source.group_size % 32 == 0]
        if isinstance(source, BlockFormat | DelegatedBlocks):
            return [source]
    elif source in (MXFP4, MXFP4_BLOCKS) and (container == "mlx" or expert):
        return [MXFP4]
    elif container == "mlx":
        if source.name in _BITS:
            return [AffineGroups(_BITS[source.name], 32, scale) for scale in (F16, F32)]
        if isinstance(source, AffineGroups) or source in MLX_MODES.values():
            return [source]
    return [form for form in _REORDERED.get((source.name, container), ()) if form is not source]


def narrowed(values: np.ndarray, target: FloatFormat) -> np.ndarray:
    """float32 values as float32, float16 or bfloat16 codes, rounded to nearest even where they do not fit."""
    if target is BF16:
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        quiet = bits >> 16 | 0x40  # rounding could carry a NaN's payload into infinity or zero
        return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(target.stored)


# MXFP4's nibbles are moved two bytes at a time: ten times as fast as through 32 unpacked codes, and 20 billion of
# gpt-oss's 21 billion weights pass here.


def _adjacent(halves: np.ndarray) -> np.ndarray:
    """ggml's 16 bytes of nibbles (elements j and j+16 in byte j) as Hugging Face's (2j and 2j+1); uint8 [..., 16]."""
    pairs = np.ascontiguousarray(halves).view("<u2")  # elements 2j, 2j+16, 2j+1, 2j+17 from the lowest nibble up
    first = pairs & 0x0F | pairs >> 4 & 0xF0
    second = pairs >> 4 & 0x0F | pairs >> 8 & 0xF0
    return np.concatenate((first.astype(np.uint8), second.astype(np.uint8)), axis=-1)


def _split_halves(adjacent: np.ndarray) -> np.ndarray:
    """The inverse of `_adjacent`."""
    first, second = adjacent[..., :8].astype(np.uint16), adjacent[..., 8:].astype(np.uint16)
    pairs = first & 0x0F | (first & 0xF0) << 4 | (second & 0x0F) << 4 | (second & 0xF0) << 8
    return pairs.astype("<u2", copy=False).view(np.uint8)


def _nvfp4_from_blocks(blocks: np.ndarray) -> Parts:
    """Four scales and four times 16 elements from each block of 64; ggml ignores a scale's sign."""
    *rows, n, _ = blocks.shape
    codes = split_half_nibbles(blocks[..., 4:].reshape(*rows, n * 4, 8))
    return {"blocks": pack_codes(codes, 4), "scales": (blocks[..., :4] & 0x7F).reshape(*rows, n * 4)}


def _nvfp4_to_blocks(parts: Parts) -> np.ndarray:
    """Blocks of 64 from four groups of 16 each."""
    *rows, groups = parts["scales"].shape
    nibbles = pack_split_half(unpack_codes(parts["blocks"], 4))
    return np.concatenate(
        (parts["scales"].reshape(*rows, groups // 4, 4), nibbles.reshape(*rows, groups // 4, 32)), axis=-1
    )


# What ggml's integer formats make of a group of 32 elements: d q + m, and m is -(zero point) d where none is stored
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}
_ZERO_POINT = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}
_REORDERED: dict[tuple[str, str], list[Encoding]] = {
    ("MXFP4", "gguf"): [MXFP4_BLOCKS],
    ("NVFP4", "gguf"): [NVFP4_BLOCKS],
    ("NVFP4", "mlx"): [NVFP4],
}
_STORABLE = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0]


def _to_affine(source: BlockFormat, blocks: np.ndarray, target: AffineGroups) -> Parts:
    """s = d; b = m."""
    read = _k_fields if source.name.endswith("_K") else _plain_fields
    codes, d, m = read(source.name, blocks)
    rows = blocks.shape[:-2]
    return {
        "weight": _words(codes.reshape(*rows, -1), target.bits),
        "scales": narrowed(d.reshape(*rows, -1), target.scale_format),
        "biases": narrowed(m.reshape(*rows, -1), target.scale_format),
    }


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 [..., I] packed into uint32 [..., I*bits/32]; 8 bits need no packing, which was half of the time."""
    return np.ascontiguousarray(codes if bits == 8 else pack_codes(codes, bits)).view("<u4")


def _plain_fields(name: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned codes uint8 [..., n, 32], d and m float32 [..., n, 1] of blocks of 32."""
    d = float16_at(blocks, 0)
    if name == "Q8_0":
        return blocks[..., 2:] ^ 0x80, d, -128 * d  # two's complement to offset binary
    start = 4 if name.endswith("_1") else 2
    m = float16_at(blocks, 2) if name.endswith("_1") else -_ZERO_POINT[name] * d
    if _BITS[name] == 4:
        return split_half_nibbles(blocks[..., start:]), d, m
    fifth = unpack_codes(blocks[..., start : start + 4], 1)
    return split_half_nibbles(blocks[..., start + 4 :]) | fifth << 4, d, m


def _k_fields(name: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of super-blocks of 8 times 32, whose d and m are products that only float32 holds."""
    scales, minima = six_bit_pairs(blocks[..., 4:16])
    codes = planes(blocks[..., -128:], 32, NIBBLES) & 15
    if name == "Q5_K":
        codes = codes | (planes(blocks[..., 16:48], 32, ONE_BIT) & 1) << 4
    return codes, float16_at(blocks, 0) * scales.astype(np.float32), -float16_at(blocks, 2) * minima.astype(np.float32)


def _from_affine(source: AffineGroups, parts: Parts, target: BlockFormat) -> Parts:
    """d = s, m = b; where the target stores no m, `keeps` finds out whether b was the zero point's."""
    codes = unpack_codes(as_bytes(parts["weight"]), source.bits)
    codes = codes.reshape(*codes.shape[:-1], -1, 32)
    halves = []
    for name in ("scales", "biases") if target.name.endswith("_1") else ("scales",):
        values = source.scale_format.to_float32(np.repeat(parts[name], source.group_size // 32, axis=-1))
        with np.errstate(over="ignore"):
            halves.append(as_bytes(values.astype(np.float16)[..., None]))
    match _BITS[target.name]:
        case 8:
            fields = [codes ^ 0x80]
        case 5:
            fields = [pack_codes(codes >> 4, 1), pack_split_half(codes & 15)]
        case _:
            fields = [pack_split_half(codes)]
    return {"blocks": np.concatenate((*halves, *fields), axis=-1)}
