"""Every decoder against the outside witnesses of the default lane, on the vectors and on random blocks."""

import re
from pathlib import Path

import numpy as np
import pytest

from assay.golden.block_forms import BLOCK_FORMS
from tests.reference.formats.compare import BLOCKS
from tests.reference.formats.witnesses import ggml_library, gguf_py, mlx, transformers, with_ml_dtypes

PAGE = (Path(__file__).parents[3] / "docs/encodings.md").read_text("utf-8")
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


IN_WORDS = {"gguf-py": "gguf-py", "libggml": "ggml's C library", "ml_dtypes": "ml_dtypes", "mlx": "MLX"}
NAMES = {"MXFP4 in GGUF": "MXFP4_GGUF", "NVFP4 in GGUF": "NVFP4_GGUF", "E2M1 under float16": "FP4_F16"}


def test_the_page_names_every_witness_of_every_encoding():
    """The table "Who judged which decoder" in docs/encodings.md, row by row."""
    table = PAGE.partition("## Who judged which decoder")[2].partition("\n## ")[0]
    said: dict[str, set[str]] = {}
    for encodings, witnesses in re.findall(r"^\| (.*?) \| (.*) \|$", table, re.MULTILINE):
        affine = [form for form in BLOCK_FORMS if form.startswith("AFFINE")] if encodings.startswith("affine") else []
        names = affine or [NAMES.get(name, name.replace(" ", "_")) for name in encodings.split(", ")]
        who = {name for name in ("transformers", *IN_WORDS) if IN_WORDS.get(name, name) in witnesses}
        said |= {name: who for name in names if name in BLOCK_FORMS and "codes under all" not in witnesses}
    judged: dict[str, set[str]] = {}
    for witness in (*HERE, *PEERS):
        judged.setdefault(witness.form, set()).add(witness.who.split(" ")[0])
    assert judged.items() <= said.items()
    assert said.keys() - judged.keys() <= {"F64", "F16", "BF16"}


def test_a_witness_sees_one_wrong_bit():
    (witness,) = (w for w in HERE if w.form == "Q4_K")
    spoilt = type(witness)(witness.who, witness.form, lambda b: np.nextafter(witness.decode(b), np.float32(0)))
    wrong, judged = spoilt.mismatches(100)
    assert wrong > judged / 2
