"""Every kernel compiled, or loaded from the cache, in the specialisation that the engine uses."""

import gc
from collections.abc import Callable

import numpy as np

from assay.fast.cpu.attention import attend
from assay.fast.cpu.cache import LayerCache
from assay.fast.cpu.decode import decode_rows
from assay.fast.cpu.groups import one_group
from assay.fast.cpu.linear import linear
from assay.fast.cpu.ops import apply_rope, clamped_swiglu, expert_weights, rms_norm, swiglu, top_k, weighted_sum
from assay.fast.cpu.products import ROWS_BY_PANEL, ROWS_IN_REGISTERS, product
from assay.fast.cpu.quantise import MANY, empty_panels, quantise
from assay.fast.cpu.records import QUANTISE_COLUMN, ROWS_TIMES_ONE
from assay.fast.cpu.rows import Q8_0 as Q8
from assay.fast.cpu.rows import encoded_rows
from assay.fast.cpu.token import compile_pass
from assay.reference.formats import Q8_0
from assay.reference.weights import Tensor

SIZE = 32


def steps() -> list[Callable[[], object]]:
    """The kernels in pieces of a few seconds each, longest first; those that hold the same code are in one piece."""
    rows = encoded_rows(Tensor("none", (SIZE, SIZE), Q8_0, {"blocks": np.zeros((SIZE, 1, 34), np.uint8)}))
    x, x_THC, ids = np.ones((8, SIZE), np.float32), np.ones((1, 1, SIZE), np.float32), np.zeros((1, 1), np.int64)
    bias, half, many = np.zeros((1, SIZE), np.float32), np.ones((1, SIZE // 2), np.float32), MANY // 8
    group = one_group(8)
    panels = empty_panels(group.start, 1, Q8)
    some, one = (rows, 0, 0, 0, panels), x[0]

    return [
        lambda: (
            linear(rows, x, bias),
            ROWS_TIMES_ONE.of((0, rows, 0, 0, 0, one, one, one)),
            decode_rows(rows, ids[0]),
        ),
        lambda: (ROWS_BY_PANEL.of((*some, 0, 0, ids[0], one, x)), ROWS_IN_REGISTERS.of((*some, 0, one, one))),
        compile_pass,
        lambda: product(rows, group, panels, bias),  # by way of a scratch
        lambda: (
            quantise(x, group, Q8),
            quantise(np.ones((8, many), np.float32), group, Q8),
            QUANTISE_COLUMN.of((one, 0, 0, panels)),
        ),
        lambda: attend(x_THC, x_THC, x_THC, LayerCache(None, 1, SIZE), np.zeros(1, np.float32)),
        lambda: (rms_norm(x, one, 1e-5), apply_rope(x_THC, half, half), swiglu(x, x), clamped_swiglu(x, x, 1.0, 1.0)),
        lambda: (top_k(x, 1), expert_weights(x[:1], ids), weighted_sum(x[:1, :1], x_THC)),
    ]


def run_step(number: int) -> None:
    """One of them, in a process of its own: Numba compiles one kernel at a time in each."""
    gc.disable()  # most of a compiler's many small objects stay: looking through them took a tenth of the time
    steps()[number]()
