"""Rounding of 32 floats to int8, as intrinsics."""

from typing import Any

from llvmlite import ir

from assay.fast.cpu import simd
from assay.fast.cpu.simd import FLOATS, I32, INTS, intrinsic, types

MAGNITUDE = 0x7FFFFFFF


def _halves(context: Any, builder: Any, array_type: Any, x: Any, place: Any) -> list[Any]:
    """32 floats from a place on, as two vectors."""
    places = (place, builder.add(place, ir.Constant(place.type, 16)))
    return [simd._load(context, builder, array_type, x, at, FLOATS.llvm) for at in places]


def _reduce(builder: Any, v: Any, combine: Any) -> Any:
    while v.type.count > 1:
        n = v.type.count // 2
        v = combine(simd._shuffle(builder, v, v, range(n)), simd._shuffle(builder, v, v, range(n, 2 * n)))
    return builder.extract_element(v, ir.Constant(I32, 0))


@intrinsic
def largest_32(typing_context, x, place):
    """The largest magnitude of 32 floats by its bits, an int32 that orders infinity and NaN above the numbers."""

    def emit(context, builder, signature, args):
        larger = lambda a, b: builder.select(builder.icmp_signed(">", a, b), a, b)  # noqa: E731
        halves = _halves(context, builder, signature.args[0], *args)
        low, high = (builder.and_(builder.bitcast(v, INTS.llvm), simd._splat(INTS.llvm, MAGNITUDE)) for v in halves)
        return _reduce(builder, larger(low, high), larger)

    return types.int32(x, types.int64), emit


@intrinsic
def round_32(typing_context, x, place, factor, adjacent, codes, to, step):
    """32 floats times a factor, to the nearest integer (even), as int8: the sums of the first and the last 16.

    The codes are stored by fours, from `to` on, `step` bytes apart.
    If `adjacent` is true the even elements are stored first, and then the odd ones.
    """

    def emit(context, builder, signature, args):
        x, place, factor, adjacent, codes, to, step = args
        factor = simd._broadcast(builder, factor, FLOATS.llvm)
        # added, 1.5 2^23 rounds to an integer, in the lowest bits
        rounder, bits = simd._splat(FLOATS.llvm, 1.5 * 2**23), simd._splat(INTS.llvm, 0x4B400000)
        integers = [
            builder.sub(builder.bitcast(builder.fadd(builder.fmul(v, factor), rounder), INTS.llvm), bits)
            for v in _halves(context, builder, signature.args[0], x, place)
        ]
        totals = [_reduce(builder, v, builder.add) for v in integers]
        narrow = simd._join(builder, [builder.trunc(v, ir.VectorType(simd.I8, 16)) for v in integers])
        apart = simd._shuffle(builder, narrow, narrow, [*range(0, 32, 2), *range(1, 32, 2)])
        words = builder.bitcast(builder.select(adjacent, apart, narrow), ir.VectorType(I32, 8))
        for i in range(8):
            at = builder.add(to, builder.mul(step, ir.Constant(step.type, i)))
            word = builder.extract_element(words, ir.Constant(I32, i))
            builder.store(word, simd._pointer(context, builder, signature.args[4], codes, at, I32), align=1)
        return context.make_tuple(builder, signature.return_type, totals)

    int64, pair = types.int64, types.UniTuple(types.int32, 2)
    return pair(x, int64, types.float32, types.boolean, codes, int64, int64), emit
