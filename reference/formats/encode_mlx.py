"""MLX's quantisers as mx.quantize of 0.32.4 runs on a CPU, step by step in float32 as there.

Its Metal kernels take the same scales but break ties of 4-bit elements to even. Up to 0.32.2 the scale of mxfp4
and mxfp8 was the nearest power of two (`encode_scales.nearest`) instead of the next one up (`rceil`).
"""

import numpy as np

from assay.reference.formats.elements import Element
from assay.reference.formats.encode_elements import Rounding, ties_to_even, ties_to_zero
from assay.reference.formats.encode_mx import encode_microscaled, split_groups
from assay.reference.formats.encode_scales import e4m3, rceil
from assay.reference.formats.floats import BF16, F16, F32, FloatFormat
from assay.reference.formats.mlx import AffineGroups
from assay.reference.formats.mx import MXFP4, MXFP8_E4M3, NVFP4
from assay.reference.formats.packing import pack_codes

SMALLEST_SCALE = np.float32(1e-7)


def encode_affine(values: np.ndarray, encoding: AffineGroups) -> dict[str, np.ndarray]:
    """Parts `weight`, `scales` and `biases` of values [..., I].

    The bias is the end of larger magnitude, and the scale is adjusted so that zero has a code of its own.
    Raises ValueError for values that are not finite or do not fill whole groups.
    """
    groups = split_groups(values, encoding.group_size)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    levels = np.float32(2**encoding.bits - 1)
    scale = np.maximum((high - low) / levels, SMALLEST_SCALE)
    from_low = np.abs(low) > np.abs(high)
    scale, edge = np.where(from_low, scale, -scale), np.where(from_low, low, high)
    steps = np.rint(edge / scale)
    scale = np.where(steps == 0, scale, edge / np.where(steps == 0, np.float32(1), steps))
    bias = np.where(steps == 0, np.float32(0), edge)
    codes = np.clip(np.rint((groups - bias) / scale), 0, levels).astype(np.uint8)
    packed = pack_codes(codes.reshape(*values.shape), encoding.bits)
    return {
        "weight": packed.view("<u4"),
        "scales": round_to(scale[..., 0], encoding.scale_format),
        "biases": round_to(bias[..., 0], encoding.scale_format),
    }


def round_to(values: np.ndarray, format: FloatFormat) -> np.ndarray:
    """Finite float32 [...] in F32, F16 or BF16, ties to even; ValueError where float16 overflows."""
    if format is BF16:
        code = values.view(np.uint32).astype(np.uint64)
        return (code + 0x7FFF + (code >> 16 & 1) >> 16).astype(BF16.stored)
    if format not in (F16, F32):
        raise ValueError(f"values cannot be stored as {format.name}; expected F32, F16 or BF16")
    with np.errstate(over="ignore"):
        rounded = values.astype(format.stored)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{np.abs(values).max():.6g} exceeds {format.name}; choose BF16 or F32")
    return rounded


def _rceil_or_one(amax: np.ndarray, element: Element) -> np.ndarray:
    """`rceil`, but a group of zeros has the scale 1."""
    return np.where(amax == 0, np.uint8(127), rceil(amax, element))


def encode_mxfp4(values: np.ndarray, rounding: Rounding = ties_to_zero) -> dict[str, np.ndarray]:
    """MXFP4 parts of values [..., 32n]; `ties_to_even` for what a Metal kernel gives."""
    return encode_microscaled(values, MXFP4, _rceil_or_one, rounding)


def encode_mxfp8(values: np.ndarray) -> dict[str, np.ndarray]:
    """MXFP8_E4M3 parts of values [..., 32n]."""
    return encode_microscaled(values, MXFP8_E4M3, _rceil_or_one, ties_to_even)


def encode_nvfp4(values: np.ndarray, rounding: Rounding = ties_to_zero) -> dict[str, np.ndarray]:
    """NVFP4 parts of values [..., 16n]; `ties_to_even` for what a Metal kernel gives."""
    return encode_microscaled(values, NVFP4, e4m3, rounding)
