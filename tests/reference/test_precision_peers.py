"""ggml's roundings of activations against the code of its CPU backend, to the last bit."""

import platform

import numpy as np
import pytest

from assay.reference.precision import round_q8, round_q8_K
from tests.reference.formats import libggml
from tests.reference.formats.encoding_witnesses import samples

pytestmark = pytest.mark.peers


def test_q8_K():
    """The samples have ties, zeros, sparse blocks and wide ranges."""
    x = samples(4000)
    np.testing.assert_array_equal(round_q8_K(x), libggml.rounded("Q8_K", x))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="ggml rounds otherwise on other processors")
def test_q8_0():
    x = samples(4000)
    np.testing.assert_array_equal(round_q8(x), libggml.rounded("Q8_0", x))
