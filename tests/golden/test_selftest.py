"""The self-test: every mistake made in the Numba path is found at its tap and named; coverage says what cannot show."""

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.coverage import coverage
from assay.golden.errors import GoldenError
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.injections import INJECTIONS
from assay.golden.noise import PROFILES
from assay.golden.record import record
from assay.golden.selftest import selftest
from tests.checkpoint_files import opened, with_weight


@pytest.mark.parametrize(("name", "at_least"), [("gpt_oss/hf", 80), ("mistral/hf", 40)])
def test_every_mistake_is_found_and_named_in_float32(name: str, at_least: int) -> None:
    result = selftest(opened(name))
    assert result["clean"] == "match"
    assert result["injected"] >= at_least
    bad = [row for row in result["rows"] if not (row["found"] and row["right_tap"] and row["cause"] == row["id"])]
    assert bad == []


SOME = ("rope-neighbours", "sinks-twice", "clamp-missing")


@pytest.mark.parametrize("mode", ["bfloat16", "q8"])
def test_under_more_noise_they_are_found_and_named_too(mode: str) -> None:
    """A few: `python -m tests.golden.mistakes.matrix cpu` does all."""
    result = selftest(opened("gpt_oss/hf"), mode, only=SOME)
    assert (result["clean"], result["injected"], result["profile"]) == ("match", len(SOME), mode)
    assert (result["found"], result["right_tap"], result["named_alone"]) == (len(SOME),) * 3


def test_every_injection_is_of_a_mistake_in_the_catalogue() -> None:
    assert set(INJECTIONS) <= set(CATALOGUE)


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(GoldenError, match="float32, bfloat16, q8"):
        selftest(opened("gpt_oss/hf"), "int4")


def test_coverage_says_what_a_short_prompt_hides_and_gives_tokens_that_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.golden.coverage.LONGEST", 60)
    checkpoint = opened("gpt_oss/hf")
    engine = open_backend("reference", checkpoint)
    short = coverage(record(checkpoint, engine, [5, 9, 3]), checkpoint)
    hidden = {entry["id"]: entry["needs"] for entry in short["hidden"]}
    assert hidden["window-one-more"]["tokens"] == 13
    assert hidden["positions-restart"]["chunks"] == 2
    assert "sinks-missing" in short["visible"]
    suggestion = short["suggestion"]
    assert suggestion["tokens"][:3] == [5, 9, 3]
    assert len(suggestion["tokens"]) == suggestion["length"] == sum(suggestion["chunks"])
    assert {"window-one-more", "positions-restart", "cache-rolled"} <= set(suggestion["shows"]) <= set(hidden)
    again = coverage(record(checkpoint, engine, suggestion["tokens"], chunks=suggestion["chunks"]), checkpoint)
    assert set(again["visible"]) == {*short["visible"], *suggestion["shows"]}  # what it promises, it shows
    assert hidden["rope-positions-bfloat16"]["tokens"] == 258  # more than is suggested here


def test_the_token_whose_embedding_is_smallest_is_suggested_for_epsilon() -> None:
    checkpoint = with_weight(opened("gpt_oss/hf"), "model.embed_tokens.weight", shrink_row_17)
    golden = record(checkpoint, open_backend("reference", checkpoint), [5, 9, 3], chunks=[2, 1])
    result = coverage(golden, checkpoint, PROFILES["bfloat16"])
    assert "norm-epsilon-smaller" not in result["visible"]
    assert result["suggestion"]["tokens"][-1] == 17
    assert "norm-epsilon-smaller" in result["suggestion"]["shows"]


def shrink_row_17(w: np.ndarray) -> np.ndarray:
    w[17] /= 1000
    return w
