"""The self-test: every mistake made in the Numba path is found at its tap and named; coverage says what cannot show."""

import pytest

from assay.golden.backends import open_backend
from assay.golden.errors import GoldenError
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.injections import INJECTIONS
from assay.golden.record import record
from assay.golden.selftest import coverage, selftest
from tests.checkpoint_files import opened


@pytest.mark.parametrize(("name", "at_least"), [("gpt_oss/hf", 80), ("mistral/hf", 40)])
def test_every_mistake_is_found_and_named_in_float32(name: str, at_least: int) -> None:
    result = selftest(opened(name))
    assert result["clean"] == "match"
    assert result["injected"] >= at_least
    bad = [row for row in result["rows"] if not (row["found"] and row["right_tap"] and row["cause"] == row["id"])]
    assert bad == []


def test_every_injection_is_of_a_mistake_in_the_catalogue() -> None:
    assert set(INJECTIONS) <= set(CATALOGUE)


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(GoldenError, match="float32, bfloat16"):
        selftest(opened("gpt_oss/hf"), "int4")


def test_coverage_says_what_a_short_prompt_hides_and_what_would_show_it() -> None:
    checkpoint = opened("gpt_oss/hf")
    engine = open_backend("reference", checkpoint)
    short = coverage(record(checkpoint, engine, [5, 9, 3]), checkpoint)
    hidden = {entry["id"]: entry["needs"] for entry in short["hidden"]}
    assert hidden["window-one-more"]["tokens"] == 13
    assert hidden["positions-restart"]["chunks"] == 2
    assert "sinks-missing" in short["visible"]
    first, one, rest = short["suggestion"]["chunks"]
    assert (one, first + one + rest) == (1, short["suggestion"]["tokens"])
    assert short["suggestion"]["tokens"] >= 13
    tokens = [(7 * t) % 320 for t in range(40)]
    longer = coverage(record(checkpoint, engine, tokens, chunks=[20, 1, 19]), checkpoint)
    assert {"window-one-more", "positions-restart", "cache-rolled"} <= set(longer["visible"])
