"""The catalogue's records, and that a replay without a mistake is the oracle."""

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.errors import GoldenError
from assay.golden.mistakes import CATALOGUE, FAMILIES, mistake_named
from assay.golden.mistakes.replay import STEPS, Replay, Run
from assay.golden.noise import PROFILES
from assay.golden.record import record
from assay.reference.taps import tap_table
from tests.checkpoint_files import opened, tokens_of

MODELS = ("gpt_oss/hf", "llama/hf", "mistral/hf", "phi3/hf")


@pytest.mark.parametrize("chunks", [(40,), (17, 1, 22)])
@pytest.mark.parametrize("name", MODELS)
def test_a_replay_without_a_mistake_is_the_oracle(name: str, chunks: tuple[int, ...]) -> None:
    checkpoint = opened(name)
    tokens = tokens_of(name.split("/")[0])[:40]
    golden = record(checkpoint, open_backend("reference", checkpoint), tokens, chunks=chunks, taps="*")
    honest = lambda recipe: recipe  # noqa: E731
    forced = Replay(Run(checkpoint, tokens, list(chunks), golden.taps), honest, PROFILES["float64"])
    for tap, values in golden.taps.items():
        np.testing.assert_allclose(forced.value(tap), values, rtol=1e-10, atol=1e-12)
    assert forced.computed == set(golden.taps)  # each by its own step alone
    free = Replay(Run(checkpoint, tokens, list(chunks), {}), honest, PROFILES["float64"])
    np.testing.assert_allclose(free.value("logits"), golden.taps["logits"], rtol=1e-10, atol=1e-12)
    assert free.computed == set(tap_table(checkpoint.config))


def test_ids_are_unique_and_taps_exist() -> None:
    assert len(CATALOGUE) == sum(map(len, FAMILIES.values())) >= 40
    for mistake in CATALOGUE.values():
        assert mistake.taps
        assert set(mistake.taps) <= set(STEPS)
        assert mistake.title
        assert mistake.explanation.endswith(".")
        assert mistake.advice


def test_every_mistake_acts_on_some_checkpoint() -> None:
    idle = [id for id, mistake in CATALOGUE.items() if not any(mistake.acts(opened(name)) for name in MODELS)]
    # these need square or biased matrices, or three experts a token, which the small checkpoints do not have
    known = ("transposed", "bias-missing", "bias-twice", "expert-weights-next-slot")
    assert [id for id in idle if not id.endswith(known)] == []


def test_an_unknown_id_lists_the_near_ones() -> None:
    with pytest.raises(GoldenError, match="sinks-missing"):
        mistake_named("sink-missing")
