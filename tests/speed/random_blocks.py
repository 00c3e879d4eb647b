"""Random blocks of the K-quants, which nothing here can encode: any bytes are codes, only the scales must be sane."""

import numpy as np

from assay.reference.formats.ggml import GGML_BLOCKS
from assay.reference.weights import Encoding

K_QUANTS = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where a block has its float16 scales


def random_blocks(
    name: str, rng: np.random.Generator, rows: int, columns: int
) -> tuple[Encoding, dict[str, np.ndarray]]:
    """An encoding and parts of a matrix."""
    encoding = next(encoding for encoding in GGML_BLOCKS.values() if encoding.name == name)
    blocks = rng.integers(0, 256, (rows, columns // 256, encoding.nbytes), np.uint8)
    for place in K_QUANTS[name]:
        blocks[..., place : place + 2] = (
            rng.uniform(1e-4, 2e-4, blocks.shape[:2]).astype("<f2")[..., None].view(np.uint8)
        )
    return encoding, {"blocks": blocks}
