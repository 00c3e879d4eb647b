"""Vectors of 16 to 64 bytes as values that kernels can hold, and the few operations on them that Numba lacks.

Each piece emits LLVM's own vector code, which every processor can run; two of them, the dot product of bytes and
the byte table, use the x86 instruction where the processor has it (AVX-512 VNNI and BW) and ASSAY_CPU is not
`portable`. Loads and stores take an array and a place in it: bytes for the byte vectors, elements for others.
With ASSAY_CPU_CHECK=1 they check their bounds and raise IndexError; otherwise nothing does.

The twins of all pieces in plain NumPy are in `tests/fast/cpu/test_simd.py`.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.datamodel import models
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import register_model

from assay.loaders.errors import CheckpointError

intrinsic: Any = numba_intrinsic  # its arguments are not those of the function that it decorates

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BITS = {I8: 8, I16: 16, I32: 32, I64: 64, F32: 32}
CHECKED = os.environ.get("ASSAY_CPU_CHECK") == "1"


def _has_instructions() -> bool:
    needed = {"avx512vnni", "avx512bw", "avx512vbmi"}
    name, features = config.CPU_NAME, config.CPU_FEATURES  # type: ignore[attr-defined]  # set while numba is imported
    if name is not None:  # Numba is told to compile for another processor than this
        return needed <= {feature.removeprefix("+") for feature in (features or "").split(",")}
    here = llvmlite.binding.get_host_cpu_features()
    return all(here.get(feature, False) for feature in needed)


def _lane() -> str:
    wanted = os.environ.get("ASSAY_CPU", "")
    if wanted not in ("", "portable", "avx512vnni"):
        raise CheckpointError(
            f"the environment asks for kernels that there are not: ASSAY_CPU={wanted}",
            expected="portable or avx512vnni, or nothing for what the CPU has",
        )
    if wanted == "avx512vnni" and not _has_instructions():
        raise CheckpointError(
            "the environment asks for kernels that this CPU cannot run: ASSAY_CPU=avx512vnni",
            expected="a CPU with AVX-512 BW, VBMI and VNNI",
            remedy="leave the variable out, or set it to portable",
        )
    return wanted or ("avx512vnni" if _has_instructions() else "portable")


LANE = _lane()


class Vector(types.Type):
    """The type of a vector of `lanes` elements."""

    def __init__(self, element: ir.Type, lanes: int) -> None:
        super().__init__(name=f"Vector({element} x {lanes})")
        self.llvm = ir.VectorType(element, lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


BYTES = Vector(I8, 64)
INTS, FLOATS = Vector(I32, 16), Vector(F32, 16)
INTS4, FLOATS4 = Vector(I32, 4), Vector(F32, 4)
HALF_CODE_BIAS = 2.0**112  # a float16's exponent and mantissa, read as a float32's, are the number over this


@cache
def _constants(vector: ir.VectorType, values: tuple[float | int, ...]) -> ir.Constant:
    """A vector of constants; to write one down takes longer than all else about an instruction, so they are kept."""
    return ir.Constant(vector, list(values))


def _splat(vector: ir.VectorType, value: float | int) -> ir.Constant:
    return _constants(vector, (value,) * vector.count)


def _shuffle(builder: Any, a: Any, b: Any, places: Sequence[int]) -> Any:
    return builder.shuffle_vector(a, b, _constants(ir.VectorType(I32, len(places)), tuple(places)))


def _join(builder: Any, pieces: Sequence[Any]) -> Any:
    """Vectors one after the other in one; their number is a power of two."""
    while len(pieces) > 1:
        n = 2 * pieces[0].type.count
        pieces = [_shuffle(builder, a, b, range(n)) for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
    return pieces[0]


class View:
    """An array in a function that is being compiled, opened once for many loads."""

    def __init__(self, context: Any, builder: Any, array_type: Any, array: Any) -> None:
        view = context.make_array(array_type)(context, builder, array)
        self._context, self._builder, self.data = context, builder, view.data
        if CHECKED:
            self._items, self._item = view.nitems, context.get_abi_sizeof(context.get_data_type(array_type.dtype))

    def pointer(self, place: Any, target: ir.Type) -> Any:
        """Where an element lies, as a pointer to `target`."""
        builder = self._builder
        if CHECKED:
            size = target.count * BITS[target.element] // 8 if isinstance(target, ir.VectorType) else BITS[target] // 8
            last = builder.add(place, ir.Constant(place.type, size // self._item))
            outside = builder.or_(
                builder.icmp_signed("<", place, ir.Constant(place.type, 0)), builder.icmp_signed(">", last, self._items)
            )
            with builder.if_then(outside, likely=False):
                message = "vector beyond the end of an array"
                self._context.call_conv.return_user_exc(builder, IndexError, (message,))
        return builder.bitcast(builder.gep(self.data, [place]), target.as_pointer())

    def load(self, place: Any, target: ir.Type) -> Any:
        """`target` from an element on, at any alignment."""
        return self._builder.load(self.pointer(place, target), align=1)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, place: Any, target: ir.Type) -> Any:
    """Where an element of an array lies, as a pointer to `target`."""
    return View(context, builder, array_type, array).pointer(place, target)


def _load(context: Any, builder: Any, array_type: Any, array: Any, place: Any, target: ir.Type) -> Any:
    return View(context, builder, array_type, array).load(place, target)


def _masked_load(context: Any, builder: Any, array_type: Any, array: Any, place: Any, there: Any) -> Any:
    """16 floats from a place on, zeros for those that are not there; the first is."""
    pointer = builder.bitcast(_pointer(context, builder, array_type, array, place, F32), FLOATS.llvm.as_pointer())
    name, align, none = "llvm.masked.load.v16f32.p0", ir.Constant(I32, 4), ir.Constant(FLOATS.llvm, None)
    return _call(builder, name, FLOATS.llvm, pointer, align, there, none)


def _masked_store(context: Any, builder: Any, array_type: Any, array: Any, place: Any, there: Any, v: Any) -> None:
    """Those of 16 floats that are there to a place; the first is."""
    pointer = builder.bitcast(_pointer(context, builder, array_type, array, place, F32), FLOATS.llvm.as_pointer())
    _call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), v, pointer, ir.Constant(I32, 4), there)


def _loader(result: Vector) -> Callable:
    @intrinsic
    def load(typing_context, array, place):
        def emit(context, builder, signature, args):
            return _load(context, builder, signature.args[0], *args, result.llvm)

        return result(array, types.int64), emit

    return load


load_floats = _loader(FLOATS)


def _widened(element: ir.Type, extend: Callable) -> Callable:
    """16 elements from a byte of an array on, each made 32 bits wide."""

    @intrinsic
    def load(typing_context, array, place):
        def emit(context, builder, signature, args):
            narrow = _load(context, builder, signature.args[0], *args, ir.VectorType(element, 16))
            return extend(builder, narrow)

        return INTS(array, types.int64), emit

    return load


load_16_unsigned = _widened(I8, lambda b, v: b.zext(v, INTS.llvm))
load_16_signed = _widened(I8, lambda b, v: b.sext(v, INTS.llvm))
load_16_halfwords = _widened(I16, lambda b, v: b.zext(v, INTS.llvm))


@intrinsic
def store_bytes(typing_context, array, place, vector):
    """64 bytes at a place of a byte array."""

    def emit(context, builder, signature, args):
        array, place, vector = args
        pointer = _pointer(context, builder, signature.args[0], array, place, vector.type)
        builder.store(vector, pointer, align=1)
        return context.get_dummy_value()

    return types.none(array, types.int64, vector), emit


store_floats = store_bytes  # 16 floats at a place of an array of floats


def _unary(argument: Vector, result: Vector, code: Callable) -> Callable:
    @intrinsic
    def piece(typing_context, vector):
        return result(argument), lambda context, builder, signature, args: code(builder, *args)

    return piece


def _binary(argument: Vector, code: Callable) -> Callable:
    @intrinsic
    def piece(typing_context, a, b):
        return argument(argument, argument), lambda context, builder, signature, args: code(builder, *args)

    return piece


add = _binary(FLOATS, lambda b, x, y: b.fadd(x, y))
multiply = _binary(FLOATS, lambda b, x, y: b.fmul(x, y))
larger = _binary(FLOATS, lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))  # y where either is NaN
low_nibbles_of_ints = _unary(INTS, INTS, lambda b, v: b.and_(v, _splat(v.type, 15)))
high_nibbles_of_ints = _unary(INTS, INTS, lambda b, v: b.lshr(v, _splat(v.type, 4)))  # of bytes made wide
ints_to_floats = _unary(INTS, FLOATS, lambda b, v: b.sitofp(v, FLOATS.llvm))
bfloats_to_floats = _unary(INTS, FLOATS, lambda b, v: b.bitcast(b.shl(v, _splat(v.type, 16)), FLOATS.llvm))


def _power_of_two(builder: Any, v: Any) -> Any:
    bits = builder.shl(v, _splat(v.type, 23))
    subnormal = builder.icmp_signed("==", v, _splat(v.type, 0))
    nan = builder.icmp_signed("==", v, _splat(v.type, 255))
    bits = builder.select(subnormal, _splat(v.type, 0x00400000), bits)
    bits = builder.select(nan, _splat(v.type, 0x7FC00000), bits)
    return builder.bitcast(bits, ir.VectorType(F32, v.type.count))


def _float_of_exponent(builder: Any, bits: Any) -> Any:
    """`_power_of_two` of 16 exponents that are where a float has them."""
    if LANE == "portable":
        return _power_of_two(builder, builder.lshr(bits, _splat(bits.type, 23)))
    # one instruction looks at what each number is: 0 becomes the smallest power, infinity NaN, the others stay
    smallest = builder.bitcast(_splat(bits.type, 0x00400000), FLOATS.llvm)
    by_class = _splat(bits.type, 0x10301000)  # a nibble a class: 0 the first operand, 1 the second, 3 NaN
    every, current = ir.Constant(I16, -1), ir.Constant(I32, 4)  # lanes; rounding mode
    name = "llvm.x86.avx512.mask.fixupimm.ps.512"
    numbers = builder.bitcast(bits, FLOATS.llvm)
    return _call(builder, name, FLOATS.llvm, smallest, numbers, by_class, ir.Constant(I32, 0), every, current)


def _half(builder: Any, v: Any) -> Any:
    if LANE != "portable":
        halves = builder.bitcast(
            builder.trunc(v, ir.VectorType(I16, v.type.count)), ir.VectorType(ir.HalfType(), v.type.count)
        )
        return builder.fpext(halves, ir.VectorType(F32, v.type.count))
    floats = ir.VectorType(F32, v.type.count)
    sign = builder.shl(builder.and_(v, _splat(v.type, 0x8000)), _splat(v.type, 16))
    magnitude = builder.shl(builder.and_(v, _splat(v.type, 0x7FFF)), _splat(v.type, 13))
    number = builder.fmul(builder.bitcast(magnitude, floats), _splat(floats, HALF_CODE_BIAS))
    special = builder.icmp_signed(">=", magnitude, _splat(v.type, 0x0F800000))  # infinity and NaN
    bits = builder.select(special, builder.or_(magnitude, _splat(v.type, 0x7F800000)), builder.bitcast(number, v.type))
    return builder.bitcast(builder.or_(bits, sign), floats)


halves_to_floats = _unary(INTS, FLOATS, _half)  # float16 by its 16 bits


def _loaded(element: ir.Type, code: Callable) -> Callable:
    """An element from a byte of an array on, as a float, 16 times."""

    @intrinsic
    def load(typing_context, array, place):
        def emit(context, builder, signature, args):
            one = builder.zext(_load(context, builder, signature.args[0], *args, element), I32)
            vector = builder.insert_element(ir.Constant(INTS4.llvm, None), one, ir.Constant(I32, 0))
            number = code(builder, vector)
            return _shuffle(builder, number, number, [0] * 16)

        return FLOATS(array, types.int64), emit

    return load


load_half = _loaded(I16, _half)
load_power_of_two = _loaded(I8, _power_of_two)


def _sum(builder: Any, v: Any) -> Any:
    while v.type.count > 1:
        n = v.type.count // 2
        v = builder.fadd(_shuffle(builder, v, v, range(n)), _shuffle(builder, v, v, range(n, 2 * n)))
    return builder.extract_element(v, ir.Constant(I32, 0))


@intrinsic
def largest_float(typing_context, vector):
    """The largest of 16 floats that are numbers."""

    def emit(context, builder, signature, args):
        (v,) = args
        while v.type.count > 1:
            n = v.type.count // 2
            a, b = _shuffle(builder, v, v, range(n)), _shuffle(builder, v, v, range(n, 2 * n))
            v = builder.select(builder.fcmp_ordered(">", a, b), a, b)
        return builder.extract_element(v, ir.Constant(I32, 0))

    return types.float32(FLOATS), emit


@intrinsic
def sum_floats(typing_context, vector):
    """The sum of 16 floats: halves are added until one is left."""
    return types.float32(FLOATS), lambda context, builder, signature, args: _sum(builder, *args)


def _call(builder: Any, name: str, result: ir.Type, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [argument.type for argument in args]), name
    )
    return builder.call(function, args)


def _prefetch(builder: Any, pointer: Any, locality: int = 3) -> None:
    """Ask for a cache line to be read, to the first cache (3) or the second (2); the address may be of nothing."""
    read, data = ir.Constant(I32, 0), ir.Constant(I32, 1)
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, ir.Constant(I32, locality), data)


def _lookup_nibbles(builder: Any, table: bytes, codes: Any, shift: int) -> Any:
    """The table's entries for the low nibbles of 64 bytes, or with a shift of 4 for the high ones."""
    if LANE == "portable":
        nibbles = builder.and_(builder.lshr(codes, _splat(codes.type, shift)), _splat(codes.type, 15))
        found = nibbles
        for code, entry in enumerate(table):
            is_code = builder.icmp_signed("==", nibbles, _splat(BYTES.llvm, code))
            found = builder.select(is_code, _splat(BYTES.llvm, entry), found)
        return found
    if shift:  # what comes in from the next byte is not looked at either
        halfwords = ir.VectorType(I16, 32)
        codes = builder.bitcast(builder.lshr(builder.bitcast(codes, halfwords), _splat(halfwords, shift)), BYTES.llvm)
    # by the lowest six bits of a code: with the table four times over, by its lowest four
    return _call(builder, "llvm.x86.avx512.permvar.qi.512", BYTES.llvm, ir.Constant(BYTES.llvm, [*table] * 4), codes)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def _e2m1(builder: Any, codes: Any) -> Any:
    if LANE != "portable":
        table = ir.Constant(FLOATS.llvm, [*E2M1, *(-value for value in E2M1)])
        return _call(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS.llvm, table, codes)
    magnitude = builder.and_(codes, _splat(codes.type, 7))  # above 1 the code's bits are a float's, moved
    bits = builder.add(builder.shl(magnitude, _splat(codes.type, 22)), _splat(codes.type, 0x3F000000))
    small = builder.mul(magnitude, _splat(codes.type, 0x3F000000))
    bits = builder.select(builder.icmp_signed(">", magnitude, _splat(codes.type, 1)), bits, small)
    sign = builder.shl(builder.and_(codes, _splat(codes.type, 8)), _splat(codes.type, 28))
    return builder.bitcast(builder.or_(bits, sign), FLOATS.llvm)


