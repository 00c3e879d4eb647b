"""Sixteen rows of encoded blocks side by side: 32 bits of each row in the lanes of one vector.

A block's layout is written once, in `assay.fast.cpu.layouts`, in terms of `word(offset)`, the four bytes at an
offset in the blocks of all rows, and of the arithmetic here. Handed the `Lanes` of a function that is being
compiled, it emits vector code; handed NumPy's arrays and `NUMPY` (in the tests) it computes the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from assay.fast.cpu import simd
from assay.fast.cpu.simd import BYTES, FLOATS, I8, I32, INTS, cgutils, intrinsic, types

ROWS = 16
LOADED = 16  # bytes of a row that are fetched at a time


class Lanes:
    """16 words of 32 bits, or 16 floats, in a function that is being compiled."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def _with(self, other: "Lanes | int") -> Any:
        return other.value if isinstance(other, Lanes) else simd._splat(INTS.llvm, other)

    def __and__(self, other: "Lanes | int") -> "Lanes":
        return Lanes(self.builder, self.builder.and_(self.value, self._with(other)))

    def __or__(self, other: "Lanes | int") -> "Lanes":
        return Lanes(self.builder, self.builder.or_(self.value, self._with(other)))

    def __xor__(self, other: "Lanes | int") -> "Lanes":
        return Lanes(self.builder, self.builder.xor(self.value, self._with(other)))

    def __lshift__(self, bits: int) -> "Lanes":
        return Lanes(self.builder, self.builder.shl(self.value, self._with(bits)))

    def __rshift__(self, bits: int) -> "Lanes":
        return Lanes(self.builder, self.builder.lshr(self.value, self._with(bits)))

    def __mul__(self, other: "Lanes") -> "Lanes":
        return Lanes(self.builder, self.builder.fmul(self.value, other.value))

    def __neg__(self) -> "Lanes":
        return Lanes(self.builder, self.builder.fneg(self.value))


class Arithmetic:
    """What a layout does with lanes beyond their operators."""

    def number(self, x: Lanes) -> Lanes:
        """Unsigned integers below 2^31 as floats."""
        return Lanes(x.builder, x.builder.sitofp(x.value, FLOATS.llvm))

    def signed(self, x: Lanes) -> Lanes:
        """The int8 in each word's lowest byte as a float."""
        b = x.builder
        return Lanes(
            b, b.sitofp(b.ashr(b.shl(x.value, simd._splat(INTS.llvm, 24)), simd._splat(INTS.llvm, 24)), FLOATS.llvm)
        )

    def half(self, x: Lanes) -> Lanes:
        """The float16 in each word's lower 16 bits as a float."""
        return Lanes(x.builder, simd._half(x.builder, x.value))

    def bfloat(self, x: Lanes) -> Lanes:
        """The bfloat16 in each word's lower 16 bits as a float."""
        return self.float32(x << 16)

    def float32(self, x: Lanes) -> Lanes:
        """The float with these 32 bits."""
        return Lanes(x.builder, x.builder.bitcast(x.value, FLOATS.llvm))

    def power_of_two(self, x: Lanes) -> Lanes:
        """2^(code - 127) of words below 256, NaN for 255."""
        return Lanes(x.builder, simd._float_of_exponent(x.builder, (x << 23).value))

    def look_up(self, table: bytes, x: Lanes, shift: int) -> Lanes:
        """Each byte's low nibble, or with a shift of 4 its high one, by its entry in a table."""
        b = x.builder
        return Lanes(b, b.bitcast(simd._lookup_nibbles(b, table, b.bitcast(x.value, BYTES.llvm), shift), INTS.llvm))


EMITTED = Arithmetic()

# what a layout answers for a block of 32 (or 16) weights: 8 (4) words of unsigned codes, the scale, and the bias if any
Block = tuple[list[Any], Any, Any]


@dataclass(frozen=True)
class Layout:
    """Stored blocks of `nbytes`; `decode(word, arithmetic)` answers the blocks of weights in one of them.

    `together` stored blocks are decoded at a time, so that what is fetched in 16 bytes is used whole. Where `codes`
    says from which places of a block on 16 bytes are fetched, its first `side` bytes, its scale, come from all blocks
    together, four bytes in all.
    """

    nbytes: int
    together: int
    decode: Callable[[Callable[[int], Any], Any], list[Block]]
    codes: tuple[int, ...] = ()
    side: int = 0

    def starts(self, together: int) -> list[int]:
        """From where 16 bytes at a time are fetched of so many blocks."""
        if together < self.together or not self.codes:
            return fetched(self.nbytes * together)
        return [self.nbytes * s + start for s in range(together) for start in self.codes]

    def sides(self, together: int) -> list[int]:
        """Where the bytes of the scales lie that are fetched apart, if any are."""
        if together < self.together:
            return []
        return [self.nbytes * s + i for s in range(together) for i in range(self.side)]


