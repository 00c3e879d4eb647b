"""`linear.dot` of several rows with several columns at once: each sum in the same order, all of them in registers.

One row and one column alone read two vectors for each product; R rows and M columns together R + M for R M products.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from assay.fast.cpu import simd
from assay.fast.cpu.simd import FLOATS, LANE, cgutils, intrinsic, types

# of sums in registers: with the factors they fill the 32 of 16 floats, or of the portable lane some of fewer bytes
ROWS, COLUMNS, FEW_COLUMNS = (2, 2, 2) if LANE == "portable" else (4, 6, 3)
SUMS = 32  # room for those of a block
PARTS = 4  # partial sums of 16 that `linear.dot` keeps


def _sums(builder: Any, vectors: Sequence[Any]) -> list[Any]:
    """`simd.sum_floats` of each vector, 16 to a vector: halves are added of two, then four, eight and 16 together."""
    vectors, width = list(vectors), 16
    while width > 1:
        half = width // 2
        if len(vectors) % 2:
            vectors.append(vectors[-1])
        low = [group + i for group in range(0, 32, width) for i in range(half)]
        high = [place + half for place in low]
        vectors = [
            builder.fadd(simd._shuffle(builder, a, b, low), simd._shuffle(builder, a, b, high))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width = half
    return vectors


def dot_block(rows: int, columns: int) -> Any:
    """An intrinsic that multiplies `rows` rows of a tile with `columns` columns of x, whole vectors of 16 of each.

    Its arguments: the tile, float32 [any,I], and the first of the rows; x, float32 [any,I], which of its rows are
    the columns, int64 [P], and the first of them; where the sums go, float32, row after row. Beyond the last row or
    column that one is taken again.
    """

    @intrinsic
    def block(typing_context, tile, first_row, x, x_row, first_column, sums):
        def emit(context, builder, signature, args):
            tile, first_row, x, x_row, first_column, sums = args
            tile_type, _, x_type, x_row_type, _, sums_type = signature.args
            constant = lambda value: ir.Constant(ir.IntType(64), value)  # noqa: E731
            views = [context.make_array(kind)(context, builder, array) for kind, array in zip(
                (tile_type, x_type, x_row_type), (tile, x, x_row), strict=True)]  # fmt: skip
            (tile_rows, width), (_, _), (P,) = (cgutils.unpack_tuple(builder, view.shape) for view in views)

            def clamped(first: Any, number: int, count: Any) -> Any:
                at, last = builder.add(first, constant(number)), builder.sub(count, constant(1))
                return builder.select(builder.icmp_signed("<", at, last), at, last)

            def column(number: int) -> Any:
                at = clamped(first_column, number, P)
                return builder.load(simd._pointer(context, builder, x_row_type, x_row, at, ir.IntType(64)))

            row_at = [builder.mul(clamped(first_row, r, tile_rows), width) for r in range(rows)]
            column_at = [builder.mul(column(m), width) for m in range(columns)]
            end = builder.mul(builder.sdiv(width, constant(16)), constant(16))
            parts = []
            for part in range(PARTS):
                totals = [
                    cgutils.alloca_once_value(builder, ir.Constant(FLOATS.llvm, None)) for _ in range(rows * columns)
                ]
                for total in totals:
                    builder.store(ir.Constant(FLOATS.llvm, None), total)
                with cgutils.for_range_slice(builder, constant(16 * part), end, constant(16 * PARTS)) as (i, _):
                    load = lambda kind, array, at, i=i: simd._load(  # noqa: E731
                        context, builder, kind, array, builder.add(at, i), FLOATS.llvm
                    )
                    factors = [load(x_type, x, at) for at in column_at]
                    for r, at in enumerate(row_at):
                        weight = load(tile_type, tile, at)
                        for m, factor in enumerate(factors):
                            total = totals[r * columns + m]
                            builder.store(simd._multiply_add(builder, factor, weight, builder.load(total)), total)
                parts.append([builder.load(total) for total in totals])
            add = builder.fadd
            whole = [add(add(a, b), add(c, d)) for a, b, c, d in zip(*parts, strict=True)]
            for n, vector in enumerate(_sums(builder, whole)):
                at = simd._pointer(context, builder, sums_type, sums, constant(16 * n), FLOATS.llvm)
                builder.store(vector, at, align=1)
            return context.get_dummy_value()

        return types.none(tile, types.int64, x, x_row, types.int64, sums), emit

    return block


many = dot_block(ROWS, COLUMNS)
few = dot_block(ROWS, FEW_COLUMNS)
