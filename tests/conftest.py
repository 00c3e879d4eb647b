"""Settings of every test: reproducible hypothesis runs, and in CI no skip that nobody sees."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

hypothesis.settings.register_profile("default", deadline=None)  # the first example may compile a kernel
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With ASSAY_NO_SKIP set, a skipped test has failed: CI must not pass for want of a peer."""
    report: pytest.TestReport = yield  # type: ignore[assignment, misc]
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("ASSAY_NO_SKIP"):
        report.outcome = "failed"
    return report  # type: ignore[return-value]
