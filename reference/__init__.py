"""The oracle: gpt-oss and the Llama family in plain NumPy, float64 by default. Imports nothing it judges."""

from typing import Any

import numpy as np

from assay.reference import gpt_oss, llama
from assay.reference.cache import KVCache
from assay.reference.config import GptOssConfig
from assay.reference.model import Model
from assay.reference.taps import Tap, no_tap

__all__ = ["KVCache", "Model", "forward"]


def forward(model: Model[Any], tokens: np.ndarray, *, cache: KVCache | None = None, tap: Tap = no_tap) -> np.ndarray:
    """Logits [T,V] of T tokens, in the model's dtype.

    With a cache the tokens follow those it holds, and it grows by them: prefill, chunk and decode are
    the same call with another T.
    """
    token_T = np.asarray(tokens, np.int64)
    family = gpt_oss if isinstance(model.config, GptOssConfig) else llama
    return family.forward(model, token_T, KVCache() if cache is None else cache, tap)
