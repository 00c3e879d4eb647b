"""What every format of fixed-size blocks shares, and how fields are read out of a block."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BlockFormat:
    """A format of fixed-size blocks; its one part is `blocks`, uint8 [..., n, nbytes]."""

    name: str
    elements: int
    nbytes: int
    decode_blocks: Callable[[np.ndarray], np.ndarray]  # uint8 [..., nbytes] -> float32 [..., elements]

    def shape(self, parts: dict[str, np.ndarray]) -> tuple[int, ...]:
        """The shape of the decoded array."""
        *rows, n, _ = parts["blocks"].shape
        return (*rows, self.elements * n)

    def decode(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        """float32 [..., n*elements]; infinite and NaN scales give what IEEE arithmetic gives."""
        with np.errstate(over="ignore", invalid="ignore"):
            values = self.decode_blocks(parts["blocks"])
        return values.reshape(*values.shape[:-2], -1)


@dataclass(frozen=True)
class ScaledBlocks:
    """Blocks under a second scale, NVIDIA's two-level form: parts `blocks` and `scale`, float32 [...], one a row.

    GGUF keeps that scale in a tensor of its own, X.scale beside X.weight, and multiplies the product by it.
    """

    format: BlockFormat

    @property
    def name(self) -> str:
        return f"{self.format.name} under a tensor scale"

    def shape(self, parts: dict[str, np.ndarray]) -> tuple[int, ...]:
        """The shape of the decoded array."""
        return self.format.shape(parts)

    def decode(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        """float32 [..., n*elements]; the block's value, which is exact for NVFP4, times the scale: one rounding."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.format.decode(parts) * parts["scale"][..., None]


def float16_at(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The float16 at a byte offset of every block, as float32 [..., 1]."""
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2").astype(np.float32)


def int8_at(blocks: np.ndarray, offset: int, count: int) -> np.ndarray:
    """`count` signed bytes from an offset on, as float32 [..., count]."""
    return np.ascontiguousarray(blocks[..., offset : offset + count]).view(np.int8).astype(np.float32)
