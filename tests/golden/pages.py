"""Checks with their details gathered, as pages: what the tests of the HTML report look at."""

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from assay.golden.check import Report, TapResult, check
from assay.golden.detail import Details
from assay.golden.html.page import about_of, write_page
from assay.golden.noise import profile_named
from assay.golden.store import Golden
from assay.loaders.checkpoint import Checkpoint
from assay.reference.taps import tap_table
from tests.checkpoint_files import opened
from tests.fast.models import gpt_oss_config
from tests.golden.faults import GPT_OSS, golden_of, taps_with

Fault = Callable[[np.ndarray], np.ndarray]
HOSTILE = "\"'><script>document.title = window.hacked = 1</script><img src=x onerror=alert(1)>"


def details_of(
    taps: dict[str, np.ndarray],
    golden: Golden | None = None,
    checkpoint: Checkpoint | None = None,
    backend: str = "my-engine",
    profile: str = "float32",
) -> tuple[Report, Details]:
    """The check of these taps; without a checkpoint end to end."""
    golden, judged_by = golden or golden_of(), profile_named(profile)
    layers = None if checkpoint is None else checkpoint.config.num_hidden_layers
    details = Details(golden.provenance.tokens, judged_by.unit_roundoff, layers)
    return check(golden, checkpoint, taps, backend, judged_by, observe=details), details


def page_with(path: Path, faults: dict[str, Fault], keep: str = "*") -> Path:
    """The page of a check of the oracle in float32 with these faults, of the taps that fit the glob `keep`."""
    taps = {n: a for n, a in taps_with(faults, dtype=np.float32).items() if fnmatchcase(n, keep)}
    checkpoint = opened(GPT_OSS)
    report, details = details_of(taps, checkpoint=checkpoint)
    write_page(path, report, details.taps, about_of(golden_of(), checkpoint))
    return path


def hostile_page(path: Path) -> Path:
    """A page all of whose names are markup, as a golden and a dump from elsewhere may have them."""
    recorded = golden_of()
    names = {"embed": "embed", "logits": HOSTILE, "layers.0.q": f"layers.0.{HOSTILE}"}
    theirs = {name: np.asarray(recorded.taps[tap]) for tap, name in names.items()}
    provenance = replace(recorded.provenance, taps=[*theirs], checkpoint=HOSTILE, backend=HOSTILE)
    golden = Golden(provenance, theirs)
    got = {name: array + 1.0 for name, array in theirs.items()}
    report, details = details_of(got, golden, None, HOSTILE)
    report.versions, report.reason = {HOSTILE: HOSTILE}, HOSTILE
    report.not_supplied = [HOSTILE]
    write_page(path, report, details.taps, about_of(golden, None))
    return path


def deep_page(path: Path) -> Path:
    """24 layers with all taps, those of attention included, and as many positions and channels as maps can show."""
    config = gpt_oss_config(layers=24)
    dims = config.dims | {"T": 64, "S": 64, "D": 64, "C": 64, "F": 64, "N": 64, "V": 64}
    rng = np.random.default_rng(0)
    details, results = Details([0] * dims["T"], 2.0**-24, 24), []
    for name, spec in tap_table(config).items():
        shape = tuple(dims[letter] for letter in spec.axes)
        expected = rng.integers(0, 4, shape) if spec.integer else rng.standard_normal(shape)
        got = expected if spec.integer else expected + 1e-7 * rng.standard_normal(shape)
        details(name, expected, got, got)
        results.append(TapResult(name, 1e-7, 0.1, 1e-7, 1.0, "match", None))
    report = Report("match", "forced", "my-engine", "float32", results, [], None, None)
    write_page(path, report, details.taps, {})
    return path
