"""Every layout against `reference.formats`, on any bytes at all: in NumPy's arithmetic, and as the code it emits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.fast.cpu.lanes import ROWS, fetched
from assay.fast.cpu.layouts import BIASED, LAYOUTS, OFFSET, UNIT
from assay.fast.cpu.products import CHUNK, decode_tile
from assay.fast.cpu.quantise import GRAINS
from assay.fast.cpu.rows import BLOCK, MXFP4_SPLIT, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, encoded_rows
from assay.reference import formats
from assay.reference.weights import Tensor

RECORDS = {
    MXFP4_SPLIT: formats.MXFP4_BLOCKS,
    Q8_0: formats.Q8_0,
    Q4_0: formats.Q4_0,
    Q4_1: formats.Q4_1,
    Q5_0: formats.Q5_0,
    Q5_1: formats.Q5_1,
    Q4_K: formats.Q4_K,
    Q5_K: formats.Q5_K,
    Q6_K: formats.Q6_K,
}


class NumPy:
    """`lanes.Arithmetic` on arrays of 32-bit words."""

    def number(self, x):
        return x.astype(np.float32)

    def signed(self, x):
        return x.astype(np.uint8).view(np.int8).astype(np.float32)

    def half(self, x):
        return x.astype(np.uint16).view(np.float16).astype(np.float32)

    def power_of_two(self, x):
        return np.where(x == 255, np.nan, np.exp2(x.astype(np.float64) - 127)).astype(np.float32)

    def look_up(self, table, x, shift):
        return np.frombuffer(table, np.uint8)[x.view(np.uint8) >> shift & 15].view(np.uint32)


def weights(kind, codes, scale, bias):
    """What codes [blocks, elements, rows], scales and biases [blocks, rows] stand for: [rows, elements]."""
    w = (codes.astype(np.float32) - OFFSET.get(kind, 0)) * np.float32(UNIT.get(kind, 1)) * scale[:, None]
    w = w if bias is None else w + bias[:, None]
    return w.reshape(-1, w.shape[-1]).T


def assert_same_weights(got, want):
    """Equal, or NaN both."""
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: RECORDS[kind].name)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_in_numpy(kind, data):
    layout, record = LAYOUTS[kind], RECORDS[kind]
    assert (layout.nbytes, record.elements) == BLOCK[kind]
    blocks = data.draw(arrays(np.uint8, (5, record.nbytes)))
    padded = np.pad(blocks, ((0, 0), (0, 4)), constant_values=0xEE)
    with np.errstate(all="ignore"):
        answer = layout.decode(lambda at: np.ascontiguousarray(padded[:, at : at + 4]).view("<u4")[:, 0], NumPy())
        codes = [np.stack(words).view(np.uint8).reshape(len(words), 5, 4).transpose(0, 2, 1) for words, _, _ in answer]
        scales = np.stack([scale for _, scale, _ in answer])
        biases = None if answer[0][2] is None else np.stack([bias for _, _, bias in answer])
        got = weights(kind, np.stack([c.reshape(-1, 5) for c in codes]), scales, biases)
        assert_same_weights(got, record.decode({"blocks": blocks[:, None]}).reshape(5, -1))


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: RECORDS[kind].name)
@pytest.mark.parametrize("count", [1, 5, 16])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_as_emitted(kind, count, data):
    """Tiles of 16 rows or fewer, whole units of blocks and what is left of one, from anywhere in a row."""
    record, begin, n = RECORDS[kind], 8, 8 if RECORDS[kind].elements == 256 else 7
    total = (begin + n) * 32 // record.elements + 1
    blocks = data.draw(arrays(np.uint8, (count + 2, total, record.nbytes)))
    tensor = Tensor("w", (count + 2, total * record.elements), record, {"blocks": blocks})
    codes, room = np.full(512 * CHUNK, 0xEE, np.uint8), 16 * CHUNK * GRAINS[kind]
    scales, biases = np.full(room, np.nan, np.float32), np.full(room, np.nan, np.float32)
    decode_tile(encoded_rows(tensor), 1, count, begin, n, codes, scales, biases)
    blocks_n = n * GRAINS[kind]
    codes = codes[: 512 * n].reshape(blocks_n, -1, ROWS, 4).transpose(0, 1, 3, 2).reshape(blocks_n, -1, ROWS)
    scales, biases = scales[: 16 * blocks_n].reshape(-1, 16), biases[: 16 * blocks_n].reshape(-1, 16)
    with np.errstate(all="ignore"):
        got = weights(kind, codes, scales, biases if kind in BIASED else None)
        want = tensor.decode()[1 : 1 + count, 32 * begin : 32 * (begin + n)]
        assert_same_weights(got, want[np.minimum(np.arange(ROWS), count - 1)])


@pytest.mark.parametrize("nbytes", [16, 17, 34, 68, 80, 144, 176, 210])
def test_what_is_fetched_covers_the_blocks_and_no_more(nbytes):
    covered = {at + i for at in fetched(nbytes) for i in range(16)}
    assert covered == set(range(nbytes))
