"""A golden without its checkpoint: the end-to-end comparison, which says that it cannot tell where."""

import numpy as np
import pytest

from assay.golden.check import check
from assay.golden.errors import GoldenError
from assay.golden.noise import PROFILES
from tests.golden.faults import diverging, golden_of, scaled, taps_with


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


def test_end_to_end_refuses_what_does_not_fit():
    with pytest.raises(GoldenError, match="'logits' has the wrong shape"):
        end_to_end({"logits": np.ones((40, 3))})
    assert end_to_end({"other": np.ones(3)}).verdict == "incomparable"


def test_end_to_end_nan_diverges():
    taps = taps_with({})
    taps["embed"] = taps["embed"] * np.nan
    assert diverging(end_to_end(taps)) == ["embed"]
