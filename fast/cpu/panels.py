"""`linear.dot` of several rows with several columns at once: each sum in the same order, all of them in registers.

A row and a column alone read two vectors for each product; R rows and M columns together R + M for R M products.
Rows and columns are first laid out as panels: vectors of 16 in the order in which they are used, those of all R (or M)
side by side; first the ones that belong to the first partial sum of `linear.dot`, then those of the second.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from assay.fast.cpu import simd
from assay.fast.cpu.jit import leaf
from assay.fast.cpu.simd import FLOATS, LANE, cgutils, intrinsic, types

# of products in registers: with their factors they fill the 32 that a vector of 16 floats may be in
ROWS, COLUMNS = (2, 2) if LANE == "portable" else (4, 6)
FEW = 4  # columns from which on panels cost more than they save
PARTS = 4  # partial sums of 16 that `linear.dot` keeps
STEPS = 48  # vectors of a partial sum that are used at a time: those of a panel of rows and one of columns take 30 KB


@intrinsic
def multiply(typing_context, weights, first, x, start, n, sums, at):
    """Add the products of n vectors of each row and each column to their sums, vectors of 16, row after row.

    From place `first` of the panel of rows, `start` of that of columns, and `at` of the sums.
    """

    def emit(context, builder, signature, args):
        weights, first, x, start, n, sums, at = args
        constant = lambda value: ir.Constant(ir.IntType(64), value)  # noqa: E731

        def vector(argument: int, array: Any, place: Any, number: int) -> Any:
            place = builder.add(place, constant(16 * number))
            return simd._pointer(context, builder, signature.args[argument], array, place, FLOATS.llvm)

        totals = [cgutils.alloca_once(builder, FLOATS.llvm) for _ in range(ROWS * COLUMNS)]
        for number, total in enumerate(totals):
            builder.store(builder.load(vector(5, sums, at, number), align=1), total)
        with cgutils.for_range(builder, n) as loop:
            row = builder.add(first, builder.mul(loop.index, constant(16 * ROWS)))
            column = builder.add(start, builder.mul(loop.index, constant(16 * COLUMNS)))
            factors = [builder.load(vector(2, x, column, m), align=1) for m in range(COLUMNS)]
            for r in range(ROWS):
                weight = builder.load(vector(0, weights, row, r), align=1)
                for factor, total in zip(factors, totals[r * COLUMNS :], strict=False):
                    builder.store(simd._multiply_add(builder, factor, weight, builder.load(total)), total)
        for number, total in enumerate(totals):
            builder.store(builder.load(total), vector(5, sums, at, number), align=1)
        return context.get_dummy_value()

    int64 = types.int64
    return types.none(weights, int64, x, int64, int64, sums, int64), emit


def _sums(builder: Any, vectors: Sequence[Any]) -> list[Any]:
    """`simd.sum_floats` of each vector, 16 to a vector: halves are added of two, of four, eight and 16 at a time."""
    vectors, width = list(vectors), 16
    while width > 1:
        if len(vectors) % 2:
            vectors.append(vectors[-1])
        low = [group + i for group in range(0, 32, width) for i in range(width // 2)]
        high = [place + width // 2 for place in low]
        vectors = [
            builder.fadd(simd._shuffle(builder, a, b, low), simd._shuffle(builder, a, b, high))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width //= 2
    return vectors


@intrinsic
def add_up(typing_context, sums, at, totals):
    """The totals of sums of which four parts of 16 lie from a place on, part after part: `linear.dot`'s last steps."""

    def emit(context, builder, signature, args):
        sums, at, totals = args

        def part(number: int, product: int) -> Any:
            place = builder.add(at, ir.Constant(at.type, 16 * (number * ROWS * COLUMNS + product)))
            return simd._load(context, builder, signature.args[0], sums, place, FLOATS.llvm)

        add = builder.fadd
        whole = [add(add(part(0, k), part(1, k)), add(part(2, k), part(3, k))) for k in range(ROWS * COLUMNS)]
        for number, vector in enumerate(_sums(builder, whole)):
            place = ir.Constant(at.type, 16 * number)
            to = simd._pointer(context, builder, signature.args[2], totals, place, FLOATS.llvm)
            builder.store(vector, to, align=1)
        return context.get_dummy_value()

    return types.none(sums, types.int64, totals), emit


@leaf
def lay_out(row, at, width, lane, panel):
    """Put a row's whole vectors into its lane of a panel of `width` that begins at a place."""
    to, whole = at + 16 * lane, len(row) // 16
    for part in range(PARTS):
        for v in range(part, whole, PARTS):
            simd.store_floats(panel, to, simd.load_floats(row, 16 * v))
            to += 16 * width


@leaf
def in_panels(count):
    """How many of so many columns are worth a panel: all but up to four, or up to three behind whole panels."""
    rest = count % COLUMNS
    if count <= FEW:
        return 0
    return count - rest if rest < FEW else count


@leaf
def lay_out_columns(x, x_row, whole, start, share, shares, panels):
    """Rows of x, [P], as panels of columns from a place on, every so manyth; beyond the last one that again."""
    count = len(x_row)
    for column in range(share, (count + COLUMNS - 1) // COLUMNS * COLUMNS, shares):
        begin = column // COLUMNS * COLUMNS
        lay_out(x[x_row[min(column, count - 1)]], start + 16 * whole * begin, COLUMNS, column - begin, panels)


@leaf
def multiply_panels(weights, panels, x, start, whole, sums):
    """Add up the products of some panels of rows, which lie one behind the other, and one of columns."""
    size = 16 * ROWS * COLUMNS  # of a part's sums
    for i in range(panels * PARTS * size):
        sums[i] = 0
    for step in range(0, (whole + PARTS - 1) // PARTS, STEPS):
        before = step  # vectors of a row that lie before these
        for part in range(PARTS):
            steps = (whole - part + PARTS - 1) // PARTS
            for panel in range(panels):  # what is read of the columns stays in the first cache
                first, at = 16 * ROWS * (panel * whole + before), (panel * PARTS + part) * size
                multiply(weights, first, x, start + 16 * COLUMNS * before, min(STEPS, steps - step), sums, at)
            before += steps


@leaf
def totals_of_panel(panel, sums, totals):
    """The dot products of one of those panels with the columns, row after row."""
    add_up(sums, panel * PARTS * 16 * ROWS * COLUMNS, totals)
