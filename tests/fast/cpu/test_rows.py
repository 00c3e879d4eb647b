"""The cast layer: what is used in place, what is copied, what is refused."""

import numpy as np
import pytest

from assay.fast.cpu.decode import decode_rows
from assay.fast.cpu.rows import encoded_rows
from assay.loaders.errors import CheckpointError
from assay.reference.formats import BF16, F32, MXFP4, Q8_0, AffineGroups
from assay.reference.weights import Tensor
from tests.fast.models import quantised_tensor


def decoded(tensor: Tensor) -> np.ndarray:
    """The tensor through the kernels."""
    rows = encoded_rows(tensor)
    return decode_rows(rows, np.arange(tensor.size // tensor.shape[-1])).reshape(tensor.shape)


def test_interleaved_rows_are_used_in_place():
    """Gate and up as the even and odd rows of one matrix: no copy, and the right rows."""
    whole = quantised_tensor(np.random.default_rng(1), "gate_up", (3, 10, 64), "MXFP4")
    for offset in (0, 1):
        parts = {key: part[:, offset::2] for key, part in whole.parts.items()}
        half = Tensor("half", (3, 5, 64), MXFP4, parts)
        assert np.shares_memory(encoded_rows(half).codes, whole.parts["blocks"])
        np.testing.assert_array_equal(decoded(half), whole.decode()[:, offset::2])


def test_permuted_rows_are_copied_in_order():
    """The RoPE permutation splits the row axis into [H, 2, C/2]: pairs become halves."""
    H, C = 3, 8
    stored = quantised_tensor(np.random.default_rng(2), "q", (H * C, 64), "Q8_0").parts["blocks"]
    blocks = stored.reshape(H, C // 2, 2, *stored.shape[1:]).swapaxes(1, 2)
    tensor = Tensor("q", (H * C, 64), Q8_0, {"blocks": blocks})
    order = np.concatenate([np.r_[0:C:2, 1:C:2] + h * C for h in range(H)])
    np.testing.assert_array_equal(decoded(tensor), Tensor("q", (H * C, 64), Q8_0, {"blocks": stored}).decode()[order])


def test_transposed_and_permuted_vectors():
    values = np.arange(24, dtype=np.float32)
    transposed = Tensor("w", (4, 6), F32, {"values": values.reshape(6, 4).T})
    np.testing.assert_array_equal(decoded(transposed), values.reshape(6, 4).T)
    bias = Tensor("b", (24,), F32, {"values": values.reshape(3, 4, 2).swapaxes(1, 2)})
    np.testing.assert_array_equal(decoded(bias), values.reshape(3, 4, 2).swapaxes(1, 2).ravel())


def test_unaligned_and_read_only_parts():
    """As a mapped file may give them."""
    raw = np.frombuffer(b"\0" + np.arange(6, dtype="<f4").tobytes(), np.uint8)
    values = raw[1:].view("<f4").reshape(2, 3)
    np.testing.assert_array_equal(decoded(Tensor("w", (2, 3), F32, {"values": values})), values)


class Unknown:
    name = "IQ1_S"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            Tensor("w", (2, 32), Unknown(), {"blocks": np.zeros((2, 1, 9), np.uint8)}),
            "no CPU kernel for encoding IQ1_S",
        ),
        (Tensor("w", (2, 64), Q8_0, {"blocks": np.zeros((2, 1, 34), np.uint8)}), "do not fit the shape"),
        (Tensor("w", (2, 33), Q8_0, {"blocks": np.zeros((2, 1, 34), np.uint8)}), "do not fit the shape"),
        (Tensor("w", (3, 4), BF16, {"values": np.zeros((2, 4), np.uint16)}), "do not fit the shape"),
        (Tensor("w", (2, 4), F32, {"values": np.zeros((2, 4), np.float64)}), "do not fit the shape"),
        (
            Tensor(
                "w", (2, 64), MXFP4, {"blocks": np.zeros((2, 2, 16), np.uint8), "scales": np.zeros((2, 1), np.uint8)}
            ),
            "do not fit the shape",
        ),
        (
            Tensor(
                "w",
                (1, 64),
                AffineGroups(8, 32, F32),
                {
                    "weight": np.zeros((1, 16), "<u4"),
                    "scales": np.ones((1, 3), "<f4"),
                    "biases": np.ones((1, 3), "<f4"),
                },
            ),
            "do not fit the shape",
        ),
    ],
)
def test_refused(tensor, message):
    """Kernels check no bounds: what does not fit must not reach them."""
    with pytest.raises(CheckpointError, match=message):
        encoded_rows(tensor)
