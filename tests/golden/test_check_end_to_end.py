"""A golden without its checkpoint: the end-to-end comparison, which says that it cannot tell where."""

import numpy as np
import pytest

from assay.golden.check import check
from assay.golden.errors import GoldenError
from assay.golden.noise import PROFILES
from assay.golden.store import load_golden, save_golden
from assay.reference.taps import default_taps
from tests.checkpoint_files import opened
from tests.golden.faults import GPT_OSS, diverging, golden_of, scaled, taps_with


def end_to_end(taps, profile: str = "float32"):
    return check(golden_of(), None, taps, "x", PROFILES[profile])


def test_end_to_end_of_a_clean_run():
    report = end_to_end(taps_with({}, dtype=np.float32))
    assert (report.verdict, report.scope) == ("match", "end-to-end")
    assert "local and inherited" in report.reason
    assert all(result.local_error is None for result in report.taps)
    assert report.logits["kl_nats"] == pytest.approx(0, abs=1e-9)


def test_end_to_end_of_a_fault_cannot_tell_where():
    report = end_to_end(taps_with({"layers.1.q": scaled(1.01)}))
    names = diverging(report)
    assert names[0] == "layers.1.q"
    assert {"layers.1.attn_heads", "layers.2.block_out", "logits"} <= set(names)
    assert not {"layers.0.block_out", "layers.1.k"} & set(names)


def test_end_to_end_with_a_golden_from_a_file_tells_the_first_in_the_order_of_computation(tmp_path):
    """A file has its tensors in an order of its own: the final norm would come before every layer."""
    save_golden(golden_of(), tmp_path / "g.safetensors")
    taps = taps_with({"layers.1.q": scaled(1.01)})
    report = check(load_golden(tmp_path / "g.safetensors"), None, taps, "x", PROFILES["float32"])
    assert report.first_divergence.tap == "layers.1.q"
    assert [result.tap for result in report.taps] == [t for t in default_taps(opened(GPT_OSS).config) if "ids" not in t]
    assert report.not_supplied == []


def test_end_to_end_refuses_what_does_not_fit():
    with pytest.raises(GoldenError, match="'logits' has the wrong shape"):
        end_to_end({"logits": np.ones((40, 3))})
    assert end_to_end({"other": np.ones(3)}).verdict == "incomparable"


def test_end_to_end_nan_diverges():
    taps = taps_with({})
    taps["embed"] = taps["embed"] * np.nan
    assert diverging(end_to_end(taps)) == ["embed"]
