"""Hypothesis strategies for blocks of every encoding, and a check of anybody's dequantisation kernel in one line.

    check_dequantise("Q4_K", my_kernel)   # my_kernel: uint8 [n, 144] -> float32 [n, 256]

Needs hypothesis, which the `test` extra installs. Names are those of `assay.golden.block_forms.BLOCK_FORMS`.
"""

from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from assay.golden.block_forms import BLOCK_FORMS, BlockForm, Field
from assay.golden.vectors import vectors

Kernel = Callable[[np.ndarray], np.ndarray]
FILLS = (0x00, 0x0F, 0x77, 0x80, 0x88, 0xF0, 0xFF)
# zero, least and largest subnormal, least normal, 1, largest
EDGES = {
    "F16": (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF),
    "BF16": (0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x7F7F),
    "F32": (0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF),
    "E8M0": (0, 1, 2, 127, 252, 254),
    "E8M0+14": (0, 1, 14, 141, 254),
    "E4M3": (0x00, 0x01, 0x07, 0x08, 0x38, 0x7E),
}
# infinity and NaN, or what stands for them
SPECIAL = {
    "F16": (0x7C00, 0x7C01, 0x7E00),
    "BF16": (0x7F80, 0x7F81, 0x7FC0),
    "F32": (0x7F800000, 0x7F800001, 0x7FC00000),
    "E8M0": (255,),
    "E8M0+14": (255,),
    "E4M3": (0x7F, 0xFF, 0x80, 0xB8),
}


def blocks(name: str, *, special: bool = False) -> SearchStrategy[np.ndarray]:
    """One block, uint8 [nbytes]; with `special` its scales may be infinite, NaN or otherwise disputed."""
    form = BLOCK_FORMS[name]
    filled = st.sampled_from(FILLS).map(lambda fill: bytes([fill]) * form.nbytes)
    codes = st.binary(min_size=form.nbytes, max_size=form.nbytes) | filled
    scales = st.tuples(*(_field_codes(field, special) for field in form.fields))
    return st.builds(_assembled, st.just(form), codes, scales)


def block_arrays(name: str, *, max_blocks: int = 4, special: bool = False) -> SearchStrategy[np.ndarray]:
    """Some blocks, uint8 [n, nbytes]."""
    return st.lists(blocks(name, special=special), min_size=1, max_size=max_blocks).map(np.stack)


def _field_codes(field: Field, special: bool) -> SearchStrategy[int]:
    bits = 8 * field.nbytes - (field.unsigned and not special)
    edges = EDGES.get(field.format.name, (0, 1, 2 ** (bits - 1), 2**bits - 1))
    edges += SPECIAL.get(field.format.name, ()) if special else ()
    if field.format.name in ("F16", "BF16", "F32"):
        edges += tuple(edge | 2 ** (bits - 1) for edge in edges)
    drawn = st.integers(0, 2**bits - 1) | st.sampled_from(edges)
    return drawn if special else drawn.filter(lambda code: bool(field.is_ordinary(field.stored(np.array([code])))[0]))


def _assembled(form: BlockForm, codes: bytes, scales: tuple[int, ...]) -> np.ndarray:
    block = np.frombuffer(codes, np.uint8).copy()
    for field, code in zip(form.fields, scales, strict=True):
        field.put(block[None], np.array([code]))
    return block


def check_dequantise(
    name: str, kernel: Kernel, *, special: bool = False, signed_zeros: bool = False, examples: int = 100
) -> None:
    """Check a kernel, uint8 [n, nbytes] -> float32 [n, elements], on the encoding's vectors and on random blocks.

    Values must be equal, NaN where NaN is expected; with `signed_zeros` -0 must be -0, which ggml's own FP4
    decoders do not give. Raises AssertionError with the first wrong element and its operands.
    """
    form = BLOCK_FORMS[name]
    known, expected = vectors(name)
    wanted = np.ones(len(known), bool) if special else form.is_ordinary(known)
    _compare(form, kernel, known[wanted], expected[wanted], signed_zeros)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(block_arrays(name, special=special))
    def holds(drawn: np.ndarray) -> None:
        _compare(form, kernel, drawn, form.decode(drawn), signed_zeros)

    holds()


def _compare(form: BlockForm, kernel: Kernel, blocks: np.ndarray, expected: np.ndarray, signed_zeros: bool) -> None:
    got = np.asarray(kernel(blocks.copy()))
    if got.shape != expected.shape or got.dtype != np.float32:
        raise AssertionError(f"{form.name}: expected float32 {expected.shape}, got {got.dtype} {got.shape}")
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    if signed_zeros:
        same &= (np.signbit(got) == np.signbit(expected)) | np.isnan(expected)
    if not same.all():
        raise AssertionError(_report(form, blocks, expected, got, same))


def _report(form: BlockForm, blocks: np.ndarray, expected: np.ndarray, got: np.ndarray, same: np.ndarray) -> str:
    """The first wrong element, what it should be, and the block that it came from."""
    block, element = (int(i) for i in np.argwhere(~same)[0])
    scales = (f"{f.name} = {f.values(blocks)[block]:.9g} ({f.format.name} at byte {f.offset})" for f in form.fields)
    wrong = f"{np.count_nonzero(~same)} of {same.size} elements differ, first in block {block}, element {element}"
    return (
        f"{form.name}: {wrong}\n"
        f"  expected: {_shown(expected[block, element])}\n"
        f"  got: {_shown(got[block, element])}\n"
        f"  scales: {', '.join(scales)}\n"
        f"  block: {blocks[block].tobytes().hex(' ', 4)}"
    )


def _shown(value: np.float32) -> str:
    return f"{value:.9g} (0x{int(value.view(np.uint32)):08x})"
