"""The inner loops of the products with quantised inputs, as intrinsics: one row, or 16 rows side by side.

The machine's dot product of bytes wants one unsigned side: codes of weights are unsigned, and each block of inputs
carries a correction, an integer, that takes the codes' offset back exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llvmlite import ir

from assay.fast.cpu import lanes, simd
from assay.fast.cpu.layouts import E2M1_DOUBLED
from assay.fast.cpu.simd import BYTES, F32, FLOATS, FLOATS4, I32, INTS, INTS4, cgutils, intrinsic, types

FOURS = [4 * (i % 4) + i // 4 for i in range(16)]  # words of four blocks, one block after the other: one word of each
EACH = [0, 1, 2, 3] * 4  # what belongs to four blocks, beside their words in that order


AHEAD = 4096  # bytes: what the processor fetches by itself comes later than these kernels need it (10 to 20 %)


def _first_lanes(builder: Any, four: Any) -> Any:
    """Four elements as the first of 16, the others zero: each beside one word of its block."""
    return simd._shuffle(builder, four, ir.Constant(four.type, None), [0, 1, 2, 3] + [4] * 12)


def row_product(nbytes: int, parts: Callable, whole: Callable) -> Any:
    """An intrinsic that multiplies one row, decoded in registers, with one column alone.

    Its arguments: the bytes, where the row begins, its number of blocks of `nbytes`; the panels' codes, scale,
    correction and sums, and the slot where the column begins; the results, and the place of this one.
    `whole(builder, load)` and `parts(builder, load)` decode four blocks: unsigned codes, a word of each in turn, from
    each block's first half and from its second; the scales of the four, four times; and four biases if it has any. In
    the one load(type, offset) fetches from the four blocks as they follow each other; in the other, which those at a
    row's end take and machines without byte permutations, the same bytes of all four.
    """

    @intrinsic
    def multiply(typing_context, data, place, blocks, inputs, scale, correction, sums, at, out, to):
        def emit(context, builder, signature, args):
            data, place, blocks, inputs, scale, correction, sums, at, out, to = args
            types_ = signature.args
            constant = lambda value: ir.Constant(place.type, value)  # noqa: E731
            last = builder.sub(blocks, constant(1))
            total = cgutils.alloca_once_value(builder, ir.Constant(FLOATS.llvm, None))

            def array_at(byte):
                return builder.gep(context.make_array(types_[0])(context, builder, data).data, [byte])

            def load_whole(group):
                start = builder.add(place, builder.mul(group, constant(4 * nbytes)))
                return lambda target, offset: simd._load(
                    context, builder, types_[0], data, builder.add(start, constant(offset)), target
                )

            def load_parts(group):
                starts = []
                for k in range(4):
                    # beyond a row's last block the inputs' scale is 0: read the last again, not what lies behind it
                    n = builder.add(builder.mul(group, constant(4)), constant(k))
                    n = builder.select(builder.icmp_signed("<", n, last), n, last)
                    starts.append(builder.add(place, builder.mul(n, constant(nbytes))))
                return lambda target, offset: [
                    simd._load(context, builder, types_[0], data, builder.add(start, constant(offset)), target)
                    for start in starts
                ]

            def add_group(group, low, high, scales, biases):
                slot = builder.add(at, builder.mul(group, constant(4)))
                first = builder.mul(slot, constant(32))
                dot = _first_lanes(builder, simd._load(context, builder, types_[5], correction, slot, INTS4.llvm))
                for codes, x in ((low, first), (high, builder.add(first, constant(64)))):
                    x = simd._load(context, builder, types_[3], inputs, x, BYTES.llvm)
                    dot = simd._dot_bytes(builder, dot, codes, x)
                factor = simd._load(context, builder, types_[4], scale, slot, FLOATS4.llvm)
                factor = builder.fmul(scales, simd._shuffle(builder, factor, factor, EACH))
                sum_ = simd._multiply_add(builder, builder.sitofp(dot, FLOATS.llvm), factor, builder.load(total))
                if biases is not None:
                    term = builder.fmul(biases, simd._load(context, builder, types_[6], sums, slot, FLOATS4.llvm))
                    sum_ = builder.fadd(sum_, _first_lanes(builder, term))
                builder.store(sum_, total)

            groups = builder.add(builder.sdiv(last, constant(4)), constant(1))
            begin = builder.sdiv(blocks, constant(4)) if simd.LANE != "portable" else constant(0)
            if simd.LANE != "portable":
                with cgutils.for_range(builder, begin) as loop:
                    start = builder.add(place, builder.mul(loop.index, constant(4 * nbytes)))
                    simd._prefetch(builder, array_at(builder.add(start, constant(AHEAD))))
                    add_group(loop.index, *whole(builder, load_whole(loop.index)))
            with cgutils.for_range(builder, groups, start=begin) as loop:
                add_group(loop.index, *parts(builder, load_parts(loop.index)))
            at = simd._pointer(context, builder, types_[8], out, to, F32)
            builder.store(simd._sum(builder, builder.load(total)), at)
            return context.get_dummy_value()

        int64 = types.int64
        return types.none(data, int64, int64, inputs, scale, correction, sums, int64, out, int64), emit

    return multiply


SIXTEEN = ir.VectorType(simd.I8, 16)
HALFWORDS = ir.VectorType(simd.I16, 32)


def _four(builder: Any, elements: Sequence[Any]) -> Any:
    vector = ir.Constant(INTS4.llvm, None)
    for i, element in enumerate(elements):
        vector = builder.insert_element(vector, builder.zext(element, I32), ir.Constant(I32, i))
    return vector


def _by_fours(builder: Any, blocks: Sequence[Any]) -> Any:
    """16 bytes of each of four blocks, in words of each in turn."""
    words = builder.bitcast(simd._join(builder, blocks), INTS.llvm)
    return builder.bitcast(simd._shuffle(builder, words, words, FOURS), BYTES.llvm)


def _halves4(builder: Any, load: Callable, offset: int) -> Any:
    return simd._half(builder, _four(builder, load(simd.I16, offset)))


def _each(builder: Any, four: Any) -> Any:
    return simd._shuffle(builder, four, four, EACH)


def _picked(builder: Any, load: Callable, starts: tuple[int, int], first: int, step: int) -> Any:
    """The same as `_by_fours` for 16 bytes from `first` + k `step` on, out of 64 bytes from each of two places on."""
    places = [first + step * (word % 4) + 4 * (word // 4) + i for word in range(16) for i in range(4)]
    a, b = starts
    picks = [place - a if place < a + 64 else place - b + 64 for place in places]
    return simd._shuffle(builder, load(BYTES.llvm, a), load(BYTES.llvm, b), picks)


def _picked_halves(builder: Any, load: Callable, starts: tuple[int, int], step: int, count: int, first: int = 0) -> Any:
    """float16 from `first` + k `step` on, k = 0 .. 3 and again, as floats."""
    a, b = (builder.bitcast(load(BYTES.llvm, start), HALFWORDS) for start in starts)
    places = [first + step * (i % 4) for i in range(count)]
    picks = [(place - starts[0]) // 2 if place < starts[0] + 64 else (place - starts[1]) // 2 + 32 for place in places]
    words = simd._shuffle(builder, a, b, picks)
    return simd._half(builder, builder.zext(words, ir.VectorType(I32, count)))


def mxfp4_parts(builder: Any, load: Callable) -> tuple[Any, Any, Any, None]:
    """Blocks of MXFP4 in GGUF's layout: the scale's byte, then 16 of codes."""
    codes = _by_fours(builder, load(SIXTEEN, 1))
    low, high = (simd._lookup_nibbles(builder, E2M1_DOUBLED, codes, shift) for shift in (0, 4))
    return low, high, _each(builder, simd._power_of_two(builder, _four(builder, load(simd.I8, 0)))), None


def mxfp4_whole(builder: Any, load: Callable) -> tuple[Any, Any, Any, None]:
    """68 bytes of them."""
    codes = _picked(builder, load, (0, 4), 1, 17)
    low, high = (simd._lookup_nibbles(builder, E2M1_DOUBLED, codes, shift) for shift in (0, 4))
    zero = ir.Constant(BYTES.llvm, None)
    # each scale's byte as a word's third: 7 bits from where a float has its exponent
    picks = [17 * (place // 4 % 4) if place % 4 == 2 else 64 for place in range(64)]
    exponents = builder.bitcast(simd._shuffle(builder, load(BYTES.llvm, 0), zero, picks), INTS.llvm)
    return low, high, simd._float_of_exponent(builder, builder.shl(exponents, simd._splat(INTS.llvm, 7))), None


def q8_0_parts(builder: Any, load: Callable) -> tuple[Any, Any, Any, None]:
    """Blocks of Q8_0: d, then 32 signed codes."""
    halves = [_by_fours(builder, load(SIXTEEN, offset)) for offset in (2, 18)]
    low, high = (builder.xor(half, simd._splat(BYTES.llvm, 128)) for half in halves)
    return low, high, _each(builder, _halves4(builder, load, 0)), None


def q8_0_whole(builder: Any, load: Callable) -> tuple[Any, Any, Any, None]:
    """136 bytes of them."""
    halves = [_picked(builder, load, starts, first, 34) for starts, first in (((0, 64), 2), ((18, 72), 18))]
    low, high = (builder.xor(half, simd._splat(BYTES.llvm, 128)) for half in halves)
    return low, high, _picked_halves(builder, load, (0, 64), 34, 16), None


def _nibbles(builder: Any, both: Any) -> tuple[Any, Any]:
    return builder.and_(both, simd._splat(BYTES.llvm, 15)), builder.lshr(both, simd._splat(BYTES.llvm, 4))


def q4_1_parts(builder: Any, load: Callable) -> tuple[Any, Any, Any, Any]:
    """Blocks of Q4_1: d, m, then 16 bytes of codes."""
    codes = _nibbles(builder, _by_fours(builder, load(SIXTEEN, 4)))
    return *codes, _each(builder, _halves4(builder, load, 0)), _halves4(builder, load, 2)


def q4_1_whole(builder: Any, load: Callable) -> tuple[Any, Any, Any, Any]:
    """80 bytes of them."""
    codes = _nibbles(builder, _picked(builder, load, (0, 16), 4, 20))
    scales, biases = (_picked_halves(builder, load, (0, 16), 20, count, first) for count, first in ((16, 0), (4, 2)))
    return *codes, scales, biases


def tile_product(layouts: Mapping[int, lanes.Layout], widths: Sequence[int]) -> Any:
    """An intrinsic that multiplies 16 rows of one of the kinds, decoded in registers, with a panel of C columns.

    Its arguments: the kind and C; the rows' bytes, where the first begins, the stride between them, and their number
    of blocks of 32, at least `together`; the panel's codes, scale, correction and sums, and where its first block lies
    in them; what is added to each row, and the results, [., O], of which each column has a row: those from place p on
    of `y_row`, n of them and the last again; the first row's place in both, and which of the 16 results are stored:
    those from `begin` to before `end`.
    """

    @intrinsic
    def multiply(
        typing_context,
        kind,
        C,
        data,
        at,
        stride,
        blocks,
        x,
        scale,
        correction,
        sums,
        slot,
        bias,
        y,
        y_row,
        p,
        n,
        to,
        begin,
        end,
    ):
        def emit(context, builder, signature, args):
            kind, C, *args = args
            for known, layout in layouts.items():
                with builder.if_then(builder.icmp_signed("==", kind, kind.type(known))):
                    for columns in widths:
                        with builder.if_then(builder.icmp_signed("==", C, C.type(columns))):
                            _TileProduct(context, builder, signature.args[2:], args, columns, layout).emit()
            return context.get_dummy_value()

        int64 = types.int64
        panel = (x, scale, correction, sums, int64)
        results = (bias, y, y_row, *[int64] * 5)
        return types.none(int64, int64, data, *[int64] * 3, *panel, *results), emit

    return multiply


COLUMNS = 4  # whose dot products go side by side: each takes four cycles to give the next its sum


class _TileProduct:
    """What `tile_product` emits for rows of one kind and panels of C columns; the arguments are its own.

    The products of a block are mixed with the decoding of the next one, which is handed on from unit to unit.
    """

    def __init__(self, context: Any, builder: Any, types_: Any, args: Any, C: int, layout: lanes.Layout) -> None:
        self._context, self._builder, self._types, self._C, self._layout = context, builder, types_, C, layout
        self._place, self._stride, self._blocks, self._slot = (args[i] for i in (1, 2, 3, 8))
        self._results = args[9:]
        self._data, self._x, self._scale, self._correction, self._sums = (
            simd.View(context, builder, types_[i], args[i]) for i in (0, 4, 5, 6, 7)
        )
        self._unit = layout.together
        self._last_unit = builder.sub(self._blocks, self._constant(self._unit))
        _, self._outputs = cgutils.unpack_tuple(
            builder, context.make_array(types_[10])(context, builder, args[10]).shape, 2
        )
        simd._align_stack(builder)
        self._totals = [cgutils.alloca_once_value(builder, ir.Constant(FLOATS.llvm, None)) for _ in range(C)]
        for total in self._totals:
            builder.store(ir.Constant(FLOATS.llvm, None), total)

    def _constant(self, value: int) -> Any:
        return ir.Constant(self._place.type, value)

    def emit(self) -> None:
        builder, unit, nbytes = self._builder, self._unit, self._layout.nbytes
        values = self._first_block(self._constant(0))
        coming = [value and cgutils.alloca_once(builder, value.type) for value in values]
        _store_all(builder, values, coming)
        next_tile = builder.add(self._place, builder.mul(self._stride, self._constant(lanes.ROWS)))
        bytes_ = nbytes * unit * lanes.ROWS
        units = builder.sdiv(builder.add(self._blocks, self._constant(unit - 1)), self._constant(unit))
        with cgutils.for_range(builder, units) as loop:
            due, begin = self._start_of(loop.index)
            share = builder.add(next_tile, builder.mul(loop.index, self._constant(bytes_)))
            _prefetch(builder, self._data, share, bytes_)
            sides, *block = [kept and builder.load(kept) for kept in coming]
            decode = self._unit_at(begin).decoder(sides)
            row_scale, row_bias, *words = [value and lanes.Lanes(builder, value) for value in block]
            for s in range(unit):
                start, into = len(builder.block.instructions), builder.block
                number = builder.add(begin, self._constant(s))
                # of the last unit's blocks those that were there before count for nothing: a factor needs no branch
                once = builder.uitofp(builder.icmp_signed(">=", number, due), F32)
                self._add_block(number, simd._broadcast(builder, once, FLOATS.llvm), words, row_scale, row_bias)
                middle = len(builder.block.instructions)
                if s + 1 < unit:
                    ((words, row_scale, row_bias),) = decode(s + 1)
                else:
                    _store_all(builder, self._first_block(builder.add(loop.index, self._constant(1))), coming)
                if builder.block is into:  # it is not where bounds are checked
                    _interleave(into.instructions, start, middle)
        self._store_totals()

    def _start_of(self, number: Any) -> tuple[Any, Any]:
        """Where a unit of blocks is due, and where it begins: the last one ends where the row does."""
        builder, last = self._builder, self._last_unit
        due = builder.mul(number, self._constant(self._unit))
        return due, builder.select(builder.icmp_signed("<", due, last), due, last)

    def _unit_at(self, begin: Any) -> lanes.Unit:
        builder, layout, last = self._builder, self._layout, self._constant(lanes.ROWS - 1)
        first = builder.add(self._place, builder.mul(begin, self._constant(layout.nbytes)))
        return lanes.Unit(builder, self._data, first, self._stride, last, layout, self._unit)

    def _first_block(self, number: Any) -> list[Any]:
        """What is handed on of a unit whose turn comes next: its scales' bytes, and its first block decoded."""
        coming = self._unit_at(self._start_of(number)[1])
        sides = coming.sides()
        ((words, row_scale, row_bias),) = coming.decoder(sides)(0)
        return [sides, row_scale.value, row_bias and row_bias.value, *(word.value for word in words)]

    def _everywhere(self, values: simd.View, at: Any, vector: Any) -> Any:
        return simd._broadcast(self._builder, values.load(at, vector.element), vector)

    def _add_block(self, block: Any, once: Any, words: list[Any], row_scale: Any, row_bias: Any) -> None:
        builder, C, everywhere = self._builder, self._C, self._everywhere
        block = builder.add(self._slot, builder.mul(block, self._constant(C)))
        first = builder.mul(block, self._constant(32))
        row_scale, row_bias = (lane and builder.fmul(lane.value, once) for lane in (row_scale, row_bias))
        for begin in range(0, C, COLUMNS):
            columns = range(begin, min(begin + COLUMNS, C))
            dots = {c: everywhere(self._correction, builder.add(block, self._constant(c)), INTS.llvm) for c in columns}
            for i, word in enumerate(words):
                codes = builder.bitcast(word.value, BYTES.llvm)
                for c in columns:
                    four = everywhere(self._x, builder.add(first, self._constant(4 * (C * i + c))), INTS.llvm)
                    dots[c] = simd._dot_bytes(builder, dots[c], codes, builder.bitcast(four, BYTES.llvm))
            for c in columns:
                at, sum_ = builder.add(block, self._constant(c)), builder.load(self._totals[c])
                factor = builder.fmul(everywhere(self._scale, at, FLOATS.llvm), row_scale)
                if row_bias is not None:
                    sum_ = simd._multiply_add(builder, row_bias, everywhere(self._sums, at, FLOATS.llvm), sum_)
                product = builder.sitofp(dots[c], FLOATS.llvm)
                builder.store(simd._multiply_add(builder, product, factor, sum_), self._totals[c])

    def _store_totals(self) -> None:
        """The results of the rows that are asked for, the bias added."""
        context, builder = self._context, self._builder
        bias, y, y_row, p, n, to, begin, end = self._results
        lane = ir.Constant(INTS.llvm, list(range(16)))
        low, high = (simd._broadcast(builder, builder.trunc(row, I32), INTS.llvm) for row in (begin, end))
        there = builder.and_(builder.icmp_signed(">=", lane, low), builder.icmp_signed("<", lane, high))
        added = simd._masked_load(context, builder, self._types[9], bias, to, there)
        for c, total in enumerate(self._totals):
            column = self._constant(c)
            column = builder.select(builder.icmp_signed("<", column, n), column, builder.sub(n, self._constant(1)))
            row = simd._load(context, builder, self._types[11], y_row, builder.add(p, column), simd.I64)
            at = builder.add(builder.mul(row, self._outputs), to)
            simd._masked_store(
                context, builder, self._types[10], y, at, there, builder.fadd(builder.load(total), added)
            )


