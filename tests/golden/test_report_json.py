"""docs/report.schema.json against real reports of every kind, by a validator that is not ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from assay.golden.check import SCHEMA, check, incomparable_tokens
from assay.golden.noise import PROFILES
from assay.golden.reach import WORK
from tests.checkpoint_files import opened
from tests.golden.faults import golden_of, jolted, report_of, taps_with
from tests.golden.test_diagnose import taps_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "report.schema.json"
WRONG = "layers.1.attn_heads"


@pytest.fixture(scope="module")
def schema():
    return json.loads(DOCUMENT.read_text("utf-8"))


def nothing(taps):
    return np.where(np.arange(taps.shape[-1]) == 3, np.nan, taps)


def ids_of_others(ids):
    return (ids + 1) % 4


REPORTS = {
    "match": lambda: report_of(taps_with({})),
    "a named cause": lambda: check(*taps_of("yarn-ramp-rounded")),
    "a pair": lambda: check(*taps_of("sinks-twice", "heads-share-by-turns")),
    "by design": lambda: check(*taps_of("yarn-ramp-rounded")[:4], PROFILES["llama.cpp-float32"]),
    "no cause": lambda: report_of(taps_with({WRONG: jolted}), "float32"),
    "not finite": lambda: report_of(taps_with({}) | {WRONG: nothing(taps_with({})[WRONG])}),
    "wrong experts": lambda: report_of(taps_with({"layers.1.expert_ids": ids_of_others})),
    "few taps": lambda: report_of({"logits": taps_with({})["logits"]}, reach_work=WORK),
    "no taps": lambda: report_of({}),
    "dense": lambda: report_of(
        dict(golden_of("llama/hf").taps), golden=golden_of("llama/hf"), checkpoint=opened("llama/hf")
    ),
    "end to end": lambda: check(golden_of(), None, taps_with({WRONG: jolted}), "x", PROFILES["float32"]),
    "other tokens": lambda: incomparable_tokens(golden_of(), [1, 2], "x", PROFILES["float32"]),
}
VERDICTS = {
    **{"match": "match", "few taps": "match", "dense": "match", "by design": "known-deviation"},
    **{"no taps": "incomparable", "other tokens": "incomparable"},
}


def test_the_schema_is_one(schema):
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema"] == {**schema["properties"]["schema"], "const": SCHEMA}


@pytest.mark.parametrize("kind", REPORTS)
def test_a_real_report_is_as_documented(schema, kind):
    report = REPORTS[kind]().as_json()
    text = json.dumps(report, allow_nan=False)
    errors = [
        f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(json.loads(text))
    ]
    assert errors == []
    assert report["verdict"] == VERDICTS.get(kind, "diverges")
    assert (report["cause"] is not None) is (kind in ("a named cause", "a pair"))


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "fine"},
        {"scope": None},
        {"allowance": 0},
        {"schema": 2},
        {"taps": [{"tap": "embed"}]},
        {"logits": {"kl_nats": 0.0, "top1_agreement": 1.5, "regret_nats": 0.0}},
        {"something": 1},
        {"first_divergence": {"tap": "embed"}},
    ],
)
def test_the_schema_can_refuse(schema, change):
    report = REPORTS["match"]().as_json()
    assert Draft202012Validator(schema).is_valid(report)
    assert not Draft202012Validator(schema).is_valid(report | change)


def test_every_key_is_described(schema):
    described = schema["properties"] | schema["properties"]["taps"]["items"]["properties"]
    definitions = schema["$defs"]
    for key, value in described.items():
        at_all = "description" in value or "description" in definitions.get(
            value.get("$ref", "").rsplit("/", 1)[-1], {}
        )
        assert at_all or key in ("tap", "verdict", "worst_position"), key
    page = (DOCUMENT.parent / "report.md").read_text("utf-8")
    assert [key for key in schema["properties"] if key != "schema" and f"`{key}`" not in page] == []
