"""Every option of Numba's compiler, in one place: no other module but `simd` and `phases` imports numba.

Kernels are strict IEEE arithmetic in the order written; a sum that is to be vector code is written as vectors. So
the same leaf gives the same bits wherever it is compiled into, and NaN and infinity are carried through: a tool
that judges numbers needs both.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import get_num_threads, prange
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.registry import CPUDispatcher
from numba.core.typed_passes import NativeLowering

from assay.fast.cpu.simd import CHECKED, LANE

__all__ = [
    "CHECKED",
    "address_of",
    "checked_threads",
    "get_num_threads",
    "inlined",
    "kernel",
    "leaf",
    "leaf_kernel",
    "parallel_kernel",
    "piece",
    "prange",
    "threads",
]

# GNU OpenMP's threads wait by spinning for milliseconds, which on a busy machine takes the processor from the
# very thread they wait for: a 576 x 576 product took 3.5 ms with two other processes on two cores, 0.12 ms with
# this, and 60 us either way on a free machine. Read when the library loads, at the first parallel kernel.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def _keep_freed_memory() -> None:
    """Let glibc keep up to 256 MB of freed memory, arrays of up to 64 MB among it, for the arrays that follow.

    Otherwise each layer's activations are memory that the system hands out anew and clears, a page at a time: 7 % of
    the time of a prompt of 64 tokens of gpt-oss-20b.
    """
    if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", ()):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 64 << 20)
        mallopt(M_TRIM_THRESHOLD, 256 << 20)


_keep_freed_memory()


def _sources_digest() -> str:
    """Digest of this folder's modules and of what the environment chooses.

    Numba's cache looks at the file of the cached function only. A driver compiled with a leaf or a constant
    of another module inside it would outlive a change there; with the digest in its name it does not.
    """
    digest = hashlib.blake2b(f"{LANE} {CHECKED}".encode(), digest_size=6)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_DIGEST = _sources_digest()
# division by zero is inf or NaN; no kernel is handed on as a C callback
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": CHECKED, "no_cfunc_wrapper": True}


def _compiled(function: Callable, **options: Any) -> Callable:
    function.__qualname__ = f"{function.__qualname__}_{_DIGEST}"
    try:
        return numba.njit(cache=True, **_OPTIONS, **options)(function)
    except RuntimeError:  # neither __pycache__ nor the user's cache folder is writable
        return numba.njit(**_OPTIONS, **options)(function)


def _piece(function: Callable, **options: Any) -> Callable:
    jitted = numba.njit(pipeline_class=_PieceCompiler, **_OPTIONS, **options)(function)
    jitted.__class__ = _Piece
    return jitted


class _Piece(CPUDispatcher):
    """A function of which no machine code is made, but as part of what calls it."""

    def add_overload(self, compiled: Any) -> None:
        """Without what Python would call."""
        self.overloads[compiled.signature.args] = compiled

    def __call__(self, *arguments: Any) -> Any:
        """From Python, as tests do: by a kernel of its own."""
        return _kernel_of(self.py_func)(*arguments)


@cache
def _kernel_of(function: Callable) -> Callable:
    return _compiled(function)


class _PieceLibrary(JITCodeLibrary):
    """Code that is optimised and translated as part of what calls it, and not on its own."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        raise TypeError(f"{name} is a piece of kernels: it lies nowhere")


@register_pass(mutates_CFG=True, analysis_only=False)
class _PieceLowering(NativeLowering):
    """To LLVM's code, without the wrappers for calls from Python and C."""

    _name = "piece_lowering"

    def run_pass(self, state: Any) -> bool:
        state.flags.no_compile = state.flags.no_cpython_wrapper = True
        state.library = _PieceLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        super().run_pass(state)
        entry = object()  # what callers find the function by
        state.targetctx.insert_user_function(entry, state["cr"].fndesc, [state.library])
        state["cr"] = state["cr"]._replace(cfunc=entry)
        return True


class _PieceCompiler(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        pipeline.passes = [(_PieceLowering if p is NativeLowering else p, what) for p, what in pipeline.passes]
        return [pipeline]


def kernel(function: Callable) -> Callable:
    """Compile a serial kernel."""
    return _compiled(function)


def leaf_kernel(function: Callable) -> Callable:
    """Compile a kernel that allocates nothing, so that references to its arrays need not be counted."""
    return _compiled(function, _nrt=False)


def piece(function: Callable) -> Callable:
    """Compile a piece of kernels: machine code is made of them alone.

    Counting references is asked for in so many words: compiled when a `leaf` first calls it, it would go without.
    """
    return _piece(function, _nrt=True)


def leaf(function: Callable) -> Callable:
    """Compile a piece that allocates nothing, so that references to its arrays need not be counted."""
    return _piece(function, _nrt=False)


def inlined(function: Callable) -> Callable:
    """Compile a leaf that is copied into each caller: its constant arguments choose the code."""
    return _piece(function, forceinline=True, _nrt=False)


def parallel_kernel(function: Callable) -> Callable:
    """Compile a driver whose `prange` loop runs on all threads. Costly to compile: only where work is heavy."""
    return _compiled(function, parallel=True)


def address_of(function: Any, arguments: tuple) -> int:
    """Where the machine code of a kernel for arguments of these types lies, for `phases.call_at`."""
    signature = tuple(numba.typeof(argument) for argument in arguments)
    if signature not in function.overloads:
        function.compile(signature)
    compiled = function.overloads[signature]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)


class Address:
    """Where a kernel's machine code lies, asked for again and again: `address_of` looks every type up each time.

    Arrays of other layouts than those before are told apart, for a kernel of one cannot read the other.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._known: dict[tuple, int] = {}

    def of(self, arguments: tuple) -> int:
        """`address_of` the kernel for arguments of these types."""
        key = tuple(_layout(argument) for argument in arguments)
        if key not in self._known:
            self._known[key] = address_of(self._function, arguments)
        return self._known[key]


def _layout(argument: Any) -> Any:
    """What Numba's type of an argument depends on."""
    if isinstance(argument, np.ndarray):
        return argument.dtype, argument.ndim, argument.flags.num
    return tuple(map(_layout, argument)) if isinstance(argument, tuple) else type(argument)


def checked_threads(count: int | None) -> int:
    """How many threads that is, None being Numba's setting.

    Raises ValueError for more than there are.
    """
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set while numba is imported
    if count is not None and not 1 <= count <= most:
        raise ValueError(f"{count} threads: expected 1 to {most}, or a larger NUMBA_NUM_THREADS in the environment")
    return count or get_num_threads()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run kernels on this many threads; None leaves Numba's setting.

    Raises ValueError if there are not that many.
    """
    before = numba.get_num_threads()
    if count is not None:
        numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)
