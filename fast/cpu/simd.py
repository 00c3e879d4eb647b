"""Vectors of 16 to 64 bytes as values that kernels can hold, and the few operations on them that Numba lacks.

Each piece emits LLVM's own vector code, which every processor can run; two of them, the dot product of bytes and
the byte table, use the x86 instruction where the processor has it (AVX-512 VNNI and BW) and ASSAY_CPU is not
`portable`. Loads and stores take an array and a place in it: bytes for the byte vectors, elements for others.
With ASSAY_CPU_CHECK=1 they check their bounds and raise IndexError; otherwise nothing does.

The twins of all pieces in plain NumPy are in `tests/fast/cpu/test_simd.py`.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import register_model

intrinsic: Any = numba_intrinsic  # its arguments are not those of the function that it decorates

I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
BITS = {I8: 8, I16: 16, I32: 32, F32: 32}
CHECKED = os.environ.get("ASSAY_CPU_CHECK") == "1"


def _has_instructions() -> bool:
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512vnni", "avx512bw", "avx512vbmi"))


LANE = "avx512vnni" if _has_instructions() and os.environ.get("ASSAY_CPU") != "portable" else "portable"


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


def _splat(vector: ir.VectorType, value: float | int) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _shuffle(builder: Any, a: Any, b: Any, places: Sequence[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(places)), list(places)))


def _join(builder: Any, pieces: Sequence[Any]) -> Any:
    """Vectors one after the other in one; their number is a power of two."""
    while len(pieces) > 1:
        n = 2 * pieces[0].type.count
        pieces = [_shuffle(builder, a, b, range(n)) for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
    return pieces[0]


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, place: Any, target: ir.Type) -> Any:
    """Where an element of an array lies, as a pointer to `target`."""
    view = context.make_array(array_type)(context, builder, array)
    if CHECKED:
        size = target.count * BITS[target.element] // 8 if isinstance(target, ir.VectorType) else BITS[target] // 8
        item = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
        last = builder.add(place, ir.Constant(place.type, size // item))
        outside = builder.or_(
            builder.icmp_signed("<", place, ir.Constant(place.type, 0)), builder.icmp_signed(">", last, view.nitems)
        )
        with builder.if_then(outside, likely=False):
            context.call_conv.return_user_exc(builder, IndexError, ("vector beyond the end of an array",))
    element = builder.gep(view.data, [place])
    return builder.bitcast(element, target.as_pointer())


def _load(context: Any, builder: Any, array_type: Any, array: Any, place: Any, target: ir.Type) -> Any:
    return builder.load(_pointer(context, builder, array_type, array, place, target), align=1)


def _loader(result: Vector) -> Callable:
    @intrinsic
    def load(typing_context, array, place):
        def emit(context, builder, signature, args):
            return _load(context, builder, signature.args[0], *args, result.llvm)

        return result(array, types.int64), emit

    return load


load_bytes, load_ints, load_floats4, load_floats = map(_loader, (BYTES, INTS, FLOATS4, FLOATS))


def _gather4(piece: ir.Type, result: Vector) -> Callable:
    """Four pieces from four places of a byte array; single elements are widened to 32 bits."""

    @intrinsic
    def load(typing_context, array, first, second, third, fourth):
        def emit(context, builder, signature, args):
            array, *places = args
            loaded = [_load(context, builder, signature.args[0], array, place, piece) for place in places]
            if isinstance(piece, ir.VectorType):
                return _join(builder, loaded)
            vector = ir.Constant(result.llvm, None)
            for i, element in enumerate(loaded):
                vector = builder.insert_element(vector, builder.zext(element, I32), ir.Constant(I32, i))
            return vector

        return result(array, *[types.int64] * 4), emit

    return load


load_4x16_bytes = _gather4(ir.VectorType(I8, 16), BYTES)  # 16 bytes from each place, joined
load_4_bytes = _gather4(I8, INTS4)  # a byte from each place
load_4_halfwords = _gather4(I16, INTS4)  # 16 bits from each place, at any alignment
load_4_words = _gather4(I32, INTS4)  # 32 bits from each place


@intrinsic
def store_bytes(typing_context, array, place, vector):
    """64 bytes at a place of a byte array."""

    def emit(context, builder, signature, args):
        array, place, vector = args
        pointer = _pointer(context, builder, signature.args[0], array, place, vector.type)
        builder.store(vector, pointer, align=1)
        return context.get_dummy_value()

    return types.none(array, types.int64, vector), emit


store_ints = store_floats = store_floats4 = store_bytes  # other vectors; places in elements


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


low_nibbles = _unary(BYTES, BYTES, lambda b, v: b.and_(v, _splat(v.type, 15)))
high_nibbles = _unary(BYTES, BYTES, lambda b, v: b.lshr(v, _splat(v.type, 4)))
signed_to_unsigned = _unary(BYTES, BYTES, lambda b, v: b.xor(v, _splat(v.type, 128)))  # v + 128 of signed bytes
bits_to_floats4 = _unary(INTS4, FLOATS4, lambda b, v: b.bitcast(v, FLOATS4.llvm))
bfloats_to_floats4 = _unary(
    INTS4, FLOATS4, lambda b, v: b.bitcast(b.shl(v, _splat(v.type, 16)), FLOATS4.llvm)
)  # the upper halves of float32
spread4 = _unary(FLOATS4, FLOATS, lambda b, v: _shuffle(b, v, v, [i // 4 for i in range(16)]))  # each to four lanes
multiply4 = _binary(FLOATS4, lambda b, x, y: b.fmul(x, y))
add = _binary(FLOATS, lambda b, x, y: b.fadd(x, y))


def _power_of_two(builder: Any, v: Any) -> Any:
    bits = builder.shl(v, _splat(v.type, 23))
    subnormal = builder.icmp_signed("==", v, _splat(v.type, 0))
    nan = builder.icmp_signed("==", v, _splat(v.type, 255))
    bits = builder.select(subnormal, _splat(v.type, 0x00400000), bits)
    return builder.bitcast(builder.select(nan, _splat(v.type, 0x7FC00000), bits), FLOATS4.llvm)


def _half(builder: Any, v: Any) -> Any:
    sign = builder.shl(builder.and_(v, _splat(v.type, 0x8000)), _splat(v.type, 16))
    magnitude = builder.shl(builder.and_(v, _splat(v.type, 0x7FFF)), _splat(v.type, 13))
    number = builder.fmul(builder.bitcast(magnitude, FLOATS4.llvm), _splat(FLOATS4.llvm, HALF_CODE_BIAS))
    special = builder.icmp_signed(">=", magnitude, _splat(v.type, 0x0F800000))  # infinity and NaN
    bits = builder.select(
        special, builder.or_(magnitude, _splat(v.type, 0x7F800000)), builder.bitcast(number, INTS4.llvm)
    )
    return builder.bitcast(builder.or_(bits, sign), FLOATS4.llvm)


powers_of_two4 = _unary(INTS4, FLOATS4, _power_of_two)  # 2^(code - 127), NaN for 255
halves_to_floats4 = _unary(INTS4, FLOATS4, _half)  # float16 by its 16 bits


def _sum(builder: Any, v: Any) -> Any:
    while v.type.count > 1:
        n = v.type.count // 2
        v = builder.fadd(_shuffle(builder, v, v, range(n)), _shuffle(builder, v, v, range(n, 2 * n)))
    return builder.extract_element(v, ir.Constant(I32, 0))


@intrinsic
def sum_floats(typing_context, vector):
    """The sum of 16 floats: halves are added until one is left."""
    return types.float32(FLOATS), lambda context, builder, signature, args: _sum(builder, *args)


def _call(builder: Any, name: str, result: ir.Type, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [argument.type for argument in args]), name
    )
    return builder.call(function, args)


def _lookup(builder: Any, table: Any, codes: Any) -> Any:
    if LANE != "portable":
        return _call(builder, "llvm.x86.avx512.pshuf.b.512", BYTES.llvm, table, codes)
    found = codes
    for code in range(16):
        entry = builder.extract_element(table, ir.Constant(I32, code))
        entries = builder.insert_element(ir.Constant(BYTES.llvm, None), entry, ir.Constant(I32, 0))
        entries = _shuffle(builder, entries, entries, [0] * 64)
        found = builder.select(builder.icmp_signed("==", codes, _splat(codes.type, code)), entries, found)
    return found


look_up = _binary(BYTES, _lookup)  # (table, codes below 16): the table's first 16 bytes stand in it four times


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fmuladd.v16f32", FLOATS.llvm, a, b, c)


def _dot_bytes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    if LANE != "portable":
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS.llvm, total, unsigned, signed)
    wide = ir.VectorType(I32, 64)
    products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
    for place in range(4):
        total = builder.add(total, _shuffle(builder, products, products, range(place, 64, 4)))
    return total


@intrinsic
def dot_bytes(typing_context, total, unsigned, signed):
    """Each of 16 totals plus the dot product of four unsigned and four signed bytes."""
    return INTS(INTS, BYTES, BYTES), lambda context, builder, signature, args: _dot_bytes(builder, *args)


@intrinsic
def multiply_add(typing_context, a, b, c):
    """a b + c of 16 floats, rounded once where the processor can."""
    return FLOATS(FLOATS, FLOATS, FLOATS), lambda context, builder, signature, args: _multiply_add(builder, *args)


@intrinsic
def transpose_16x4(typing_context, a, b, c, d):
    """Four vectors, each four rows of four 32-bit words, to four vectors: a word of all 16 rows each."""

    def emit(context, builder, signature, args):
        a, b, c, d = (builder.bitcast(v, INTS.llvm) for v in args)
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
        result = [builder.bitcast(v, BYTES.llvm) for v in words]
        return context.make_tuple(builder, signature.return_type, result)

    return types.UniTuple(BYTES, 4)(*[BYTES] * 4), emit


@intrinsic(prefer_literal=True)
def zeros(typing_context, count):
    """A tuple of `count` float vectors of zeros, count a literal."""

    def emit(context, builder, signature, args):
        zero = ir.Constant(FLOATS.llvm, None)
        return context.make_tuple(builder, signature.return_type, [zero] * signature.return_type.count)

    return types.UniTuple(FLOATS, count.literal_value)(count), emit


@intrinsic
def store_tuple(typing_context, array, vectors):
    """A tuple of float vectors, one after the other from the array's beginning."""

    def emit(context, builder, signature, args):
        for c in range(signature.args[1].count):
            vector = builder.extract_value(args[1], c)
            place = ir.Constant(ir.IntType(64), 16 * c)
            builder.store(vector, _pointer(context, builder, signature.args[0], args[0], place, vector.type), align=1)
        return context.get_dummy_value()

    return types.none(array, vectors), emit