def fetched(nbytes: int) -> list[int]:
    """Offsets from which 16 bytes at a time cover so many, at least 16, without reaching beyond them."""
    starts = list(range(0, nbytes - LOADED + 1, LOADED))
    return starts if starts[-1] + LOADED == nbytes else [*starts, nbytes - LOADED]


class Words:
    """`word(offset)` of some stored blocks, fetched when first asked for; of a scale that comes apart its bytes alone.

    `fetch(start)` answers the four words from there on; `sides` are the scales' bytes, a word of each row.
    """

    def __init__(self, builder: Any, layout: Layout, together: int, fetch: Callable, sides: Any) -> None:
        self._builder, self._fetch, self._starts = builder, fetch, layout.starts(together)
        self._words: dict[int, Any] = {}
        places = layout.sides(together)
        for i in range(0, len(places), layout.side or 1):
            self._words[places[i]] = builder.lshr(sides, simd._splat(INTS.llvm, 8 * i))

    def __call__(self, offset: int) -> Lanes:
        if offset not in self._words:
            start = next((s for s in self._starts if 0 <= offset - s < LOADED and (offset - s) % 4 == 0), None)
            if start is not None:
                for i, word in enumerate(self._fetch(start)):
                    self._words.setdefault(start + 4 * i, word)
            else:
                self._words[offset] = self._between(offset)
        return Lanes(self._builder, self._words[offset])

    def _between(self, offset: int) -> Any:
        """The word that begins inside another."""
        first = offset // 4 * 4
        low, high = self(first).value, self(first + 4).value
        bits = simd._splat(INTS.llvm, 8 * (offset - first))
        return simd._call(self._builder, "llvm.fshr.v16i32", INTS.llvm, high, low, bits)


def _row_pointers(builder: Any, data: simd.View, place: Any, stride: Any, last: Any, n: int) -> list[Any]:
    """Where the n bytes of each of 16 rows lie; beyond row `last` that one again."""
    pointers = []
    for r in range(ROWS):
        row = ir.Constant(stride.type, r)
        row = builder.select(builder.icmp_signed("<", row, last), row, last)
        at = builder.add(place, builder.mul(row, stride))
        pointers.append(data.pointer(at, ir.VectorType(I8, n)))
    return pointers


def _prefetch_next_tile(builder: Any, rows: list[Any], stride: Any, nbytes: int) -> None:
    """Ask the memory for the same blocks of the 16 rows that follow: rows side by side are too many streams to guess.

    Beyond the last row that is an address of nothing, which a prefetch may have.
    """
    next_tile = builder.mul(stride, ir.Constant(stride.type, ROWS))
    pointer = I8.as_pointer()
    for row in rows:
        for offset in range(0, nbytes, 64):
            at = builder.gep(builder.bitcast(row, pointer), [builder.add(next_tile, ir.Constant(stride.type, offset))])
            simd._prefetch(builder, at, 2)


