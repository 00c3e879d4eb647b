"""GGUF's IQ and TQ types, decoded by gguf-py, which has their code books; their names here say so."""

from dataclasses import dataclass

import numpy as np

from assay.loaders.gguf_file import GGML_TYPES


@dataclass(frozen=True)
class DelegatedBlocks:
    """A block format of ggml whose decode is `gguf.quants.dequantize`; its part is `blocks` uint8 [..., n, nbytes]."""

    number: int

    @property
    def name(self) -> str:
        return f"{GGML_TYPES[self.number].name} (by gguf-py)"

    @property
    def elements(self) -> int:
        return GGML_TYPES[self.number].elements

    @property
    def nbytes(self) -> int:
        return GGML_TYPES[self.number].nbytes

    def shape(self, parts: dict[str, np.ndarray]) -> tuple[int, ...]:
        """The shape of the decoded array."""
        *rows, n, _ = parts["blocks"].shape
        return (*rows, self.elements * n)

    def decode(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        """float32 [..., n*elements], as gguf-py computes it."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        blocks = np.ascontiguousarray(parts["blocks"]).reshape(-1, self.nbytes)
        with np.errstate(over="ignore", invalid="ignore"):
            return dequantize(blocks, GGMLQuantizationType(self.number)).reshape(self.shape(parts))


# every type of ggml's that `assay.reference.formats` leaves out
DELEGATED = {number: DelegatedBlocks(number) for number, type in GGML_TYPES.items() if type.name[:2] in ("IQ", "TQ")}
