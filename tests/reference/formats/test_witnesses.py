"""Every decoder against the outside witnesses of the default lane, on the vectors and on random blocks."""

import numpy as np
import pytest

from assay.golden.block_forms import BLOCK_FORMS
from tests.reference.formats.compare import BLOCKS
from tests.reference.formats.witnesses import ggml_library, gguf_py, mlx, transformers, with_ml_dtypes

HERE = [*gguf_py(), *with_ml_dtypes()]
PEERS = [*ggml_library(), *mlx(), *transformers()]


def label(witness) -> str:
    return f"{witness.form}-{witness.who}"


@pytest.mark.parametrize("witness", HERE, ids=label)
def test_same_bits(witness):
    wrong, judged = witness.mismatches(BLOCKS)
    assert wrong == 0
    assert judged > BLOCKS


@pytest.mark.peers
@pytest.mark.parametrize("witness", PEERS, ids=label)
def test_same_bits_as_a_peer(witness):
    wrong, judged = witness.mismatches(BLOCKS)
    assert wrong == 0
    assert judged > BLOCKS


def test_every_block_encoding_has_a_witness():
    judged = {witness.form for witness in (*HERE, *PEERS)}
    own_tests = {"MXINT8", "MXFP4_METAL", "F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
    assert set(BLOCK_FORMS) == judged | own_tests


def test_a_witness_sees_one_wrong_bit():
    (witness,) = (w for w in HERE if w.form == "Q4_K")
    spoilt = type(witness)(witness.who, witness.form, lambda b: np.nextafter(witness.decode(b), np.float32(0)))
    wrong, judged = spoilt.mismatches(100)
    assert wrong > judged / 2
