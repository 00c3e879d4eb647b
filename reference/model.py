"""A model is a config, its stored tensors, and the dtype to compute in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from assay.reference.config import Config
from assay.reference.weights import Tensor

ROWS_AT_A_TIME = 16384  # vocabulary rows decoded at a time: 2880 columns of float64 take 377 MB


FLOAT64 = np.dtype(np.float64)
ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class Model(Generic[ConfigT]):
    """Weights under canonical names, decoded when a step needs them.

    Decoded arrays are kept until `keep_bytes` are in use, so that small models decode once and the
    full-size gpt-oss still runs in a few GB.
    """

    config: ConfigT
    tensors: Mapping[str, Tensor]
    dtype: np.dtype = FLOAT64
    keep_bytes: int = 2 << 30
    _kept: dict[tuple[str, int | range | None], np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def weight(self, name: str, part: int | range | None = None) -> np.ndarray:
        """A tensor in the model's dtype: the whole, one expert of it, or a range of its rows."""
        key = name, part
        if key not in self._kept:
            tensor = self.tensors[name]
            if isinstance(part, range):
                tensor = tensor[part.start : part.stop]
            elif part is not None:
                tensor = tensor[part]
            array = tensor.decode_as(self.dtype)
            if sum(kept.nbytes for kept in self._kept.values()) + array.nbytes > self.keep_bytes:
                return array
            self._kept[key] = array
        return self._kept[key]

    def embed(self, token_T: np.ndarray) -> np.ndarray:
        """Rows of the embedding matrix, [T,D]; only those are decoded."""
        return self.tensors["model.embed_tokens.weight"][token_T].decode().astype(self.dtype)

    def unembed(self, x_TD: np.ndarray) -> np.ndarray:
        """Logits [T,V] by the output head, or by the embedding matrix where the two are tied."""
        name = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        V = self.config.vocab_size
        pieces = [range(v, min(v + ROWS_AT_A_TIME, V)) for v in range(0, V, ROWS_AT_A_TIME)]
        return np.concatenate([x_TD @ self.weight(name, rows).T for rows in pieces], axis=-1)
