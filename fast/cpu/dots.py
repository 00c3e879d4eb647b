"""The inner loops of the products with quantised inputs, as intrinsics: one row, or 16 rows side by side.

The machine's dot product of bytes wants one unsigned side: codes of weights are unsigned, and each block of inputs
carries a correction, an integer, that takes the codes' offset back exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from assay.fast.cpu import simd
from assay.fast.cpu.layouts import E2M1_DOUBLED
from assay.fast.cpu.simd import BYTES, F32, FLOATS, FLOATS4, I32, INTS, INTS4, cgutils, intrinsic, types


def _in_first_lanes(builder: Any, four: Any) -> Any:
    """16 elements: each of the four in the first lane of its block's four, zeros in the others."""
    zero = ir.Constant(four.type, None)
    return simd._shuffle(builder, four, zero, [i // 4 if i % 4 == 0 else 4 for i in range(16)])


def row_product(columns: int, nbytes: int, group: Callable[[Any, Callable], tuple[Any, Any, Any, Any]]) -> Any:
    """An intrinsic that multiplies one row, decoded in registers, with C = `columns` columns alone.

    Its arguments: the bytes, where the row begins, its number of blocks of `nbytes`; the panels' codes, scale,
    correction and sums, the slot where the first column begins and the number of slots to the next; the results, and
    the place of the first. `group(builder, load)` decodes four blocks: unsigned codes, 16 of each block's first half
    and of its second, the four scales, and biases if it has any; load(type, offset) fetches the same bytes of all four.
    """

    @intrinsic
    def multiply(typing_context, data, place, blocks, inputs, scale, correction, sums, at, stride, out, to):
        def emit(context, builder, signature, args):
            data, place, blocks, inputs, scale, correction, sums, at, stride, out, to = args
            types_ = signature.args
            constant = lambda value: ir.Constant(place.type, value)  # noqa: E731
            last = builder.sub(blocks, constant(1))
            totals = [cgutils.alloca_once_value(builder, ir.Constant(FLOATS.llvm, None)) for _ in range(columns)]
            with cgutils.for_range(builder, builder.add(builder.sdiv(last, constant(4)), constant(1))) as loop:
                starts = []
                for k in range(4):
                    # beyond a row's last block the inputs' scale is 0: read the last again, not what lies behind it
                    n = builder.add(builder.mul(loop.index, constant(4)), constant(k))
                    n = builder.select(builder.icmp_signed("<", n, last), n, last)
                    starts.append(builder.add(place, builder.mul(n, constant(nbytes))))

                def load(target, offset):
                    places = [builder.add(start, constant(offset)) for start in starts]
                    return [simd._load(context, builder, types_[0], data, at, target) for at in places]

                low, high, scales, biases = group(builder, load)
                for c, total in enumerate(totals):
                    slot = builder.add(at, builder.mul(stride, constant(c)))
                    slot = builder.add(slot, builder.mul(loop.index, constant(4)))
                    first = builder.mul(slot, constant(32))
                    second = builder.add(first, constant(64))
                    start = simd._load(context, builder, types_[5], correction, slot, INTS4.llvm)
                    dot = _in_first_lanes(builder, start)
                    for codes, x in ((low, first), (high, second)):
                        x = simd._load(context, builder, types_[3], inputs, x, BYTES.llvm)
                        dot = simd._dot_bytes(builder, dot, codes, x)
                    factor = builder.fmul(scales, simd._load(context, builder, types_[4], scale, slot, FLOATS4.llvm))
                    factor = simd._shuffle(builder, factor, factor, [i // 4 for i in range(16)])
                    sum_ = simd._multiply_add(builder, builder.sitofp(dot, FLOATS.llvm), factor, builder.load(total))
                    if biases is not None:
                        term = builder.fmul(biases, simd._load(context, builder, types_[6], sums, slot, FLOATS4.llvm))
                        sum_ = builder.fadd(sum_, _in_first_lanes(builder, term))
                    builder.store(sum_, total)
            for c, total in enumerate(totals):
                at_c = simd._pointer(context, builder, types_[9], out, builder.add(to, constant(c)), F32)
                builder.store(simd._sum(builder, builder.load(total)), at_c)
            return context.get_dummy_value()

        int64 = types.int64
        arrays = (inputs, scale, correction, sums)
        return types.none(data, int64, int64, *arrays, int64, int64, out, int64), emit

    return multiply


SIXTEEN = ir.VectorType(simd.I8, 16)


def _four(builder: Any, elements: Sequence[Any]) -> Any:
    vector = ir.Constant(INTS4.llvm, None)
    for i, element in enumerate(elements):
        vector = builder.insert_element(vector, builder.zext(element, I32), ir.Constant(I32, i))
    return vector


def _nibbles(builder: Any, load: Callable, offset: int) -> tuple[Any, Any]:
    both = simd._join(builder, load(SIXTEEN, offset))
    return builder.and_(both, simd._splat(BYTES.llvm, 15)), builder.lshr(both, simd._splat(BYTES.llvm, 4))


def _halves4(builder: Any, load: Callable, offset: int) -> Any:
    return simd._half(builder, _four(builder, load(simd.I16, offset)))


def mxfp4_group(builder: Any, load: Callable) -> tuple[Any, Any, Any, None]:
    """Four blocks of MXFP4 in GGUF's layout."""
    table = ir.Constant(BYTES.llvm, [*E2M1_DOUBLED] * 4)
    low, high = (simd._lookup(builder, table, codes) for codes in _nibbles(builder, load, 1))
    return low, high, simd._power_of_two(builder, _four(builder, load(simd.I8, 0))), None


def q8_0_group(builder: Any, load: Callable) -> tuple[Any, Any, Any, None]:
    """Four blocks of Q8_0."""
    halves = [simd._join(builder, load(SIXTEEN, offset)) for offset in (2, 18)]
    low, high = (builder.xor(half, simd._splat(BYTES.llvm, 128)) for half in halves)
    return low, high, _halves4(builder, load, 0), None


def q4_1_group(builder: Any, load: Callable) -> tuple[Any, Any, Any, Any]:
    """Four blocks of Q4_1."""
    return *_nibbles(builder, load, 4), _halves4(builder, load, 0), _halves4(builder, load, 2)


def panel_product(columns: int, words: int, biased: bool) -> Any:
    """An intrinsic that adds n decoded blocks of 16 rows times a panel of C = `columns` columns to sums.

    Its arguments: n; `codes`, `words` vectors for each block with four successive weights of each row; `scales` and
    `biases`, 16 floats a block; the panel's codes, scale, correction and sums, and where its first block lies in
    them (see `assay.fast.cpu.quantise.Panels`); the results, 16 floats a column, and where they start.
    """
    C, lone = columns, columns == 1 and words == 8
    chains = 2 if C <= 2 else 1  # of dependent dot products to a column: enough to keep the processor busy

    @intrinsic
    def multiply(typing_context, n, codes, scales, biases, inputs, scale, correction, sums, at, out, place):
        def emit(context, builder, signature, args):
            n, codes, scales, biases, inputs, scale, correction, sums, at, out, place = args
            types_ = signature.args
            constant = lambda value: ir.Constant(n.type, value)  # noqa: E731

            def load(index, array, start, offset, target):
                return simd._load(context, builder, types_[index], array, builder.add(start, constant(offset)), target)

            def everywhere(index, array, start, offset, vector):
                return simd._broadcast(builder, load(index, array, start, offset, vector.element), vector)

            def out_at(c):
                to = builder.add(place, constant(16 * c))
                return simd._pointer(context, builder, types_[9], out, to, FLOATS.llvm)

            totals = [cgutils.alloca_once(builder, FLOATS.llvm) for _ in range(C)]
            for c, total in enumerate(totals):
                builder.store(builder.load(out_at(c), align=1), total)
            with cgutils.for_range(builder, n) as loop:
                block = builder.add(at, builder.mul(loop.index, constant(C)))
                first = builder.mul(block, constant(4 * words))
                if lone:  # blocks by fours: the first 16 inputs of each, then the others
                    inner = builder.and_(block, constant(3))
                    first = builder.add(
                        builder.mul(builder.sub(block, inner), constant(32)), builder.mul(inner, constant(16))
                    )
                dots = [everywhere(6, correction, block, c, INTS.llvm) for c in range(C)]
                dots += [ir.Constant(INTS.llvm, None)] * (C * chains - C)
                codes_at = builder.mul(loop.index, constant(64 * words))
                for word in range(words):
                    weights = load(1, codes, codes_at, 64 * word, BYTES.llvm)
                    for c in range(C):
                        offset = 4 * word + (48 if lone and word >= 4 else 0) if C == 1 else 4 * (C * word + c)
                        four = builder.bitcast(everywhere(4, inputs, first, offset, INTS.llvm), BYTES.llvm)
                        i = c + word % chains * C
                        dots[i] = simd._dot_bytes(builder, dots[i], weights, four)
                if chains == 2:
                    dots = [builder.add(dots[c], dots[c + C]) for c in range(C)]
                row_at = builder.mul(loop.index, constant(16))
                row_scale = load(2, scales, row_at, 0, FLOATS.llvm)
                row_bias = load(3, biases, row_at, 0, FLOATS.llvm) if biased else None
                for c, total in enumerate(totals):
                    factor = builder.fmul(everywhere(5, scale, block, c, FLOATS.llvm), row_scale)
                    sum_ = builder.sitofp(dots[c], FLOATS.llvm)
                    sum_ = simd._multiply_add(builder, sum_, factor, builder.load(total))
                    if biased:
                        sum_ = simd._multiply_add(builder, row_bias, everywhere(7, sums, block, c, FLOATS.llvm), sum_)
                    builder.store(sum_, total)
            for c, total in enumerate(totals):
                builder.store(builder.load(total), out_at(c), align=1)
            return context.get_dummy_value()

        int64 = types.int64
        arrays = (codes, scales, biases, inputs, scale, correction, sums)
        return types.none(int64, *arrays, int64, out, int64), emit

    return multiply
