"""The inner loops of attention, as intrinsics: some query heads together, that read the same keys and values.

Each key and value is fetched once for up to four heads, whose sums fill the registers; fetched for each head anew,
they came from the second cache, several times slower than they were multiplied.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir

from assay.fast.cpu import simd
from assay.fast.cpu.simd import F32, FLOATS, I16, INTS, cgutils, intrinsic, types

LANES = 16
COUNTS = (4, 2, 1)  # of query heads that go together
CHAINS = 4  # of sums to a score
VECTORS = 2  # of a value's channels at a time: for each head and vector there are two sums, of even and of odd keys


def _load16(builder: Any, numbers: simd.View, index: Any, half: bool) -> Any:
    """16 numbers from number `index` of a byte array on, as floats."""
    kind = ir.VectorType(I16, LANES) if half else FLOATS.llvm
    loaded = numbers.load(builder.mul(index, ir.Constant(index.type, 2 if half else 4)), kind)
    return simd._half(builder, builder.zext(loaded, INTS.llvm)) if half else loaded


def _each_way(builder: Any, half: Any, heads: Any) -> Iterator[tuple[bool, int]]:
    """The ways there are to run, each where the function being compiled has come to when it is to be run that way."""
    for is_half in (False, True):
        with builder.if_then(builder.icmp_signed("==", half, half.type(int(is_half)))):
            for count in COUNTS:
                with builder.if_then(builder.icmp_signed("==", heads, heads.type(count))):
                    yield is_half, count


def _zeros(builder: Any, count: int) -> list[Any]:
    sums = [cgutils.alloca_once(builder, FLOATS.llvm) for _ in range(count)]
    for sum_ in sums:
        builder.store(ir.Constant(FLOATS.llvm, None), sum_)
    return sums


def _add_product(builder: Any, a: Any, b: Any, sum_: Any) -> None:
    builder.store(simd._multiply_add(builder, a, b, builder.load(sum_)), sum_)


@intrinsic
def scores_of_block(typing_context, half, heads, q, q_at, C, keys, at, scale, out, to, step):
    """Scores of 16 keys that stand side by side from number `at` of `keys` on, with so many heads: 1, 2 or 4.

    Head g's query is C floats from q_at + g C on, its scores go to 16 places from to + g step on.
    """

    def emit(context, builder, signature, args):
        half, heads, _, q_at, C, _, at, scale, _, to, step = args
        constant = lambda value: ir.Constant(C.type, value)  # noqa: E731
        q, keys, out = (simd.View(context, builder, signature.args[i], args[i]) for i in (2, 5, 8))

        def channel(i: Any, sums: Sequence[Any], is_half: bool) -> None:
            place = builder.add(at, builder.mul(i, constant(LANES)))
            key = _load16(builder, keys, place, is_half)
            for g, sum_ in enumerate(sums):
                place = builder.add(builder.add(q_at, i), builder.mul(C, constant(g)))
                x = q.load(place, F32)
                _add_product(builder, simd._broadcast(builder, x, FLOATS.llvm), key, sum_)

        for is_half, count in _each_way(builder, half, heads):
            chains = [_zeros(builder, count) for _ in range(CHAINS)]
            whole = builder.sdiv(C, constant(CHAINS))
            with cgutils.for_range(builder, whole) as loop:
                for k, sums in enumerate(chains):
                    channel(builder.add(builder.mul(loop.index, constant(CHAINS)), constant(k)), sums, is_half)
            with cgutils.for_range(builder, C, start=builder.mul(whole, constant(CHAINS))) as loop:
                channel(loop.index, chains[0], is_half)
            for g in range(count):
                a, b, c, d = (builder.load(sums[g]) for sums in chains)
                score = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
                score = builder.fmul(score, simd._broadcast(builder, scale, FLOATS.llvm))
                place = builder.add(to, builder.mul(step, constant(g)))
                builder.store(score, out.pointer(place, FLOATS.llvm), align=1)
        return context.get_dummy_value()

    int64 = types.int64
    return types.none(half, int64, q, int64, int64, keys, int64, types.float32, out, int64, int64), emit


@intrinsic
def add_weighted_values(typing_context, half, heads, n, weights, first, step, values, slot, slots, row, at, C, out, to):
    """Add n values of consecutive slots, times each head's weights, to each head's C outputs, all but the last C % 16.

    Head g's weights lie from first + g step on, its outputs from to + g C on; a slot's value begins at its number
    times `row` + `at`, and after the last of `slots` comes the first.
    """

    def emit(context, builder, signature, args):
        half, heads, n, _, first, step, _, slot, slots, row, at, C, _, to = args
        constant = lambda value: ir.Constant(C.type, value)  # noqa: E731
        weights, values, out = (simd.View(context, builder, signature.args[i], args[i]) for i in (3, 6, 12))

        def after(s: Any) -> Any:
            following = builder.add(s, constant(1))
            return builder.select(builder.icmp_signed("<", following, slots), following, constant(0))

        def add(k: Any, s: Any, c: Any, sums: Sequence[Any], vectors: int, is_half: bool) -> None:
            """Value k, in slot s, from channel c on."""
            place = builder.add(builder.add(builder.mul(s, row), at), c)
            value = [_load16(builder, values, builder.add(place, constant(LANES * v)), is_half) for v in range(vectors)]
            for g in range(len(sums) // vectors):
                of_g = builder.add(builder.add(first, k), builder.mul(step, constant(g)))
                weight = weights.load(of_g, F32)
                weight = simd._broadcast(builder, weight, FLOATS.llvm)
                for v in range(vectors):
                    _add_product(builder, weight, value[v], sums[g * vectors + v])

        def channels(c: Any, count: int, vectors: int, is_half: bool) -> None:
            even, odd = (_zeros(builder, count * vectors) for _ in range(2))
            now = cgutils.alloca_once(builder, C.type)
            builder.store(slot, now)
            with cgutils.for_range(builder, builder.sdiv(n, constant(2))) as loop:
                k, s = builder.mul(loop.index, constant(2)), builder.load(now)
                add(k, s, c, even, vectors, is_half)
                add(builder.add(k, constant(1)), after(s), c, odd, vectors, is_half)
                builder.store(after(after(s)), now)
            last = builder.sub(n, constant(1))
            with builder.if_then(builder.icmp_signed("==", builder.srem(n, constant(2)), constant(1))):
                add(last, builder.load(now), c, even, vectors, is_half)
            for g in range(count):
                for v in range(vectors):
                    sum_ = builder.fadd(builder.load(even[g * vectors + v]), builder.load(odd[g * vectors + v]))
                    place = builder.add(builder.add(to, c), constant(LANES * v))
                    place = builder.add(place, builder.mul(C, constant(g)))
                    pointer = out.pointer(place, FLOATS.llvm)
                    builder.store(builder.fadd(builder.load(pointer, align=1), sum_), pointer, align=1)

        for is_half, count in _each_way(builder, half, heads):
            wide = constant(LANES * VECTORS)
            whole = builder.sdiv(C, wide)
            with cgutils.for_range(builder, whole) as loop:
                channels(builder.mul(loop.index, wide), count, VECTORS, is_half)
            vectors = builder.sdiv(C, constant(LANES))
            with cgutils.for_range(builder, vectors, start=builder.mul(whole, constant(VECTORS))) as loop:
                channels(builder.mul(loop.index, constant(LANES)), count, 1, is_half)
        return context.get_dummy_value()

    int64 = types.int64
    return types.none(half, *[int64] * 2, weights, *[int64] * 2, values, *[int64] * 5, out, int64), emit
