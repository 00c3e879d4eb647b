"""Where each encoding's blocks keep codes, scales and biases: the weight is scale (code - offset) / unit + bias.

Codes are unsigned bytes, four to a word, in the order of the elements; of the encodings that put elements 2j and
2j + 1 in one byte first the even ones, then the odd ones. Twins of `assay.reference.formats`, in vector form.
"""

from collections.abc import Callable
from typing import Any

from assay.fast.cpu.lanes import Block, Layout
from assay.fast.cpu.rows import (
    AFFINE4,
    AFFINE8,
    MXFP4_ADJACENT,
    MXFP4_SPLIT,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
)

Word = Callable[[int], Any]

# what is added to a code to make it unsigned, and what one counts; whether elements 2j and 2j + 1 share a byte
OFFSET = {MXFP4_SPLIT: 12, MXFP4_ADJACENT: 12, Q8_0: 128, Q4_0: 8, Q5_0: 16, Q6_K: 32}
UNIT = {MXFP4_SPLIT: 0.5, MXFP4_ADJACENT: 0.5}
ADJACENT = (MXFP4_ADJACENT, AFFINE4)
BIASED = (Q4_1, Q5_1, Q4_K, Q5_K, AFFINE4, AFFINE8)
SUPERBLOCKS = (Q4_K, Q5_K, Q6_K)  # multiply inputs rounded in blocks of 256

E2M1_DOUBLED = bytes(value + 12 for value in (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))
LOW, NIBBLES = 0x0F0F0F0F, (0, 4)
NO_SCALE = None  # it lies elsewhere


def nibbles(word: Word, start: int) -> list[Any]:
    """32 codes of 16 bytes: the low nibbles, then the high ones."""
    return [word(start + 4 * i) >> shift & LOW for shift in NIBBLES for i in range(4)]


def mxfp4_codes(word: Word, a: Any, start: int) -> list[Any]:
    """Twice the value plus 12."""
    return [a.look_up(E2M1_DOUBLED, word(start + 4 * i), shift) for shift in NIBBLES for i in range(4)]


def mxfp4_split(word: Word, a: Any) -> list[Block]:
    """The scale's byte, then 16 of codes."""
    return [(mxfp4_codes(word, a, 1), a.power_of_two(word(0) & 255), None)]


def mxfp4_adjacent(word: Word, a: Any) -> list[Block]:
    return [(mxfp4_codes(word, a, 0), NO_SCALE, None)]


def affine4(word: Word, a: Any) -> list[Block]:
    return [(nibbles(word, 0), NO_SCALE, NO_SCALE)]


def affine8(word: Word, a: Any) -> list[Block]:
    return [([word(4 * i) for i in range(8)], NO_SCALE, NO_SCALE)]


def q8_0(word: Word, a: Any) -> list[Block]:
    """d, then 32 signed codes."""
    return [([word(2 + 4 * i) ^ 0x80808080 for i in range(8)], a.half(word(0)), None)]


def q4_0(word: Word, a: Any) -> list[Block]:
    """d, then 16 bytes of codes."""
    return [(nibbles(word, 2), a.half(word(0)), None)]


def q4_1(word: Word, a: Any) -> list[Block]:
    """d, m, then 16 bytes of codes."""
    return [(nibbles(word, 4), a.half(word(0)), a.half(word(0) >> 16))]


def fifth_bits(bits: Any, i: int) -> Any:
    """Bits 4i to 4i + 3 of 32, the fifth bits of four codes."""
    four = bits >> 4 * i & 15
    return ((four | four << 7 | four << 14 | four << 21) & 0x01010101) << 4


def five_bits(word: Word, start: int) -> list[Any]:
    """32 codes: 32 fifth bits, then 16 bytes of nibbles."""
    bits = word(start)
    return [code | fifth_bits(bits, i) for i, code in enumerate(nibbles(word, start + 4))]


