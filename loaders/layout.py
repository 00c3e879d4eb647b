"""Named, invertible layout changes between what a container stores and the canonical tensor.

Each works on the leading axes of every part of a tensor and answers strided views: nothing is copied.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from assay.reference.config import Config


@dataclass(frozen=True)
class Layout:
    """One change of layout: its name as reports show it, and what it does to a part [rows, ...]."""

    name: str
    apply: Callable[[np.ndarray, Config], np.ndarray]


def _heads(config: Config, letters: str) -> int:
    """How many rows the heads of these kinds have together."""
    return sum(config.dims[letter] for letter in letters) * config.head_dim


def _unpermuted(heads_letter: str) -> Callable[[np.ndarray, Config], np.ndarray]:
    def apply(part: np.ndarray, config: Config) -> np.ndarray:
        heads = config.dims[heads_letter]
        pairs = part.reshape(heads, config.head_dim // 2, 2, *part.shape[1:])
        return np.swapaxes(pairs, 1, 2)  # [heads, half, pair, ...]

    return apply


# llama.cpp's converter interleaves the two halves of each head's rows, so that RoPE pairs neighbours
ROPE_ROWS_Q = Layout("RoPE rows from neighbour pairs to halves", _unpermuted("H"))
ROPE_ROWS_K = Layout("RoPE rows from neighbour pairs to halves", _unpermuted("K"))

# Hugging Face's gate_up_proj [N, 2F, ...]: gate in the even rows, up in the odd ones
GATE_ROWS = Layout("even rows of gate_up", lambda part, config: part[:, 0::2])
UP_ROWS = Layout("odd rows of gate_up", lambda part, config: part[:, 1::2])

# llama.cpp's fused ffn_gate_up_exps [N, 2F, ...]: all gate rows, then all up rows
GATE_HALF = Layout("first half of gate_up", lambda part, config: part[:, : part.shape[1] // 2])
UP_HALF = Layout("second half of gate_up", lambda part, config: part[:, part.shape[1] // 2 :])

# phi-3's fused qkv_proj [(H + 2 K) C, ...]: all rows of q, then of k, then of v; its gate_up_proj [2F, ...]: all
# rows of gate, then of up
Q_ROWS = Layout("q rows of qkv", lambda part, config: part[: _heads(config, "H")])
K_ROWS = Layout("k rows of qkv", lambda part, config: part[_heads(config, "H") : _heads(config, "HK")])
V_ROWS = Layout("v rows of qkv", lambda part, config: part[_heads(config, "HK") :])
GATE_FIRST = Layout("first half of gate_up", lambda part, config: part[: config.intermediate_size])
UP_LAST = Layout("second half of gate_up", lambda part, config: part[config.intermediate_size :])

# transformers keeps unquantised experts [N, in, out]; everywhere else a weight is [out, in]
TRANSPOSED = Layout("transposed", lambda part, config: np.swapaxes(part, 1, 2))
