"""Every encoding as blocks of bytes that decode by themselves: what a dequantisation kernel's test works on.

GGUF's blocks are such already. Where a container keeps scales and codes in tensors of their own, the flat block
is scale first (then bias), then codes; `MXFP4` is so the form of Hugging Face and MLX, `MXFP4_GGUF` GGUF's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from assay.reference.formats import (
    BF16,
    E4M3,
    E8M0,
    F16,
    F32,
    GGML_BLOCKS,
    GGML_PLAIN,
    MICROSCALED,
    MLX_BITS,
    AffineGroups,
    BlockFormat,
    FloatFormat,
    Microscaled,
)
from assay.reference.formats.mx import ScaleFormat

AFFINE_GROUP = 64


@dataclass(frozen=True)
class Field:
    """A scale or minimum in a block: where it lies and how it is stored.

    `unsigned`: bit 7 has no meaning (GGUF's NVFP4), and engines differ in whether they ignore it.
    """

    name: str
    offset: int
    format: ScaleFormat
    unsigned: bool = False

    @property
    def nbytes(self) -> int:
        return self.format.stored.itemsize

    def stored(self, codes: np.ndarray) -> np.ndarray:
        """Integer codes [n] in the dtype that the format is stored in, bit for bit."""
        return codes.astype(f"<u{self.nbytes}").view(self.format.stored)

    def codes(self, blocks: np.ndarray) -> np.ndarray:
        """The codes in blocks [n, nbytes], in the stored dtype, [n]."""
        return np.ascontiguousarray(blocks[:, self.offset : self.offset + self.nbytes]).view(self.format.stored)[:, 0]

    def put(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        """Store integer codes [n] in blocks [n, nbytes], in place."""
        raw = self.stored(codes).view(np.uint8)
        blocks[:, self.offset : self.offset + self.nbytes] = raw.reshape(-1, self.nbytes)

    def values(self, blocks: np.ndarray) -> np.ndarray:
        """What the codes in blocks [n, nbytes] mean, float32 [n]."""
        return self.format.to_float32(self.codes(blocks))

    def is_ordinary(self, codes: np.ndarray) -> np.ndarray:
        """Which codes, in the stored dtype, are finite and mean the same to every engine; bool [n]."""
        return np.isfinite(self.format.to_float32(codes)) & (not self.unsigned or codes < 0x80)


@dataclass(frozen=True)
class BlockForm:
    """An encoding in blocks: `decode` takes uint8 [n, nbytes] to float32 [n, elements]."""

    name: str
    elements: int
    nbytes: int
    fields: tuple[Field, ...]
    layout: str
    decode: Callable[[np.ndarray], np.ndarray]

    def is_ordinary(self, blocks: np.ndarray) -> np.ndarray:
        """Which blocks have ordinary scales only; bool [n]."""
        return np.all([field.is_ordinary(field.codes(blocks)) for field in self.fields], axis=0)


def _block(name: str, format: BlockFormat) -> BlockForm:

    def decode(blocks: np.ndarray) -> np.ndarray:
        return format.decode({"blocks": blocks[:, None]})

    return BlockForm(name, format.elements, format.nbytes, GGUF_FIELDS[format.name], "ggml's struct", decode)


def _microscaled(format: Microscaled) -> BlockForm:
    scale = Field("scale", 0, format.scale)

    def decode(blocks: np.ndarray) -> np.ndarray:
        return format.decode({"blocks": blocks[:, None, scale.nbytes :], "scales": scale.codes(blocks)[:, None]})

    layout = f"{format.scale.name} scale, then {format.element.bits}-bit codes, least significant bits first"
    return BlockForm(format.name, format.group, scale.nbytes + format.group_bytes, (scale,), layout, decode)


def _affine(bits: int, stored: FloatFormat) -> BlockForm:
    encoding = AffineGroups(bits, AFFINE_GROUP, stored)
    scale, bias = Field("scale", 0, stored), Field("bias", stored.stored.itemsize, stored)
    start = 2 * scale.nbytes

    def decode(blocks: np.ndarray) -> np.ndarray:
        weight = np.ascontiguousarray(blocks[:, start:]).view("<u4")
        sides = {"scales": scale.codes(blocks)[:, None], "biases": bias.codes(blocks)[:, None]}
        return encoding.decode({"weight": weight, **sides})

    layout = f"{stored.name} scale, {stored.name} bias, then {bits}-bit codes, least significant bits first"
    nbytes = start + AFFINE_GROUP * bits // 8
    return BlockForm(f"AFFINE{bits}_{stored.name}", AFFINE_GROUP, nbytes, (scale, bias), layout, decode)


def _plain(format: FloatFormat) -> BlockForm:
    value = Field("value", 0, format)

    def decode(blocks: np.ndarray) -> np.ndarray:
        return value.values(blocks)[:, None]

    return BlockForm(format.name, 1, value.nbytes, (value,), "little-endian", decode)


_D, _M = Field("d", 0, F16), Field("m", 2, F16)
GGUF_FIELDS: dict[str, tuple[Field, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "Q8_1", "Q1_0", "Q2_0"), (_D,)),
    **dict.fromkeys(("Q4_1", "Q5_1"), (_D, _M)),
    "Q2_K": (Field("d", 80, F16), Field("dmin", 82, F16)),
    "Q3_K": (Field("d", 108, F16),),
    **dict.fromkeys(("Q4_K", "Q5_K"), (_D, Field("dmin", 2, F16))),
    "Q6_K": (Field("d", 208, F16),),
    "Q8_K": (Field("d", 0, F32),),
    "MXFP4": (Field("e", 0, E8M0),),
    "NVFP4": tuple(Field(f"d{i}", i, E4M3, unsigned=True) for i in range(4)),
}


def _forms() -> list[BlockForm]:
    gguf = [_block(f.name + ("_GGUF" if f.name in MICROSCALED else ""), f) for f in GGML_BLOCKS.values()]
    affine = [_affine(bits, stored) for bits in MLX_BITS for stored in (BF16, F16, F32)]
    return [
        *map(_plain, GGML_PLAIN.values()),
        *gguf,
        *map(_microscaled, MICROSCALED.values()),
        *affine,
    ]


BLOCK_FORMS = {form.name: form for form in _forms()}
