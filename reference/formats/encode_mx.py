"""float32 to microscaled groups, the scale rule and the rounding of the elements both named."""

import numpy as np

from assay.reference.formats import encode_scales
from assay.reference.formats.elements import Element
from assay.reference.formats.encode_elements import Rounding, ties_to_even
from assay.reference.formats.encode_scales import ScaleRule
from assay.reference.formats.mx import Microscaled, ScaleFormat
from assay.reference.formats.packing import pack_codes


def encode_microscaled(
    values: np.ndarray,
    encoding: Microscaled,
    scale_rule: ScaleRule = encode_scales.floor,
    rounding: Rounding = ties_to_even,
) -> dict[str, np.ndarray]:
    """Parts `blocks` and `scales` of values [..., I]; the defaults are OCP MX v1.0, section 6.3.

    Raises ValueError for values that are not finite or do not fill whole groups.
    """
    groups = split_groups(values, encoding.group)
    scales = scale_rule(np.abs(groups).max(axis=-1), encoding.element)
    codes = encode_group(groups, scales, encoding.scale, encoding.element, rounding)
    return {"blocks": pack_codes(codes, encoding.element.bits), "scales": scales}


def encode_group(
    groups: np.ndarray, scales: np.ndarray, scale_format: ScaleFormat, element: Element, rounding: Rounding
) -> np.ndarray:
    """Codes uint8 [..., n, group] of groups under given scales; the quotient is taken in the groups' dtype.

    A scale of zero, which NVFP4 has for tiny groups, leaves zeros.
    """
    scale = scale_format.to_float32(scales)[..., None].astype(groups.dtype)
    # dividing by a power of two can only lose bits far below half of the smallest element
    with np.errstate(under="ignore", over="ignore"):
        quotients = np.divide(groups, scale, out=np.zeros_like(groups), where=scale != 0)
    return rounding(quotients, element)


def split_groups(values: np.ndarray, group: int) -> np.ndarray:
    """[..., I] as float32 [..., I/group, group]; ValueError for a ragged end, NaN or infinity."""
    if values.ndim == 0 or values.shape[-1] == 0 or values.shape[-1] % group:
        raise ValueError(f"rows of shape {list(values.shape)} do not divide into groups of {group}")
    with np.errstate(over="ignore"):
        groups = values.astype(np.float32).reshape(*values.shape[:-1], -1, group)
    if not np.isfinite(groups).all():
        raise ValueError("NaN or infinity (in float32) cannot be quantised")
    return groups
