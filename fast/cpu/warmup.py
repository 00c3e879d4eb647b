"""Every kernel run once on next to nothing, which compiles it or loads it from the cache."""

from collections.abc import Callable

import numpy as np

from assay.fast.cpu.attention import attend
from assay.fast.cpu.cache import LayerCache
from assay.fast.cpu.decode import decode_rows
from assay.fast.cpu.groups import one_group
from assay.fast.cpu.linear import linear
from assay.fast.cpu.ops import apply_rope, clamped_swiglu, expert_weights, rms_norm, swiglu, top_k, weighted_sum
from assay.fast.cpu.products import product
from assay.fast.cpu.quantise import MANY, quantise
from assay.fast.cpu.rows import Q8_0 as Q8
from assay.fast.cpu.rows import Rows, encoded_rows
from assay.reference.formats import Q8_0
from assay.reference.weights import Tensor

SIZE = 32


def _rows(I: int) -> Rows:  # noqa: E741
    blocks = np.zeros((SIZE, I // 32, 34), np.uint8)
    return encoded_rows(Tensor("none", (SIZE, I), Q8_0, {"blocks": blocks}))


def steps() -> list[Callable[[], object]]:
    """The kernels in pieces of a few seconds each, longest first, in the specialisations that the engine uses."""
    rows, bias = _rows(SIZE), np.zeros((1, SIZE), np.float32)
    x, x_THC, ids = np.ones((8, SIZE), np.float32), np.ones((1, 1, SIZE), np.float32), np.zeros((1, 1), np.int64)
    half, group = np.ones((1, SIZE // 2), np.float32), one_group(8)

    def products(columns: int) -> None:
        product(_rows(columns), group, quantise(np.ones((8, columns), np.float32), group, Q8), bias)

    return [
        lambda: linear(rows, x, bias),
        lambda: products(SIZE),  # by way of a scratch
        lambda: decode_rows(rows, ids[0]),
        lambda: products(4 * SIZE),  # from registers
        lambda: attend(x_THC, x_THC, x_THC, LayerCache(None, 1, SIZE), np.zeros(1, np.float32)),
        lambda: quantise(np.ones((8, MANY // 8), np.float32), group, Q8),
        lambda: (rms_norm(x, x[0], 1e-5), apply_rope(x_THC, half, half), swiglu(x, x), clamped_swiglu(x, x, 1.0, 1.0)),
        lambda: (top_k(x, 1), expert_weights(x[:1], ids), weighted_sum(x[:1, :1], x_THC)),
    ]


def run_step(number: int) -> None:
    """One of them, in a process of its own: Numba compiles one kernel at a time in each."""
    steps()[number]()