e2m1_to_floats = _unary(INTS, FLOATS, _e2m1)  # MXFP4's elements by their 4 bits


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fmuladd.v16f32", FLOATS.llvm, a, b, c)


def _dot_bytes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Each of 16 totals plus the dot product of four unsigned and four signed bytes."""
    if LANE != "portable":
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS.llvm, total, unsigned, signed)
    wide = ir.VectorType(I32, 64)
    products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
    for place in range(4):
        total = builder.add(total, _shuffle(builder, products, products, range(place, 64, 4)))
    return total


@intrinsic
def multiply_add(typing_context, a, b, c):
    """a b + c of 16 floats, rounded once where the processor can."""
    return FLOATS(FLOATS, FLOATS, FLOATS), lambda context, builder, signature, args: _multiply_add(builder, *args)


def _transpose(builder: Any, vectors: Sequence[Any]) -> list[Any]:
    """Four vectors, each four rows of four 32-bit words, to four vectors: a word of all 16 rows each."""
    a, b, c, d = (builder.bitcast(v, INTS.llvm) for v in vectors)
    pairs = []  # words 0 and 1, then 2 and 3, of eight rows
    for x, y in ((a, b), (c, d)):
        for word in (0, 2):
            rows = range(word, 32, 4)
            pairs.append(_shuffle(builder, x, y, [*rows, *(place + 1 for place in rows)]))
    words = []
    for half in (0, 1):
        for word in (0, 1):
            places = range(8 * word, 8 * word + 8)
            words.append(_shuffle(builder, pairs[half], pairs[2 + half], [*places, *(p + 16 for p in places)]))
    return words


def _align_stack(builder: Any) -> None:
    """Let the function's stack begin with a cache line.

    Else vectors that do not fit the registers are kept at multiples of 16 bytes, mostly across two lines: which of
    them, and so the speed, by up to a third, changes from process to process.
    """
    line = cgutils.alloca_once(builder, BYTES.llvm)
    line.align = 64
    # a write that counts as seen, so that the line stays
    zero, one, seen = ir.Constant(I8, 0), ir.Constant(I64, 1), ir.Constant(ir.IntType(1), 1)
    _call(builder, "llvm.memset.p0.i64", ir.VoidType(), builder.bitcast(line, I8.as_pointer()), zero, one, seen)


@intrinsic
def zeros(typing_context):
    """16 floats of zero."""
    return FLOATS(), lambda context, builder, signature, args: ir.Constant(FLOATS.llvm, None)


def _broadcast(builder: Any, element: Any, vector: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), element, ir.Constant(I32, 0))
    return _shuffle(builder, one, one, [0] * vector.count)


@intrinsic
def splat(typing_context, number):
    """16 times the same float."""
    return FLOATS(types.float32), lambda context, builder, signature, args: _broadcast(builder, args[0], FLOATS.llvm)
