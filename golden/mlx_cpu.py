"""How MLX computes on x86 CPUs: sums one after the other, of quantised products in the dtype of the inputs.

From mlx 0.32.4 backend/cpu/quantized.cpp (`_qmm_t`, `fp_qmm_t`), gemms/simd_gemm.h, ops.cpp `affine_dequantize` and
fast.cpp `rms_norm`; equal to the results of that version bit for bit. On a GPU sums are float32 and in no such order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from assay.golden.emulation import with_product
from assay.reference.config import Config
from assay.reference.formats import MLX_MODES, MXFP4, MXFP4_BLOCKS, AffineGroups, Microscaled
from assay.reference.formats.packing import as_bytes, unpack_codes
from assay.reference.model import Model
from assay.reference.weights import Tensor

SUMS_AT_A_TIME = 1 << 14

Round = Callable[[np.ndarray], None]  # float32 rounded in place


def round_to_bfloat16(x: np.ndarray) -> None:
    """float32 rounded to bfloat16 in place, nearest even; for what is no NaN, or the processor's own."""
    code = x.view(np.uint32)
    odd = code >> np.uint32(16)
    odd &= np.uint32(1)
    odd += np.uint32(0x7FFF)
    code += odd
    code &= np.uint32(0xFFFF0000)


def unrounded(x: np.ndarray) -> None:
    """float32 stays float32."""


@dataclass(frozen=True)
class MlxCpuModel(Model[Config]):
    """The oracle's model, its weights multiplied as MLX does; `round` is that of sums over quantised weights."""

    round: Round = unrounded

    def weight(self, name: str, part: int | range | None = None) -> np.ndarray:
        """As the oracle's, matrices with a product of their own; sums over plain ones are in float32 always."""
        tensor = self.tensors[name]
        if part is not None and (_grouped(tensor) or isinstance(tensor.encoding, AffineGroups)):
            tensor = tensor[part.start : part.stop] if isinstance(part, range) else tensor[part]
        if isinstance(tensor.encoding, AffineGroups):
            return with_product(self._affine(tensor), partial(one_by_one, self.round))
        array = super().weight(name, part)
        if _grouped(tensor):
            scale_OG = _group_scales(tensor).reshape(*array.shape[:-1], -1)
            return with_product(array, partial(group_by_group, self.round, scale_OG))
        return with_product(array, partial(one_by_one, unrounded)) if array.ndim > 1 else array

    def embed(self, token_T: np.ndarray) -> np.ndarray:
        """Rows of the embedding matrix, decoded as MLX does."""
        tensor = self.tensors["model.embed_tokens.weight"]
        return self._affine(tensor[token_T]) if isinstance(tensor.encoding, AffineGroups) else super().embed(token_T)

    def _affine(self, tensor: Tensor) -> np.ndarray:
        """s q + b with every step rounded, s and b themselves too."""
        encoding = tensor.encoding
        assert isinstance(encoding, AffineGroups)
        scales, biases = (
            encoding.scale_format.to_float32(tensor.parts[name])[..., None].copy() for name in ("scales", "biases")
        )
        codes = unpack_codes(as_bytes(tensor.parts["weight"]), encoding.bits)
        self.round(scales)
        self.round(biases)
        weight = scales * codes.reshape(*scales.shape[:-1], encoding.group_size).astype(np.float32)
        self.round(weight)
        weight += biases
        self.round(weight)
        return weight.reshape(tensor.shape)


def _grouped(tensor: Tensor) -> bool:
    """Whether MLX has the tensor in one of its microscaling modes; GGUF's MXFP4 comes there re-ordered."""
    return tensor.encoding is MXFP4_BLOCKS or tensor.encoding in MLX_MODES.values()


def _group_scales(tensor: Tensor) -> np.ndarray:
    if tensor.encoding is MXFP4_BLOCKS:
        return MXFP4.scale.to_float32(tensor.parts["blocks"][..., 0])
    assert isinstance(tensor.encoding, Microscaled)
    return tensor.encoding.scale.to_float32(tensor.parts["scales"])


def one_by_one(round: Round, x: np.ndarray, weight_IO: np.ndarray) -> np.ndarray:
    """x [..., I] @ weight, every product and every partial sum rounded."""
    x_RI = x.reshape(-1, x.shape[-1]).astype(np.float32)
    sums = [_summed(round, x_RI, weight_IO[:, columns]) for columns in _tiles(len(x_RI), weight_IO.shape[1])]
    return np.concatenate(sums, axis=1).reshape(*x.shape[:-1], -1).astype(x.dtype)


def group_by_group(round: Round, scale_OG: np.ndarray, x: np.ndarray, weight_IO: np.ndarray) -> np.ndarray:
    """x [..., I] @ weight: a group's elements are added up one by one and then scaled, the groups likewise."""
    G = scale_OG.shape[1]
    x_GRI = x.reshape(-1, G, x.shape[-1] // G).swapaxes(0, 1).astype(np.float32)
    scale_GO = scale_OG.T
    element_GIO = weight_IO.reshape(G, -1, weight_IO.shape[1]) / np.where(scale_GO == 0, 1, scale_GO)[:, None]
    sums = []
    for columns in _tiles(x_GRI.shape[1], weight_IO.shape[1]):
        total_RO = np.zeros((x_GRI.shape[1], 1), np.float32)
        for x_RI, element_IO, scale_O in zip(x_GRI, element_GIO[..., columns], scale_GO[:, columns], strict=True):
            part_RO = _summed(round, x_RI, element_IO)
            part_RO *= scale_O
            round(part_RO)
            part_RO += total_RO
            round(part_RO)
            total_RO = part_RO
        sums.append(total_RO)
    return np.concatenate(sums, axis=1).reshape(*x.shape[:-1], -1).astype(x.dtype)


def _summed(round: Round, x_RI: np.ndarray, weight_IO: np.ndarray) -> np.ndarray:
    total_RO = np.zeros((len(x_RI), weight_IO.shape[1]), np.float32)
    for x_R, weight_O in zip(x_RI.T, weight_IO, strict=True):
        term_RO = x_R[:, None] * weight_O
        round(term_RO)
        total_RO += term_RO
        round(total_RO)
    return total_RO


def _tiles(R: int, O: int) -> list[slice]:  # noqa: E741
    """Columns in pieces whose sums stay in the processor's cache."""
    step = max(1, SUMS_AT_A_TIME // R)
    return [slice(start, start + step) for start in range(0, O, step)]


def sequential_rms_norm(round: Round, x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm, its squares added up one by one in float32, rounded before the multiplication by the weight."""
    x = x_TD.astype(np.float32)
    mean_T1 = np.add.accumulate(x * x, axis=-1)[:, -1:] * np.float32(1 / x.shape[-1])
    normed = x * (np.float32(1) / np.sqrt(mean_T1 + np.float32(eps)))
    round(normed)
    return normed * weight_D
