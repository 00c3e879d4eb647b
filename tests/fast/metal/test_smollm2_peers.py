"""SmolLM2-135M-Instruct (Q4_1) through MLX: the check passes, and greedy decoding gives the oracle's tokens."""

from itertools import islice

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.check import check
from assay.golden.noise import profile_named
from assay.golden.record import record
from assay.loaders import Checkpoint
from tests.test_smollm2_peers import checkpoint, gguf_file, oracle_greedy

pytestmark = pytest.mark.peers
__all__ = ["checkpoint", "gguf_file"]  # fixtures
PROMPT = "In 1969, the first"


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
def test_check(checkpoint: Checkpoint, mode: str, capsys) -> None:
    """Every tap, and nothing had to be decoded."""
    tokens = checkpoint.tokenizer.encode(PROMPT).ids
    backend = open_backend("metal", checkpoint, mode)
    golden = record(checkpoint, open_backend("reference", checkpoint), tokens, chunks=[len(tokens) - 1, 1])
    taps = backend.run(tokens, golden.provenance.chunks, golden.provenance.taps)
    report = check(golden, checkpoint, taps, "metal", profile_named(backend.profile))
    assert (report.verdict, report.not_supplied) == ("match", [])
    assert capsys.readouterr().err == ""


def test_greedy_equals_the_oracle(checkpoint: Checkpoint) -> None:
    from assay.fast.metal import MetalModel

    ids = checkpoint.tokenizer.encode(PROMPT).ids
    expected, model = oracle_greedy(checkpoint, ids), MetalModel(checkpoint.config, checkpoint.tensors)
    assert list(islice(model.greedy(np.array(ids)), len(expected))) == expected