def q5_0(word: Word, a: Any) -> list[Block]:
    """d, then the codes."""
    return [(five_bits(word, 2), a.half(word(0)), None)]


def q5_1(word: Word, a: Any) -> list[Block]:
    """d, m, then the codes."""
    return [(five_bits(word, 4), a.half(word(0)), a.half(word(0) >> 16))]


def six_bit_pairs(word: Word, a: Any) -> list[tuple[Any, Any]]:
    """The scale and the bias of eight sub-blocks, from d, dmin and 12 bytes (see `reference.formats.kquants`)."""
    d, dmin = a.half(word(0)), a.half(word(0) >> 16)
    first, second, last = word(4), word(8), word(12)
    scales = first & 0x3F3F3F3F, last & LOW | first >> 2 & 0x30303030
    minima = second & 0x3F3F3F3F, last >> 4 & LOW | second >> 2 & 0x30303030
    byte = lambda words, s: a.number(words[s // 4] >> 8 * (s % 4) & 255)  # noqa: E731
    return [(d * byte(scales, s), -(dmin * byte(minima, s))) for s in range(8)]


def q4_k(word: Word, a: Any) -> list[Block]:
    """d, dmin, 12 bytes of scales and minima, 128 of nibbles: 32 low ones, then the 32 high ones beside them."""
    blocks = []
    for s, (scale, bias) in enumerate(six_bit_pairs(word, a)):
        start, shift = 16 + 32 * (s // 2), NIBBLES[s % 2]
        blocks.append(([word(start + 4 * i) >> shift & LOW for i in range(8)], scale, bias))
    return blocks


def q5_k(word: Word, a: Any) -> list[Block]:
    """As Q4_K with 32 bytes of fifth bits before the nibbles: bit s of them belongs to sub-block s."""
    blocks = []
    for s, (scale, bias) in enumerate(six_bit_pairs(word, a)):
        start, shift = 48 + 32 * (s // 2), NIBBLES[s % 2]
        fifth = [(word(16 + 4 * i) >> s & 0x01010101) << 4 for i in range(8)]
        blocks.append(([word(start + 4 * i) >> shift & LOW | fifth[i] for i in range(8)], scale, bias))
    return blocks


def q6_k(word: Word, a: Any) -> list[Block]:
    """128 bytes of lower nibbles, 64 of upper two bits, 16 signed scales, d; 16 weights to a scale."""
    blocks, d = [], a.half(word(206) >> 16)
    for s in range(16):
        half, run, first = s // 8, s % 8 // 2, 4 * (s % 2)  # run: 32 weights of a half, in the order of their bits
        low = [word(64 * half + 32 * (run % 2) + 4 * (first + i)) >> NIBBLES[run // 2] & LOW for i in range(4)]
        high = [word(128 + 32 * half + 4 * (first + i)) >> 2 * run & 0x03030303 for i in range(4)]
        scale = d * a.signed(word(192 + 4 * (s // 4)) >> 8 * (s % 4))
        blocks.append(([x | y << 4 for x, y in zip(low, high, strict=True)], scale, None))
    return blocks


LAYOUTS = {
    MXFP4_SPLIT: Layout(17, 4, mxfp4_split, codes=(1,), side=1),
    MXFP4_ADJACENT: Layout(16, 1, mxfp4_adjacent),
    Q8_0: Layout(34, 2, q8_0, codes=(2, 18), side=2),
    Q4_0: Layout(18, 2, q4_0),
    Q4_1: Layout(20, 4, q4_1),
    Q5_0: Layout(22, 2, q5_0),
    Q5_1: Layout(24, 2, q5_1),
    AFFINE4: Layout(16, 1, affine4),
    AFFINE8: Layout(32, 1, affine8),
    Q4_K: Layout(144, 1, q4_k),
    Q5_K: Layout(176, 1, q5_k),
    Q6_K: Layout(210, 1, q6_k),
}
