"""MLX's affine quantisation: groups of integers with a scale and a bias each.

Layout from mlx/ops.cpp `quantize`: codes packed least significant bits first into uint32 words, across words for
3, 5 and 6 bits. Its other modes are microscaling: mxfp4 is MXFP4, mxfp8 MXFP8_E4M3, nvfp4 NVFP4 (see mx.py).
"""

from dataclasses import dataclass

import numpy as np

from assay.reference.formats.floats import FloatFormat
from assay.reference.formats.mx import MXFP4, MXFP8_E4M3, NVFP4
from assay.reference.formats.packing import as_bytes, unpack_codes

MLX_BITS = (2, 3, 4, 5, 6, 8)
MLX_MODES = {"mxfp4": MXFP4, "mxfp8": MXFP8_E4M3, "nvfp4": NVFP4}


@dataclass(frozen=True)
class AffineGroups:
    """w = s q + b for groups along the last axis; bits from `MLX_BITS`.

    Parts: `weight` uint32 [..., I*bits/32], `scales` and `biases` [..., I/group_size] in `scale_format`.
    """

    bits: int
    group_size: int
    scale_format: FloatFormat

    @property
    def name(self) -> str:
        return f"affine{self.bits}/{self.group_size}"

    def shape(self, parts: dict[str, np.ndarray]) -> tuple[int, ...]:
        """The shape of the decoded array."""
        *rows, n = parts["scales"].shape
        return (*rows, self.group_size * n)

    def decode(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        """float32 [..., I]: the product in float32, exact for 16-bit scales, then the sum, rounded once.

        MLX computes in the scales' own dtype and rounds to it twice; this is what its float32 would give.
        """
        codes = unpack_codes(as_bytes(parts["weight"]), self.bits)
        grouped = codes.reshape(*parts["scales"].shape, self.group_size).astype(np.float32)
        scales, biases = (self.scale_format.to_float32(parts[name])[..., None] for name in ("scales", "biases"))
        with np.errstate(over="ignore", invalid="ignore"):
            values = scales * grouped + biases
        return values.reshape(*values.shape[:-2], -1)
