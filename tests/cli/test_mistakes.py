"""assay mistakes: the whole list, one in full, and as JSON."""

import json

from assay.golden.mistakes import CATALOGUE
from tests.cli.run import refused, run


def test_the_list_has_every_mistake() -> None:
    text = run("mistakes").text
    assert [id for id in CATALOGUE if id not in text] == []
    assert f"{len(CATALOGUE)} mistakes" in text


def test_one_in_full() -> None:
    text = run("mistakes", "window-one-more").text
    for part in (
        "Window one key too wide",
        "129 tokens (gpt-oss-20b)",
        "mlx-lm #390",
        "distance < window",
        "attn_scores",
    ):
        assert part in text


def test_json_has_what_a_prompt_needs() -> None:
    listed = {entry["id"]: entry for entry in json.loads(run("mistakes", "--json", "-").out)}
    assert set(listed) == set(CATALOGUE)
    assert listed["positions-restart"]["needs"] == "2 tokens, a second chunk"
    assert listed["longrope-always-short"]["needs"] == "more tokens than the original context"
    assert listed["clamp-missing"]["needs"] == "gates or ups beyond swiglu_limit"
    assert listed["sinks-missing"]["needs"] == ""


def test_an_unknown_one_is_refused_with_the_near_ones() -> None:
    assert "sinks-missing" in refused("mistakes", "sink-missing")
