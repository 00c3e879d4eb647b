"""Every encoder that has an original against it, bit for bit: ggml's C and mx.quantize."""

import pytest

from tests.reference.formats.compare import BLOCKS
from tests.reference.formats.encoding_witnesses import ENCODING_WITNESSES

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("name", ENCODING_WITNESSES)
def test_same_bits(name):
    wrong, judged = ENCODING_WITNESSES[name](BLOCKS)
    assert wrong == 0
    assert judged >= BLOCKS
