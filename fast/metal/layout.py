"""From the containers' encodings to MLX's quantised layouts: bytes in another order, no value decoded. NumPy only.

MLX packs codes into uint32 words, least significant bits first, with a scale for each group: a byte in its
microscaling modes; in mode `affine` a number s, and another b, for w = s q + b with unsigned codes q. ggml's integers
become that with s and b in float32, where s q is exact and the sum is rounded as ggml's own (`loaders/recode.py`).
"""

from dataclasses import dataclass

import numpy as np

from assay.loaders.recode import recode
from assay.reference.formats import (
    F32,
    MLX_MODES,
    MXFP4,
    MXFP4_BLOCKS,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q8_0,
    AffineGroups,
    Microscaled,
)
from assay.reference.weights import Tensor

AFFINE_GROUPS = (32, 64, 128)  # what MLX has kernels for
AFFINE_OF = {
    form: AffineGroups(bits, 32, F32)
    for bits, forms in {4: (Q4_0, Q4_1, Q4_K), 5: (Q5_0, Q5_1, Q5_K), 8: (Q8_0,)}.items()
    for form in forms
}


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
        encoding, parts = MXFP4, recode(encoding, parts, MXFP4)
        return _microscaled(MXFP4, parts["blocks"], parts["scales"], rows)
    if encoding in AFFINE_OF:
        affine = AFFINE_OF[encoding]
        encoding, parts = affine, recode(encoding, parts, affine)
        if not all(np.isfinite(parts[name]).all() for name in ("scales", "biases")):
            return None  # infinity less infinity
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


def _by_row(part: np.ndarray, rows: tuple[int, ...]) -> np.ndarray:
    """A part as [*rows, ...], contiguous, its inner axes joined; a layout change may have split the axis of rows."""
    return np.ascontiguousarray(part).reshape(*rows, -1)
