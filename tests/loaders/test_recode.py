"""Recoding: what is said to be kept is kept, for any bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.loaders.recode import Kept, candidates, compare, keeps, recode
from assay.loaders.weight import Weight
from assay.reference.formats import (
    MXFP4,
    MXFP4_BLOCKS,
    NVFP4_BLOCKS,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q8_0,
    BlockFormat,
)


def weight_of_blocks(format: BlockFormat, blocks: np.ndarray) -> Weight:
    shape = (blocks.shape[0], blocks.shape[1] * format.elements)
    return Weight("w", shape, format, lambda rows: iter([{"blocks": blocks}]))


@pytest.mark.parametrize("format", [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, MXFP4_BLOCKS, NVFP4_BLOCKS])
@given(data=st.data())
def test_recoding_to_mlx_keeps_what_it_says(format: BlockFormat, data: st.DataObject) -> None:
    blocks = data.draw(arrays(np.uint8, (2, 2, format.nbytes)))
    weight = weight_of_blocks(format, blocks)
    before = format.decode({"blocks": blocks})
    for form in candidates(format, "mlx", expert=False):
        parts = recode(format, {"blocks": blocks}, form)
        kept = keeps(weight, form)
        after = form.decode(parts)
        if kept is Kept.BITS and format is not MXFP4_BLOCKS:
            np.testing.assert_array_equal(after.view(np.uint32), before.view(np.uint32))
        elif kept:
            np.testing.assert_array_equal(after, before)
        else:
            assert compare(before, after) is Kept.NOT
        if form in candidates(format, "mlx", expert=False)[:1] and kept and format.name[-2:] != "_K":
            np.testing.assert_array_equal(format.decode(recode(form, parts, format)), before)


@given(blocks=arrays(np.uint8, (3, 2, 17)))
def test_mxfp4_goes_to_adjacent_nibbles_and_back_byte_for_byte(blocks: np.ndarray) -> None:
    there = recode(MXFP4_BLOCKS, {"blocks": blocks}, MXFP4)
    np.testing.assert_array_equal(MXFP4.decode(there), MXFP4_BLOCKS.decode({"blocks": blocks}))
    np.testing.assert_array_equal(recode(MXFP4, there, MXFP4_BLOCKS)["blocks"], blocks)


def test_a_pair_without_recoding_is_an_error() -> None:
    with pytest.raises(ValueError, match="no recoding from Q8_0 to MXFP4"):
        recode(Q8_0, {"blocks": np.zeros((1, 1, 34), np.uint8)}, MXFP4)
