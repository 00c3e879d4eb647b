"""From the containers' encodings to MLX's quantised layouts: bytes in another order, no value decoded. NumPy only.

MLX packs codes into uint32 words, least significant bits first, with a scale for each group: a byte in its
microscaling modes; in mode `affine` a number s, and another b, for w = s q + b with unsigned codes q.
"""

from dataclasses import dataclass

import numpy as np

from assay.reference.formats import MLX_MODES, MXFP4, MXFP4_BLOCKS, Q8_0, AffineGroups, Microscaled
from assay.reference.formats.packing import split_half_nibbles
from assay.reference.weights import Tensor

AFFINE_GROUPS = (32, 64, 128)  # what MLX has kernels for


@dataclass(frozen=True)
class Packed:
    """A quantised matrix [..., O, I] as `mx.quantized_matmul` takes it.

    `weight` uint32 [..., O, I*bits/32]; `scales` [..., O, I/group_size], uint8 or, where `biases` are, floats
    (bfloat16 as its codes, uint16).
    """

    mode: str
    bits: int
    group_size: int
    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None = None


def packed(tensor: Tensor) -> Packed | None:
    """A tensor in MLX's layout with exactly its values; None if MLX has no such layout for it."""
    encoding, parts = tensor.encoding, tensor.parts
    rows = tensor.shape[:-1]
    if isinstance(encoding, Microscaled):
        return _microscaled(encoding, parts["blocks"], parts["scales"], rows)
    if encoding is MXFP4_BLOCKS:
        blocks = parts["blocks"]
        return _microscaled(MXFP4, adjacent_nibbles(blocks[..., 1:]), blocks[..., 0], rows)
    if encoding is Q8_0:
        return _eight_bit(parts["blocks"], rows)
    if isinstance(encoding, AffineGroups) and encoding.group_size in AFFINE_GROUPS:
        weight, scales, biases = (_by_row(parts[name], rows) for name in ("weight", "scales", "biases"))
        return Packed("affine", encoding.bits, encoding.group_size, weight, scales, biases)
    return None


def _microscaled(encoding: Microscaled, blocks: np.ndarray, scales: np.ndarray, rows: tuple[int, ...]) -> Packed | None:
    """Microscaled blocks [..., n, group_bytes], codes least significant first: already MLX's order."""
    mode = next((mode for mode, known in MLX_MODES.items() if known is encoding), None)
    if mode is None:
        return None
    weight = _by_row(blocks, rows).view(np.uint32)
    return Packed(mode, encoding.element.bits, encoding.group, weight, _by_row(scales, rows))


def adjacent_nibbles(split: np.ndarray) -> np.ndarray:
    """ggml's byte j of elements j and j + B to MLX's of elements 2j and 2j + 1; uint8 [..., B] -> [..., B]."""
    codes = split_half_nibbles(split)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _eight_bit(blocks: np.ndarray, rows: tuple[int, ...]) -> Packed | None:
    """Q8_0, w = d q with signed q, as d (q + 128) - 128 d; None if a scale is not finite: infinity less infinity.

    Exact in float32: d has 11 bits and q + 128 has 8, so their product has at most 19; 128 d only moves the
    exponent; and the difference is d q again, of which nothing is rounded.
    """
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
    if not np.isfinite(scales).all():
        return None
    weight = _by_row(blocks[..., 2:] ^ 0x80, rows).view(np.uint32)  # the sign bit turned over adds 128
    return Packed("affine", 8, 32, weight, _by_row(scales, rows), _by_row(-128 * scales, rows))


def _by_row(part: np.ndarray, rows: tuple[int, ...]) -> np.ndarray:
    """A part as [*rows, ...], contiguous, its inner axes joined; a layout change may have split the axis of rows."""
    return np.ascontiguousarray(part).reshape(*rows, -1)
