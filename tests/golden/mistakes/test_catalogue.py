"""The catalogue's records, and that a replay without a mistake is the oracle."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from assay.golden import mistakes
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
    # these need square or biased matrices, three experts a token, or another limit than 7: no small checkpoint has them
    known = ("transposed", "bias-missing", "bias-twice", "expert-weights-next-slot", "clamp-at-seven")
    assert [id for id in idle if not id.endswith(known)] == []


def test_the_docs_have_a_row_for_each() -> None:
    text = (Path(__file__).parents[3] / "docs" / "mistakes.md").read_text()
    assert [id for id in CATALOGUE if f"| `{id}` |" not in text] == []


def test_an_unknown_id_lists_the_near_ones() -> None:
    with pytest.raises(GoldenError, match="sinks-missing"):
        mistake_named("sink-missing")


ONE_FILE = """
from assay.golden.mistakes.injecting import calls
from assay.golden.mistakes.mistake import Mistake
from assay.golden.mistakes.recipe import tap_changed

FAMILY = "of one's own"
MISTAKES = (
    Mistake("heads-halved", "Half", "Ours.", ("attn_heads",), tap_changed(lambda x: x / 2, "attn_heads"), "No."),
)


def injections():
    return {"heads-halved": calls("attend", lambda f, *arguments: f(*arguments) / 2)}
"""


def test_a_mistake_is_one_file_to_add(tmp_path: Path) -> None:
    """Beside the others: it is listed, injected into the Numba path, found and named, with nothing else touched."""
    root = tmp_path / "mistakes"
    shutil.copytree(Path(mistakes.__file__).parent, root)
    (root / "mine.py").write_text(ONE_FILE)
    code = f'''
import assay.golden, sys
import importlib.util
name, root = "assay.golden.mistakes", r"{root}"
spec = importlib.util.spec_from_file_location(name, root + "/__init__.py", submodule_search_locations=[root])
sys.modules["assay.golden.mistakes"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from assay.golden.mistakes.injections import INJECTIONS
from assay.golden.check import check
from assay.golden.noise import PROFILES
from assay.reference.taps import default_taps
from tests.golden.faults import golden_of, opened
golden, checkpoint = golden_of(), opened("gpt_oss/hf")
with INJECTIONS["heads-halved"].backend(checkpoint) as backend:
    taps = backend.run(golden.provenance.tokens, [40], default_taps(checkpoint.config))
report = check(golden, checkpoint, taps, "cpu", PROFILES["float32"])
print(module.FAMILIES["of one's own"][0].id, report.first_divergence.tap, report.cause["id"])
'''
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["heads-halved", "layers.0.attn_heads", "heads-halved"], ran.stderr