class Unit:
    """n stored blocks from a place on of 16 rows, decoded where the function being compiled has come to."""

    def __init__(
        self, builder: Any, data: simd.View, place: Any, stride: Any, last: Any, layout: Layout, n: int
    ) -> None:
        self._builder, self._layout, self._n = builder, layout, n
        self.rows = _row_pointers(builder, data, place, stride, last, layout.nbytes * n)

    def _of_each_row(self, start: int, count: int) -> list[Any]:
        builder, target = self._builder, ir.VectorType(I8, count).as_pointer()
        at = [builder.gep(builder.bitcast(row, I8.as_pointer()), [ir.Constant(I32, start)]) for row in self.rows]
        return [builder.load(builder.bitcast(p, target), align=1) for p in at]

    def _fetch(self, start: int) -> list[Any]:
        vectors = self._of_each_row(start, LOADED)
        fours = [simd._join(self._builder, vectors[i : i + 4]) for i in range(0, ROWS, 4)]
        return simd._transpose(self._builder, fours)

    def sides(self) -> Any:
        """The bytes of the scales that are fetched apart, a word of each row; None where the layout has none."""
        builder, places = self._builder, self._layout.sides(self._n)
        if not places:
            return None
        vectors, picks = self._of_each_row(0, 64), [*places, *(64 + place for place in places)]
        pairs = [simd._shuffle(builder, a, b, picks) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        return builder.bitcast(simd._join(builder, pairs), INTS.llvm)

    def decoder(self, sides: Any) -> Callable[[int], list[Block]]:
        """What answers the blocks of weights in the stored block s, given `sides()`."""
        word = Words(self._builder, self._layout, self._n, self._fetch, sides)
        return lambda s: self._layout.decode(lambda at: word(s * self._layout.nbytes + at), EMITTED)


def _store_blocks(context: Any, builder: Any, types_: Any, args: Any, layout: Layout, together: int, unit: Any) -> None:
    """Stored blocks unit * together and those after it of 16 rows, decoded, to codes, scales and biases."""
    data, place, stride, last, codes, scales, biases = args
    constant = lambda value: ir.Constant(place.type, value)  # noqa: E731
    place = builder.add(place, builder.mul(unit, constant(layout.nbytes * together)))
    stored = Unit(builder, simd.View(context, builder, types_[0], data), place, stride, last, layout, together)
    _prefetch_next_tile(builder, stored.rows, stride, layout.nbytes * together)
    decode = stored.decoder(stored.sides())
    blocks = [block for s in range(together) for block in decode(s)]
    first = builder.mul(unit, constant(len(blocks)))
    for number, (words, scale, bias) in enumerate(blocks):
        block = builder.add(first, constant(number))
        for i, w in enumerate(words):
            at = builder.add(builder.mul(block, constant(64 * len(words))), constant(64 * i))
            builder.store(w.value, simd._pointer(context, builder, types_[4], codes, at, INTS.llvm), align=1)
        at = builder.mul(block, constant(ROWS))
        for index, array, value in ((5, scales, scale), (6, biases, bias)):
            if value is not None:
                to = simd._pointer(context, builder, types_[index], array, at, FLOATS.llvm)
                builder.store(value.value, to, align=1)


def decoder(layout: Layout) -> Any:
    """An intrinsic that decodes n stored blocks of 16 rows.

    Its arguments: the bytes, where row 0's blocks are, the stride between rows, the last row that is there; then
    where the results go (codes, scales and biases), and n.
    """

    @intrinsic
    def decode(typing_context, data, place, stride, last, codes, scales, biases, n):
        def emit(context, builder, signature, args):
            *args, n = args
            together = ir.Constant(n.type, layout.together)
            whole = builder.sdiv(n, together)
            with cgutils.for_range(builder, whole) as loop:
                _store_blocks(context, builder, signature.args, args, layout, layout.together, loop.index)
            if layout.together > 1:
                with cgutils.for_range(builder, n, start=builder.mul(whole, together)) as loop:
                    _store_blocks(context, builder, signature.args, args, layout, 1, loop.index)
            return context.get_dummy_value()

        int64 = types.int64
        return types.none(data, int64, int64, int64, codes, scales, biases, int64), emit

    return decode


def side_decoder(width: int, decode: Callable[[Lanes], Lanes]) -> Any:
    """An intrinsic that stores 16 rows' scales (or biases), `width` bytes each, as floats.

    Its arguments: the bytes, where row 0's is, the stride between rows, the last row; the results, and the place.
    """

    @intrinsic
    def side(typing_context, data, place, stride, last, out, at):
        def emit(context, builder, signature, args):
            data, place, stride, last, out, at = args
            data = simd.View(context, builder, signature.args[0], data)
            rows = _row_pointers(builder, data, place, stride, last, width)
            element, vector = ir.IntType(8 * width), ir.Constant(INTS.llvm, None)
            for r, row in enumerate(rows):
                value = builder.load(builder.bitcast(row, element.as_pointer()), align=1)
                value = builder.zext(value, I32) if width < 4 else value
                vector = builder.insert_element(vector, value, ir.Constant(I32, r))
            to = simd._pointer(context, builder, signature.args[4], out, at, FLOATS.llvm)
            builder.store(decode(Lanes(builder, vector)).value, to, align=1)
            return context.get_dummy_value()

        return types.none(data, types.int64, types.int64, types.int64, out, types.int64), emit

    return side
