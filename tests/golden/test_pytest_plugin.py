"""The pytest plugin, as the author of an engine uses it: real test runs in folders of their own."""

import re
from pathlib import Path

import pytest

from assay.golden.store import load_golden
from tests.checkpoint_files import CHECKPOINTS, copied, tokens_of

pytest_plugins = ["pytester"]

MODEL = CHECKPOINTS / "gpt_oss/hf"
TOKENS = tokens_of("gpt_oss")[:12]
ENGINE = f"""
import numpy as np
import assay.reference as reference
from assay.loaders import open_checkpoint
from assay.reference.taps import Recorder, default_taps

MODEL, TOKENS = {str(MODEL)!r}, {TOKENS}

def engine(tokens, factor=1.0):
    model = open_checkpoint(MODEL).model(np.dtype(np.float32))
    recorder = Recorder(model.config, default_taps(model.config))
    def tap(name, array):
        return recorder(name, array * np.float32(factor) if name == "layers.1.attn_out" else array)
    reference.forward(model, np.array(tokens), cache=reference.KVCache(), tap=tap)
    return recorder.values

def broken(tokens):
    return engine(tokens, 1.001)
"""
TEST = "def test_engine(golden): golden.check(engine, model=MODEL, tokens=TOKENS)"


@pytest.fixture
def engine_tests(pytester, monkeypatch):
    """Write a test module, run it; CI is not set unless a test sets it."""
    monkeypatch.delenv("CI", raising=False)

    def run(test: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(test_mine=ENGINE + test)
        return pytester.runpytest("-p", "no:cacheprovider", *arguments)

    run.path = pytester.path
    return run


def goldens(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))


def output(result) -> str:
    return "\n".join(result.outlines)


# --- where goldens come from ---


def test_a_missing_golden_is_recorded_and_checked_against(engine_tests):
    result = engine_tests(TEST)
    result.assert_outcomes(passed=1)
    assert goldens(engine_tests.path) == ["test_mine/test_engine.safetensors"]
    golden = load_golden(engine_tests.path / "test_mine/test_engine.safetensors")
    assert (golden.provenance.tokens, golden.provenance.backend) == (TOKENS, "reference")
    result.stdout.fnmatch_lines(["*goldens recorded by assay*", "*test_mine/test_engine.safetensors"])
    again = engine_tests(TEST)
    again.assert_outcomes(passed=1)
    assert "goldens recorded" not in output(again)


def test_a_wrong_engine_fails_even_if_its_golden_is_new(engine_tests):
    """The golden is the oracle's: recording it does not bless what the engine does."""
    engine_tests(TEST.replace("engine,", "broken,")).assert_outcomes(failed=1)


@pytest.mark.parametrize(
    ("ci", "arguments", "outcome"),
    [
        ("true", [], "failed"),
        ("1", [], "failed"),
        ("false", [], "passed"),
        ("", [], "passed"),
        ("true", ["--golden-missing=record"], "passed"),
        ("", ["--golden-missing=fail"], "failed"),
        ("true", ["--golden-update"], "passed"),
    ],
)
def test_a_missing_golden_in_ci(engine_tests, monkeypatch, ci, arguments, outcome):
    monkeypatch.setenv("CI", ci)
    result = engine_tests(TEST, *arguments)
    result.assert_outcomes(**{outcome: 1})
    assert goldens(engine_tests.path) == ([] if outcome == "failed" else ["test_mine/test_engine.safetensors"])
    if outcome == "failed":
        assert "the golden is missing" in output(result)
        assert "another exception occurred" not in output(result)
        assert "--golden-update" in output(result)


def test_update_records_anew(engine_tests):
    engine_tests(TEST).assert_outcomes(passed=1)
    other = TEST.replace("tokens=TOKENS", "tokens=TOKENS[:5]")
    refused = engine_tests(other)
    refused.assert_outcomes(failed=1)
    assert "other tokens than the test has" in output(refused)
    assert "--golden-update" in output(refused)
    engine_tests(other, "--golden-update").assert_outcomes(passed=1)
    assert load_golden(engine_tests.path / "test_mine/test_engine.safetensors").provenance.tokens == TOKENS[:5]
    engine_tests(other).assert_outcomes(passed=1)


