"""The pytest plugin: a `golden` fixture. pytest imports this at every start, so nothing heavy is imported here."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from assay.golden.fixture import GoldenFixture

RECORDED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("golden", "golden activations (assay)")
    group.addoption(
        "--golden-update",
        action="store_true",
        help="record every golden anew by the oracle before it is checked against",
    )
    group.addoption(
        "--golden-missing",
        choices=("record", "fail"),
        help="a test without its golden: record it by the oracle, or fail; default: fail where CI is set, else record",
    )
    group.addoption(
        "--golden-report-dir",
        metavar="DIR",
        help="where the HTML report of a failed check goes; default: the test run's temporary folder",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDED] = []


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> "GoldenFixture":
    """Check an engine, or taps that it dumped, against a golden beside the test: `golden.check(...)`."""
    from assay.golden.fixture import GoldenFixture

    option = request.config.getoption
    folder = option("--golden-report-dir")

    def reports() -> Path:
        return Path(folder) if folder else request.getfixturevalue("tmp_path_factory").mktemp("golden-reports")

    missing = option("--golden-missing") or ("fail" if _in_ci() else "record")
    return GoldenFixture(
        request.node, reports, option("--golden-update"), missing == "record", request.config.stash[RECORDED]
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Goldens that this run wrote: they are to be looked at, and committed."""
    if config.stash[RECORDED]:
        terminalreporter.section("goldens recorded by assay")
        for path in config.stash[RECORDED]:
            terminalreporter.write_line(path)


def _in_ci() -> bool:
    """Whether this runs unattended, as CI services say it."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")