@intrinsic
def store_sums(typing_context, array, vectors):
    """The sums of the vectors of a tuple (see `sum_floats`), one after the other from the array's beginning."""

    def emit(context, builder, signature, args):
        for c in range(signature.args[1].count):
            total = _sum(builder, builder.extract_value(args[1], c))
            place = ir.Constant(ir.IntType(64), c)
            builder.store(total, _pointer(context, builder, signature.args[0], args[0], place, F32), align=1)
        return context.get_dummy_value()

    return types.none(array, vectors), emit


def _offset(builder: Any, place: Any, step: int) -> Any:
    return builder.add(place, ir.Constant(place.type, step))


@intrinsic
def add_group(typing_context, totals, low, high, scales, inputs, scale, correction, group, stride):
    """128 encoded weights of a row times as many inputs in each of len(totals) columns.

    `low` and `high` are unsigned codes: 16 of each of four blocks; `scales` the blocks' four scales. Column c's
    128 int8 `inputs` start at 128 (group + c stride), its four input scales and integer corrections at
    4 (group + c stride). Answers totals[c] + scales * scale * (dot product + correction), in four lanes a block.
    """

    def emit(context, builder, signature, args):
        _, low, high, scales, inputs, scale, correction, group, stride = args
        types_ = signature.args

        def load(index, array, place, vector):
            return _load(context, builder, types_[index], array, place, vector)

        results = []
        for c in range(types_[0].count):
            at = builder.add(group, builder.mul(stride, ir.Constant(stride.type, c)))
            at4, at128 = (builder.mul(at, ir.Constant(at.type, n)) for n in (4, 128))
            start = load(6, correction, at4, INTS4.llvm)
            zero = ir.Constant(INTS4.llvm, None)
            total = _shuffle(builder, start, zero, [i // 4 if i % 4 == 0 else 4 for i in range(16)])
            total = _dot_bytes(builder, total, low, load(4, inputs, at128, BYTES.llvm))
            total = _dot_bytes(builder, total, high, load(4, inputs, _offset(builder, at128, 64), BYTES.llvm))
            factor = builder.fmul(scales, load(5, scale, at4, FLOATS4.llvm))
            factor = _shuffle(builder, factor, factor, [i // 4 for i in range(16)])
            number = builder.sitofp(total, FLOATS.llvm)
            results.append(_multiply_add(builder, number, factor, builder.extract_value(args[0], c)))
        return context.make_tuple(builder, signature.return_type, results)

    int64 = types.int64
    return totals(totals, BYTES, BYTES, FLOATS4, inputs, scale, correction, int64, int64), emit


@intrinsic
def add_group_bias(typing_context, totals, biases, sums, group, stride):
    """Totals of columns plus, for four blocks, bias times the sum of the inputs, one lane of four for each block.

    Column c's four `sums` start at 4 (group + c stride).
    """

    def emit(context, builder, signature, args):
        totals, biases, sums, group, stride = args
        zero, results = ir.Constant(FLOATS4.llvm, None), []
        for c in range(signature.return_type.count):
            at = builder.add(group, builder.mul(stride, ir.Constant(stride.type, c)))
            at = builder.mul(at, ir.Constant(at.type, 4))
            term = builder.fmul(biases, _load(context, builder, signature.args[2], sums, at, FLOATS4.llvm))
            term = _shuffle(builder, term, zero, [i // 4 if i % 4 == 0 else 4 for i in range(16)])
            results.append(builder.fadd(builder.extract_value(totals, c), term))
        return context.make_tuple(builder, signature.return_type, results)

    return totals(totals, FLOATS4, sums, types.int64, types.int64), emit


def _broadcast(builder: Any, element: Any, vector: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), element, ir.Constant(I32, 0))
    return _shuffle(builder, one, one, [0] * vector.count)


@intrinsic
def add_tile_block(typing_context, totals, codes, scales, inputs, scale, correction, block, at):
    """One block of 32 weights of 16 rows times len(totals) = C columns.

    `codes` holds eight vectors for each block, four successive weights of each row in one; `scales` 16 floats.
    From `at` on there are C input scales and C corrections; from 32 at on the inputs, four of each column together.
    """

    def emit(context, builder, signature, args):
        totals, codes, scales, inputs, scale, correction, block, at = args
        types_, C = signature.args, signature.return_type.count
        first_input = builder.mul(at, ir.Constant(at.type, 32))
        codes_at = builder.mul(block, ir.Constant(block.type, 512))

        def element(index, array, place, target):
            return _load(context, builder, types_[index], array, place, target)

        sums = [_broadcast(builder, element(5, correction, _offset(builder, at, c), I32), INTS.llvm) for c in range(C)]
        for word in range(8):
            weights = element(1, codes, _offset(builder, codes_at, 64 * word), BYTES.llvm)
            for c in range(C):
                four = element(3, inputs, _offset(builder, first_input, 4 * (C * word + c)), I32)
                signed = builder.bitcast(_broadcast(builder, four, INTS.llvm), BYTES.llvm)
                sums[c] = _dot_bytes(builder, sums[c], weights, signed)
        row_scales = element(2, scales, builder.mul(block, ir.Constant(block.type, 16)), FLOATS.llvm)
        results = []
        for c in range(C):
            factor = _broadcast(builder, element(4, scale, _offset(builder, at, c), F32), FLOATS.llvm)
            factor = builder.fmul(factor, row_scales)
            number = builder.sitofp(sums[c], FLOATS.llvm)
            results.append(_multiply_add(builder, number, factor, builder.extract_value(totals, c)))
        return context.make_tuple(builder, signature.return_type, results)

    int64 = types.int64
    return totals(totals, codes, scales, inputs, scale, correction, int64, int64), emit


@intrinsic
def add_tile_bias(typing_context, totals, biases, sums, block, at):
    """Totals of C columns plus, for a block, each of 16 rows' bias times the sum of the column's inputs."""

    def emit(context, builder, signature, args):
        totals, biases, sums, block, at = args
        types_, C = signature.args, signature.return_type.count
        place = builder.mul(block, ir.Constant(block.type, 16))
        row_biases = _load(context, builder, types_[1], biases, place, FLOATS.llvm)
        results = []
        for c in range(C):
            total = _load(context, builder, types_[2], sums, _offset(builder, at, c), F32)
            total = _broadcast(builder, total, FLOATS.llvm)
            results.append(_multiply_add(builder, row_biases, total, builder.extract_value(totals, c)))
        return context.make_tuple(builder, signature.return_type, results)

    return totals(totals, biases, sums, types.int64, types.int64), emit