def test_update_keeps_what_the_test_does_not_say(engine_tests):
    first = (
        'def test_engine(golden): golden.check(engine, model=MODEL, tokens=TOKENS, chunks=[7, 1], taps="*block_out")'
    )
    engine_tests(first).assert_outcomes(passed=1)
    engine_tests("def test_engine(golden): golden.check(engine)", "--golden-update").assert_outcomes(passed=1)
    recorded = load_golden(engine_tests.path / "test_mine/test_engine.safetensors").provenance
    assert (recorded.tokens, recorded.chunks) == (TOKENS, [7, 1, 1, 1, 1, 1])
    assert recorded.taps == [f"layers.{i}.block_out" for i in range(3)]


def test_with_a_golden_at_hand_nothing_else_need_be_said(engine_tests):
    engine_tests(TEST).assert_outcomes(passed=1)
    engine_tests("def test_engine(golden): golden.check(engine)").assert_outcomes(passed=1)
    engine_tests("def test_engine(golden): golden.check(broken)").assert_outcomes(failed=1)


def test_a_prompt_is_encoded_by_the_checkpoint(engine_tests):
    test = 'def test_engine(golden): golden.check(engine, model=MODEL, prompt="Once the window has passed")'
    engine_tests(test).assert_outcomes(passed=1)
    engine_tests(test).assert_outcomes(passed=1)
    engine_tests(test.replace("Once", "When")).assert_outcomes(failed=1)


def test_a_path_by_argument_and_names_of_parameters(engine_tests):
    test = """
import pytest
@pytest.mark.parametrize("what", ["a/b", "../c d"])
def test_each(golden, what):
    golden.check(engine, model=MODEL, tokens=TOKENS, taps="logits")

def test_shared(golden):
    golden.check(engine, model=MODEL, tokens=TOKENS, taps="logits", path="shared/mine.safetensors")
"""
    engine_tests(test).assert_outcomes(passed=3)
    names = ["shared/mine.safetensors", "test_mine/test_each_.._c_d.safetensors", "test_mine/test_each_a_b.safetensors"]
    assert goldens(engine_tests.path) == names


WRONG = {
    "tokens=TOKENS": "give golden.check model",
    "model=MODEL": "give golden.check tokens or prompt",
    "model=MODEL, tokens=TOKENS, prompt='x'": "either tokens or prompt",
    "model='/nowhere', tokens=TOKENS": "/nowhere",
    "model=MODEL, tokens=[10**9]": "token outside the vocabulary",
    "model=MODEL, tokens=TOKENS, profile='int4'": "unknown profile 'int4'",
}


def test_what_cannot_be_checked_is_one_message(engine_tests):
    tests = (f"def test_{i}(golden): golden.check(engine, {arguments})\n" for i, arguments in enumerate(WRONG))
    result = engine_tests("".join(tests))
    result.assert_outcomes(failed=len(WRONG))
    for i, part in enumerate(WRONG.values()):
        (message,) = re.findall(rf"_ test_{i} _.*?(?=\n_|\n=)", output(result), re.S)
        assert part in message
    assert "Traceback" not in output(result)
    assert "fixture.py" not in output(result)


def test_other_chunks_and_another_model_are_refused(engine_tests, tmp_path):
    engine_tests(TEST).assert_outcomes(passed=1)
    result = engine_tests(TEST.replace("TOKENS)", "TOKENS, chunks=[3])"))
    assert "recorded in other chunks" in output(result)
    llama = str(CHECKPOINTS / "llama/hf")
    result = engine_tests(TEST.replace("model=MODEL", f"model={llama!r}"))
    result.assert_outcomes(failed=1)
    assert "recorded from another checkpoint" in output(result)


def test_without_the_checkpoint_the_check_is_end_to_end(engine_tests, tmp_path):
    copied("gpt_oss/hf", tmp_path / "model")
    there = str(tmp_path / "model")
    engine_tests(TEST.replace("model=MODEL", f"model={there!r}")).assert_outcomes(passed=1)
    (tmp_path / "model").rename(tmp_path / "moved")
    test = "def test_engine(golden): assert golden.check(engine, profile='bfloat16').scope == 'end-to-end'"
    engine_tests(test).assert_outcomes(passed=1)


# --- what is checked ---


