"""Products computed on several threads of the CPU, where MLX computes an operation on one; on a GPU as they are.

An operation runs on its stream, and each stream of the CPU has a thread. Shares of a product are operations of their
own: which of them runs where changes no sum.
"""

import os
import threading
from collections.abc import Callable

import mlx.core as mx

from assay.fast.metal.ops import on_cpu

SHARES = min(4, os.cpu_count() or 1)  # seen with two cores: two shares take half the time
WORTH = 1 << 20  # multiplications, some 0.3 ms of a quantised product; handing a share over costs 0.02 ms

_own = threading.local()  # a stream belongs to the thread that made it


def in_shares(product: Callable[[slice], mx.array], n: int, work: int, axis: int, unit: int = 1) -> mx.array:
    """`product(slice(0, n))`, put together along an axis from shares of n, whole units each.

    In one piece where `work`, in multiplications, is too little for more.
    """
    if work < WORTH or not on_cpu():
        return product(slice(0, n))
    streams = _streams()
    step = -(-n // (len(streams) * unit)) * unit
    shares = []
    for start, stream in zip(range(0, n, step), streams, strict=False):
        with mx.stream(stream):
            shares.append(product(slice(start, min(start + step, n))))
    return shares[0] if len(shares) == 1 else mx.concatenate(shares, axis=axis)


def _streams() -> list[mx.Stream]:
    """This thread's: its default, and some of our own."""
    if not hasattr(_own, "more"):
        _own.more = [mx.new_stream(mx.cpu) for _ in range(SHARES - 1)]
    return [mx.default_stream(mx.cpu), *_own.more]
