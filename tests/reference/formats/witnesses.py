"""Outside implementations that judge the codecs, and where they differ from us on purpose.

A decoding witness takes the flat blocks of `assay.golden.block_forms`, uint8 [n, nbytes], to float32 [n, elements].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gguf
import ml_dtypes
import numpy as np

from assay.golden.block_forms import AFFINE_GROUP, BLOCK_FORMS
from assay.golden.vectors import vectors
from assay.reference.formats import MICROSCALED, MLX_BITS, MLX_MODES, Microscaled
from assay.reference.formats.packing import unpack_codes
from tests.reference.formats import libggml
from tests.reference.formats.compare import bits

Decoder = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Witness:
    """Someone's decoder of a form. Where `agrees` is false it differs from us, as docs/encodings.md says."""

    who: str
    form: str
    decode: Decoder
    agrees: Callable[[np.ndarray], np.ndarray] = lambda blocks: np.ones(len(blocks), bool)
    signed_zeros: bool = True

    def mismatches(self, n: int, seed: int = 1) -> tuple[int, int]:
        """Blocks that decode to other bits, and blocks judged: the form's vectors and `n` of random bytes."""
        form = BLOCK_FORMS[self.form]
        known, rng = vectors(self.form)[0], np.random.default_rng(seed)
        wrong = judged = 0
        for start in range(0, n + len(known), 50_000):
            size = min(50_000, n + len(known) - start)
            blocks = rng.integers(0, 256, (size, form.nbytes), dtype=np.uint8)
            chosen = known[start : start + size]
            blocks[: len(chosen)] = chosen
            blocks = blocks[self.agrees(blocks)]
            with np.errstate(all="ignore"):
                ours, theirs = bits(form.decode(blocks)), bits(self.decode(blocks).reshape(len(blocks), -1))
            differ = ours != theirs
            if not self.signed_zeros:
                differ &= (ours | theirs) << 1 != 0
            wrong, judged = wrong + int(differ.any(axis=1).sum()), judged + len(blocks)
        return wrong, judged


GGUF_PY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "NVFP4")
LIBGGML = (*GGUF_PY, "Q8_K", "Q1_0", "Q2_0")


def _gguf_form(name: str) -> str:
    return f"{name}_GGUF" if name in MICROSCALED else name


def _gguf_edges(name: str) -> dict:
    """E8M0 255 and E4M3 0x7F are NaN to us and numbers to ggml, whose table of E2M1 has no -0."""
    edges = {
        "MXFP4": {"agrees": lambda blocks: blocks[:, 0] != 255, "signed_zeros": False},
        "NVFP4": {"agrees": lambda blocks: ((blocks[:, :4] & 0x7F) != 0x7F).all(axis=1), "signed_zeros": False},
    }
    return edges.get(name, {})


def gguf_py() -> Iterator[Witness]:
    """gguf-py's NumPy decoders."""
    for name in GGUF_PY:
        kind = gguf.GGMLQuantizationType[name]
        yield Witness(
            "gguf-py", _gguf_form(name), lambda b, kind=kind: gguf.quants.dequantize(b, kind), **_gguf_edges(name)
        )


def ggml_library() -> Iterator[Witness]:
    """ggml's C decoders. Q8_1 has none: without its sums it is a Q8_0 block."""
    for name in LIBGGML:
        yield Witness(
            "libggml", _gguf_form(name), lambda b, name=name: libggml.dequantize(name, b), **_gguf_edges(name)
        )
    yield Witness("libggml (as Q8_0)", "Q8_1", lambda b: libggml.dequantize("Q8_0", np.delete(b, (2, 3), axis=1)))


ML_DTYPES = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E8M0": ml_dtypes.float8_e8m0fnu,
    "F16": np.dtype("<f2"),
}


def with_ml_dtypes() -> Iterator[Witness]:
    """ml_dtypes' meaning of elements and scales; the product in float64, rounded to float32."""
    for name, format in MICROSCALED.items():
        if format.element.name not in ML_DTYPES or format.scale.name not in ML_DTYPES:
            continue
        scale_bytes = format.scale.stored.itemsize

        def decode(blocks: np.ndarray, format=format, scale_bytes=scale_bytes) -> np.ndarray:
            codes = unpack_codes(blocks[:, scale_bytes:], format.element.bits)
            elements = codes.view(ML_DTYPES[format.element.name]).astype(np.float64)
            scales = np.ascontiguousarray(blocks[:, :scale_bytes]).view(ML_DTYPES[format.scale.name])
            return (elements * scales.astype(np.float64)).astype(np.float32)

        yield Witness("ml_dtypes", name, decode)


def mlx() -> Iterator[Witness]:
    """mx.dequantize to float32; its E8M0 255 is infinite."""
    for mode, format in MLX_MODES.items():
        agrees = (lambda blocks: blocks[:, 0] != 255) if format.scale.name == "E8M0" else Witness.agrees
        yield Witness("mlx", format.name, _mlx_mode(mode, format), agrees)
    for n_bits in MLX_BITS:
        for scale in ("F32", "F16", "BF16"):
            name = f"AFFINE{n_bits}_{scale}"
            yield Witness("mlx (in float32)", name, _mlx_affine(n_bits, name))


def _mlx_mode(mode: str, format: Microscaled) -> Decoder:
    def decode(blocks: np.ndarray) -> np.ndarray:
        import mlx.core as mx

        per_row = 64 // format.group
        whole = np.resize(blocks, (len(blocks) + -len(blocks) % per_row, blocks.shape[1]))
        packed = np.ascontiguousarray(whole[:, 1:]).view("<u4").reshape(len(whole) // per_row, -1)
        scales = np.ascontiguousarray(whole[:, :1]).reshape(-1, per_row)
        settings = {"group_size": format.group, "bits": format.element.bits, "mode": mode}
        values = mx.dequantize(mx.array(packed), mx.array(scales), dtype=mx.float32, **settings)
        return np.array(values).reshape(len(whole), -1)[: len(blocks)]

    return decode


def _mlx_affine(n_bits: int, name: str) -> Decoder:
    scale, bias = BLOCK_FORMS[name].fields

    def decode(blocks: np.ndarray) -> np.ndarray:
        import mlx.core as mx

        words = np.ascontiguousarray(blocks[:, 2 * scale.nbytes :]).view("<u4")
        sides = [mx.array(np.ascontiguousarray(f.values(blocks)[:, None])) for f in (scale, bias)]
        return np.array(mx.dequantize(mx.array(words), *sides, group_size=AFFINE_GROUP, bits=n_bits))

    return decode


def transformers() -> Iterator[Witness]:
    """transformers' decoder of gpt-oss's expert blocks; by ldexp, so 255 is infinite."""

    def decode(blocks: np.ndarray) -> np.ndarray:
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        codes, scales = torch.from_numpy(blocks[None, :, None, 1:].copy()), torch.from_numpy(blocks[None, :, :1].copy())
        values = convert_moe_packed_tensors(codes, scales, dtype=torch.float32)  # [1, 32, n], transposed
        return values[0].numpy().T

    yield Witness("transformers", "MXFP4", decode, lambda blocks: blocks[:, 0] != 255)