def test_taps_and_dumps_instead_of_an_engine(engine_tests):
    test = """
import ml_dtypes

def test_taps(golden):
    report = golden.check({"out": engine(TOKENS)["logits"]}, model=MODEL, tokens=TOKENS, names="map.json")
    assert [(tap.tap, report.profile) for tap in report.taps] == [("logits", "float32")]

def test_dump(golden):
    np.savez("d.npz", **engine(TOKENS))
    golden.check("d.npz", model=MODEL, tokens=TOKENS)

def test_bfloat16(golden):
    taps = {"embed": engine(TOKENS)["embed"].astype(ml_dtypes.bfloat16)}
    assert golden.check(taps, model=MODEL, tokens=TOKENS).profile == "bfloat16"
"""
    (engine_tests.path / "map.json").write_text('{"out": "logits"}')
    engine_tests(test).assert_outcomes(passed=3)


NO_TAPS = {
    "lambda tokens: None": "no taps",
    "{'logits': 'abc'}": "does not hold real numbers",
    "{'logits': [[1.0, 2.0], [3.0]]}": "tap 'logits' is no array",
    "{'nothing': np.ones(3)}": "none of the taps",
}


def test_what_is_no_taps(engine_tests):
    calls = (f"golden.check({engine}, model=MODEL, tokens=TOKENS, path='g.safetensors')" for engine in NO_TAPS)
    result = engine_tests("".join(f"def test_{i}(golden): {call}\n" for i, call in enumerate(calls)))
    result.assert_outcomes(failed=len(NO_TAPS))
    for i, part in enumerate(NO_TAPS.values()):
        (message,) = re.findall(rf"_ test_{i} _.*?(?=\n_|\n=)", output(result), re.S)
        assert part in message


def test_an_engine_that_crashes_shows_its_own_traceback(engine_tests):
    result = engine_tests("def test_engine(golden): golden.check(lambda tokens: 1 / 0, model=MODEL, tokens=TOKENS)")
    result.assert_outcomes(failed=1)
    assert "ZeroDivisionError" in output(result)


# --- what a failure says ---


def test_a_failure_says_where_and_leaves_a_page(engine_tests):
    result = engine_tests(TEST.replace("engine,", "broken,"), "--golden-report-dir=pages", "--junit-xml=junit.xml")
    text = output(result)
    assert "first divergence: layers.1.attn_out" in text
    assert "fixture.py" not in text
    page = Path(re.search(r"HTML report: (.*\.html)", text)[1])
    assert page == engine_tests.path / "pages" / "test_mine.py_test_engine.html"
    assert "layers.1.attn_out" in page.read_text("utf-8")
    junit = (engine_tests.path / "junit.xml").read_text()
    assert f'<property name="golden_report" value="{page}"' in junit


def test_a_page_goes_to_the_temporary_folder_by_default(engine_tests, tmp_path):
    result = engine_tests(TEST.replace("engine,", "broken,"), f"--basetemp={tmp_path / 'base'}")
    page = Path(re.search(r"HTML report: (.*\.html)", output(result))[1])
    assert page.parent.parent == tmp_path / "base"
    assert page.exists()
    assert list(engine_tests.path.rglob("*.html")) == []


def test_a_clean_check_leaves_no_page(engine_tests):
    engine_tests(TEST, "--golden-report-dir=pages").assert_outcomes(passed=1)
    assert not (engine_tests.path / "pages").exists()


# --- what it costs those who do not use it ---


def test_pytest_starts_without_anything_heavy(pytester):
    pytester.makepyfile(
        """
        import sys
        def test_start(request):
            assert request.config.pluginmanager.has_plugin("assay")
            heavy = ("numpy", "numba", "rich", "jinja2", "assay.golden.check", "assay.reference")
            assert [name for name in heavy if name in sys.modules] == []
        """
    )
    # alone: other plugins of this environment may import what they like
    result = pytester.runpytest_subprocess("-p", "no:hypothesispytest", "-p", "no:benchmark", "-p", "no:anyio")
    result.assert_outcomes(passed=1)


def test_its_options_are_in_the_help(pytester):
    pytester.runpytest("--help").stdout.fnmatch_lines(
        ["*--golden-update*", "*--golden-missing=*", "*--golden-report-dir=*"]
    )
