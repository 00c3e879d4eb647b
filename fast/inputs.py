"""What the fast paths are given, checked: kernels check no bounds."""

from collections.abc import Mapping

import numpy as np

from assay.loaders.errors import CheckpointError
from assay.reference.config import Config
from assay.reference.weights import Tensor, weight_shapes


def checked_tokens(config: Config, tokens: np.ndarray, past: int = 0) -> np.ndarray:
    """Token ids as int64 [T]; ValueError for what is no row of ids within the vocabulary.

    Also for more, with the `past` that they follow, than the context that the configuration declares.
    """
    token_T = np.asarray(tokens)
    if token_T.ndim != 1 or not token_T.size or not np.issubdtype(token_T.dtype, np.integer):
        raise ValueError(f"tokens must be a non-empty row of integers, got {token_T.dtype} {list(token_T.shape)}")
    V = config.vocab_size
    outside = np.flatnonzero((token_T < 0) | (token_T >= V))
    if outside.size:
        t = outside[0]
        raise ValueError(f"token id {token_T[t]} at position {t}: the vocabulary has ids 0 to {V - 1}")
    if past + len(token_T) > config.max_position_embeddings:
        raise ValueError(
            f"{past + len(token_T)} tokens in all: the model's context holds {config.max_position_embeddings}"
        )
    return token_T.astype(np.int64)


class WeightSource:
    """Tensors by canonical name, in the shapes that a configuration says."""

    def __init__(self, config: Config, tensors: Mapping[str, Tensor]) -> None:
        self.shapes, self._tensors = weight_shapes(config), tensors

    def take(self, name: str) -> Tensor:
        """A tensor, still encoded; CheckpointError if it is missing or misshapen."""
        shape = self.shapes[name]
        if name not in self._tensors:
            raise CheckpointError("tensor missing", where=name, expected=f"shape {list(shape)}")
        tensor = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError("wrong shape", where=name, expected=list(shape), got=list(tensor.shape))
        return tensor