def _store_all(builder: Any, values: Sequence[Any], places: Sequence[Any]) -> None:
    for value, place in zip(values, places, strict=True):
        if value is not None:
            builder.store(value, place)


def _interleave(instructions: list[Any], start: int, middle: int) -> None:
    """Mix the instructions before and after `middle` evenly, neither of which need the others' results.

    The processor looks a hundred or two ahead: it does both at the same time only where they lie side by side.
    """
    sides = instructions[start:middle], instructions[middle:]
    order = [((i + 0.5) / len(side), which, i) for which, side in enumerate(sides) for i in range(len(side))]
    instructions[start:] = [sides[which][i] for _, which, i in sorted(order)]


def _prefetch(builder: Any, data: simd.View, place: Any, nbytes: int) -> None:
    """Ask the memory for some bytes; they may lie beyond the array's end."""
    for offset in range(0, nbytes, 64):
        at = builder.add(place, ir.Constant(place.type, offset))
        simd._prefetch(builder, builder.gep(data.data, [at]), 2)


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
            n, at, place = args[0], args[8], args[10]
            constant = lambda value: ir.Constant(n.type, value)  # noqa: E731
            codes, scales, biases, inputs, scale, correction, sums, out = (
                simd.View(context, builder, signature.args[i], args[i]) for i in (1, 2, 3, 4, 5, 6, 7, 9)
            )

            def load(array, start, offset, target):
                return array.load(builder.add(start, constant(offset)), target)

            def everywhere(array, start, offset, vector):
                return simd._broadcast(builder, load(array, start, offset, vector.element), vector)

            def out_at(c):
                return out.pointer(builder.add(place, constant(16 * c)), FLOATS.llvm)

            simd._align_stack(builder)
            totals = [cgutils.alloca_once(builder, FLOATS.llvm) for _ in range(C)]
            for c, total in enumerate(totals):
                builder.store(builder.load(out_at(c), align=1), total)
            with cgutils.for_range(builder, n) as loop:
                block = builder.add(at, builder.mul(loop.index, constant(C)))
                first = builder.mul(block, constant(4 * words))
                if lone:  # blocks by fours: a word of each in turn
                    inner = builder.and_(block, constant(3))
                    first = builder.add(
                        builder.mul(builder.sub(block, inner), constant(32)), builder.mul(inner, constant(4))
                    )
                dots = [everywhere(correction, block, c, INTS.llvm) for c in range(C)]
                dots += [ir.Constant(INTS.llvm, None)] * (C * chains - C)
                codes_at = builder.mul(loop.index, constant(64 * words))
                for word in range(words):
                    weights = load(codes, codes_at, 64 * word, BYTES.llvm)
                    for c in range(C):
                        offset = 16 * word if lone else 4 * (C * word + c)
                        four = builder.bitcast(everywhere(inputs, first, offset, INTS.llvm), BYTES.llvm)
                        i = c + word % chains * C
                        dots[i] = simd._dot_bytes(builder, dots[i], weights, four)
                if chains == 2:
                    dots = [builder.add(dots[c], dots[c + C]) for c in range(C)]
                row_at = builder.mul(loop.index, constant(16))
                row_scale = load(scales, row_at, 0, FLOATS.llvm)
                row_bias = load(biases, row_at, 0, FLOATS.llvm) if biased else None
                for c, total in enumerate(totals):
                    factor = builder.fmul(everywhere(scale, block, c, FLOATS.llvm), row_scale)
                    sum_ = builder.sitofp(dots[c], FLOATS.llvm)
                    sum_ = simd._multiply_add(builder, sum_, factor, builder.load(total))
                    if biased:
                        sum_ = simd._multiply_add(builder, row_bias, everywhere(sums, block, c, FLOATS.llvm), sum_)
                    builder.store(sum_, total)
            for c, total in enumerate(totals):
                builder.store(builder.load(total), out_at(c), align=1)
            return context.get_dummy_value()

        int64 = types.int64
        arrays = (codes, scales, biases, inputs, scale, correction, sums)
        return types.none(int64, *arrays, int64, out, int64), emit

    return multiply
