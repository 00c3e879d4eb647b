"""What this machine can do now: bytes read a second, and operations a second on int8 and on float32.

Machines that are shared drift within an hour, so that only shares of limits measured in the same run mean anything.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic as numba_intrinsic

intrinsic: Any = numba_intrinsic

# feature of the processor, its dot product of bytes in LLVM's words, lanes of 32 bits
DOT_PRODUCTS = (
    ("avx512vnni", "llvm.x86.avx512.vpdpbusd.512", 16),
    ("avxvnni", "llvm.x86.avx512.vpdpbusd.256", 8),
    ("dotprod", "llvm.aarch64.neon.sdot.v4i32.v16i8", 4),
)
CHAINS = 16  # sums in flight: more than the instruction's latency


@dataclass(frozen=True)
class Limits:
    """Of all threads together: bytes read a second, operations a second (a multiply-add is two)."""

    read: float
    float32: float
    int8: float | None  # None where the processor has no dot product of bytes

    def seconds(self, nbytes: float, operations: float, quantised: bool) -> float:
        """The time below which no product can be that reads so much and computes so much."""
        rate = self.int8 if quantised and self.int8 else self.float32
        return max(nbytes / self.read, operations / rate)

    def __str__(self) -> str:
        int8 = f", int8 {self.int8 / 1e9:.0f} GOP/s" if self.int8 else ""
        return f"read {self.read / 1e9:.1f} GB/s, float32 {self.float32 / 1e9:.0f} GFLOP/s{int8}"


def measure() -> Limits:
    """All limits, each the best of several short runs; about two seconds."""
    return Limits(read_bandwidth(), float32_rate(), int8_rate())


def best(work: Callable[[], object], seconds: float = 0.5) -> float:
    """The shortest of at least three runs within about so many seconds, after one that does not count."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def read_bandwidth(nbytes: int = 1 << 29) -> float:
    """Bytes a second that all threads read together from memory, one stream each."""
    words = np.ones(nbytes // 8, np.int64)
    return nbytes / best(lambda: _total(words))


@numba.njit(parallel=True, nogil=True)
def _total(words):
    threads = numba.get_num_threads()
    share = len(words) // threads
    totals = np.zeros(threads, np.int64)
    for i in numba.prange(threads):
        total = 0
        for word in words[i * share : (i + 1) * share]:
            total += word
        totals[i] = total
    return totals.sum()


def float32_rate(n: int = 1536) -> float:
    """Operations a second of NumPy's BLAS on square float32 matrices."""
    a = np.random.default_rng(0).normal(size=(n, n)).astype(np.float32)
    return 2 * n**3 / best(lambda: a @ a)


def int8_rate() -> float | None:
    """Operations a second of the processor's dot product of bytes, from registers to registers."""
    features = llvmlite.binding.get_host_cpu_features()
    found = next((row for row in DOT_PRODUCTS if features.get(row[0], False)), None)
    if found is None:
        return None
    _, name, lanes = found
    run = _dot_product_loop(name, lanes)
    steps = 1 << 21
    # 4 products of bytes in each lane, 2 operations each
    return numba.get_num_threads() * steps * CHAINS * lanes * 8 / best(lambda: run(steps))


def _dot_product_loop(name: str, lanes: int) -> Callable[[int], int]:
    """A compiled loop of `CHAINS` independent dot products a step, on every thread."""
    sums, codes = ir.VectorType(ir.IntType(32), lanes), ir.VectorType(ir.IntType(8), 4 * lanes)
    arm = "aarch64" in name
    argument = codes if arm else sums  # x86 declares the bytes as words

    @intrinsic
    def spin(typing_context, count):
        def emit(context, builder, signature, args):
            module, before = builder.module, builder.block
            dot = module.declare_intrinsic(name, fnty=ir.FunctionType(sums, [sums, argument, argument]))
            loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
            builder.branch(loop)
            builder.position_at_end(loop)
            i = builder.phi(ir.IntType(64))
            totals = [builder.phi(sums) for _ in range(CHAINS)]
            step = builder.insert_element(ir.Constant(sums, None), builder.trunc(i, ir.IntType(32)), ir.IntType(32)(0))
            operand = builder.bitcast(step, argument)
            next_totals = [builder.call(dot, [total, operand, operand]) for total in totals]
            next_i = builder.add(i, i.type(1))
            i.add_incoming(i.type(0), before)
            i.add_incoming(next_i, loop)
            for chain, (total, following) in enumerate(zip(totals, next_totals, strict=True)):
                # different beginnings: equal chains could be computed once for all
                total.add_incoming(ir.Constant(sums, [chain] * lanes), before)
                total.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", next_i, args[0]), loop, after)
            builder.position_at_end(after)
            total = next_totals[0]
            for other in next_totals[1:]:
                total = builder.xor(total, other)
            return builder.extract_element(total, ir.IntType(32)(0))

        return types.int32(types.int64), emit

    @numba.njit(parallel=True, nogil=True)
    def run(steps):
        results = np.zeros(numba.get_num_threads(), np.int32)
        for i in numba.prange(len(results)):
            results[i] = spin(np.int64(steps))
        return results.sum()

    return run


if __name__ == "__main__":
    print(measure())
