"""Many short phases in one parallel region: what a token costs is then its work, not the starts of regions.

The phases' jobs are numbered through. A thread takes the next number, waits until every job of the earlier phases is
done, and does its job; the jobs of one phase do not depend on each other. Only a job that a running thread has taken
is ever waited for, so nothing hangs however many threads really run, and a thread that comes late finds less to do.
Which thread does a job changes nothing of what the job computes.
"""

import os
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.np.arrayobj import populate_array

from assay.fast.cpu.jit import leaf
from assay.fast.cpu.simd import intrinsic

LINE = 16  # integers between two counters: two lines of the cache, for lines are fetched in pairs
TAKEN, DONE = 0, 1  # which counter of a run of phases is that of the jobs taken, and of those done
SPINS = 4096  # looks at the counter before the processor is offered to others; some 50 us
X86 = platform.machine().lower() in ("x86_64", "amd64")


def new_counters(n: int) -> np.ndarray:
    """n counters, int64: those of a run of phases are two."""
    return np.zeros(n * LINE, np.int64)


@intrinsic
def _fetch_add(typing_context, array, place):
    """Add one, seen by all threads in one order; what was there before."""

    def emit(context, builder, signature, args):
        view = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.gep(view.data, [args[1]])
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(array, types.int64), emit


@intrinsic
def _load(typing_context, array, place):
    """The number at a place, and with it all that was written before it."""

    def emit(context, builder, signature, args):
        view = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.load_atomic(builder.gep(view.data, [args[1]]), "acquire", 8)

    return types.int64(array, types.int64), emit


def _calling(name: str | None, result: ir.Type) -> Any:
    @intrinsic
    def call(typing_context):
        def emit(context, builder, signature, args):
            if name is not None:
                builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, []), name), [])
            return context.get_dummy_value()

        return types.none(), emit

    return call


_pause = _calling("llvm.x86.sse2.pause" if X86 else None, ir.VoidType())
_yield = _calling("sched_yield" if hasattr(os, "sched_yield") else None, ir.IntType(32))


@leaf
def take(counters, number):
    """The next job that nobody has, by one of the counters."""
    return _fetch_add(counters, number * LINE)


@leaf
def wait(counters, done):
    """Until so many jobs are done."""
    spins = 0
    while _load(counters, DONE * LINE) < done:
        spins += 1
        _pause()
        if spins > SPINS:
            _yield()


@leaf
def finish(counters):
    """Count a job as done."""
    _fetch_add(counters, DONE * LINE)


def address(array: np.ndarray) -> int:
    """Where a contiguous array lies."""
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def _array_at(dtype: types.Type, readonly: bool) -> Any:
    result = types.Array(dtype, 1, "C", readonly=readonly)

    @intrinsic
    def array_at(typing_context, address, size):
        """The array of so many elements at an address; whoever gave the address keeps its memory."""

        def emit(context, builder, signature, args):
            address, size = args
            array = context.make_array(result)(context, builder)
            item = ir.Constant(ir.IntType(64), context.get_abi_sizeof(context.get_data_type(dtype)))
            data = builder.inttoptr(address, context.get_data_type(dtype).as_pointer())
            populate_array(array, data=data, shape=[size], strides=[item], itemsize=item, meminfo=None)
            return array._getvalue()

        return result(types.int64, types.int64), emit

    return array_at


bytes_at = _array_at(types.uint8, readonly=True)
codes_at = _array_at(types.uint8, readonly=False)
halfwords_at = _array_at(types.uint16, readonly=False)
int32s_at = _array_at(types.int32, readonly=False)
int64s_at = _array_at(types.int64, readonly=False)
floats_at = _array_at(types.float32, readonly=False)


@intrinsic
def call_at(typing_context, address, arguments):
    """Call the kernel at an address, which was compiled for arguments of these types and answers nothing.

    A kernel that calls another as such holds a copy of its code, optimised and translated anew each time.
    """

    def emit(context, builder, signature, args):
        argument_types = tuple(signature.args[1])
        function_type = context.call_conv.get_function_type(types.none, argument_types)
        function = builder.inttoptr(args[0], function_type.as_pointer())
        values = cgutils.unpack_tuple(builder, args[1])
        status, _ = context.call_conv.call_function(builder, function, types.none, argument_types, values)
        with builder.if_then(status.is_error, likely=False):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.none(address, arguments), emit
