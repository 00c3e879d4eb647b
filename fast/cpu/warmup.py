"""Every kernel run once on next to nothing, which compiles it or loads it from the cache."""

from collections.abc import Callable, Iterator

import numpy as np

from assay.fast.cpu.attention import attend
from assay.fast.cpu.cache import LayerCache
from assay.fast.cpu.decode import decode_rows
from assay.fast.cpu.groups import one_group
from assay.fast.cpu.linear import linear
from assay.fast.cpu.ops import apply_rope, clamped_swiglu, expert_weights, rms_norm, swiglu, top_k, weighted_sum
from assay.fast.cpu.products import product
from assay.fast.cpu.quantise import quantise
from assay.fast.cpu.rows import encoded_rows
from assay.reference.formats import Q8_0
from assay.reference.weights import Tensor

SIZE = 32


def steps() -> Iterator[Callable[[], object]]:
    """The kernels in pieces of a few seconds each, in the specialisations that the engine uses."""
    tensor = Tensor("none", (SIZE, SIZE), Q8_0, {"blocks": np.zeros((SIZE, 1, 34), np.uint8)})
    rows, bias = encoded_rows(tensor), np.zeros((1, SIZE), np.float32)
    x, x_THC, ids = np.ones((8, SIZE), np.float32), np.ones((1, 1, SIZE), np.float32), np.zeros((1, 1), np.int64)
    half = np.ones((1, SIZE // 2), np.float32)
    yield lambda: decode_rows(rows, ids[0])
    yield lambda: linear(rows, x, bias)
    for T in (1, 8):  # from registers and from a tile
        yield lambda T=T: product(rows, one_group(T), quantise(x[:T], one_group(T), rows.kind), bias)
    yield lambda: attend(x_THC, x_THC, x_THC, LayerCache(None, 1, SIZE), np.zeros(1, np.float32))
    yield lambda: (rms_norm(x, x[0], 1e-5), apply_rope(x_THC, half, half), swiglu(x, x), clamped_swiglu(x, x, 1.0, 1.0))
    yield lambda: (top_k(x, 1), expert_weights(x[:1], ids), weighted_sum(x[:1, :1], x_THC))
