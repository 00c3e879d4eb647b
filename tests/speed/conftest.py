"""What the suites share: the machine's limits, measured once a run, and models. `--benchmark-disable` is quick mode.

In quick mode everything runs once, on small sizes, and is checked, not timed: `make bench-once`.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from assay.fast.cpu import CpuModel
from assay.loaders import Checkpoint, open_checkpoint
from assay.loaders.registry import find_shape
from assay.loaders.synth import synth
from tests.checkpoint_files import CHECKPOINTS
from tests.speed.limits import Limits, measure

collect_ignore_glob = [] if find_spec("mlx") else ["test_metal.py"]

# what `checkpoint` opens in a timed run: name of the shape, layers, encoder of the matrices outside experts
SYNTHETIC = {
    "gpt-oss-20b, 2 layers": ("gpt-oss-20b", 2, None),
    "smollm2-135m": ("smollm2-135m", None, "Q4_1"),
}
SMALL = {"gpt-oss-20b, 2 layers": "gpt_oss/gguf", "smollm2-135m": "llama/gguf-q4_1"}  # and in quick mode

LIMITS, TIMED = pytest.StashKey[Limits](), pytest.StashKey[list[Any]]()

Time = Callable[..., Any]
Open = Callable[[str], Checkpoint]
Load = Callable[[str, str], CpuModel]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick mode leaves out what is nothing but its time."""
    if config.getoption("benchmark_disable"):
        kept = [item for item in items if "timed_only" not in item.keywords]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("benchmark_disable"))


@pytest.fixture(scope="session")
def limits(quick: bool, pytestconfig: pytest.Config) -> Limits:
    """Of this run; in quick mode nobody asks."""
    if quick:
        return Limits(1.0, 1.0, 1.0)
    pytestconfig.stash[LIMITS], pytestconfig.stash[TIMED] = measure(), []
    return pytestconfig.stash[LIMITS]


@pytest.fixture(scope="session")
def checkpoint(quick: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens a synthetic checkpoint by its name in `SYNTHETIC`, written at first use and deleted at the end."""
    folder, written = tmp_path_factory.mktemp("synthetic"), dict[str, Path]()

    def opened(name: str) -> Checkpoint:
        if quick:
            return open_checkpoint(CHECKPOINTS / SMALL[name])
        if name not in written:
            shape, layers, encoder = SYNTHETIC[name]
            written[name] = folder / f"{shape}-{layers}.gguf"
            synth(find_shape(shape), written[name], "gguf", layers=layers, encoder=encoder)
        return open_checkpoint(written[name])

    yield opened
    for path in written.values():
        path.unlink()


@pytest.fixture(scope="session")
def cpu_model(checkpoint: Open) -> Load:
    """A synthetic checkpoint in the CPU path: name, mode."""
    models: dict[tuple[str, str], CpuModel] = {}

    def loaded(name: str, mode: str) -> CpuModel:
        if (name, mode) not in models:
            opened = checkpoint(name)
            models[name, mode] = CpuModel(opened.config, opened.tensors, mode=mode)
        return models[name, mode]

    return loaded


@pytest.fixture
def time(benchmark: Any, limits: Limits, quick: bool, pytestconfig: pytest.Config) -> Time:
    """Runs work again and again, and notes what it means: see `timed`."""

    def timed(
        work: Callable[[], Any],
        *,
        nbytes: float = 0,
        operations: float = 0,
        quantised: bool = False,
        tokens: int = 0,
        seconds: float = 1.0,
        rounds: int | None = None,
        setup: Callable[[], Any] | None = None,
    ) -> Any:
        """The result of `work`, which reads `nbytes` and computes `operations`, on int8 if `quantised`.

        Notes GB/s, GOP/s and the share of the limit that binds: the least time that the machine's limits allow
        over the median. `rounds` None: as many as take about `seconds`.
        """
        if quick:
            return benchmark.pedantic(work, setup=setup)
        if rounds is None:
            rounds = _rounds(work, setup, seconds)
        result = benchmark.pedantic(work, setup=setup, rounds=rounds, iterations=1)
        pytestconfig.stash[TIMED].append(benchmark)
        median, note = benchmark.stats.stats.median, benchmark.extra_info
        if nbytes:
            note["GB/s"] = nbytes / median / 1e9
        if operations:
            note["GOP/s"] = operations / median / 1e9
        if tokens:
            note["tokens/s"] = tokens / median
        if nbytes or operations:
            note["share of limit"] = limits.seconds(nbytes, operations, quantised) / median
            rate = limits.int8 if quantised and limits.int8 else limits.float32
            note["bound by"] = "memory" if nbytes / limits.read > operations / rate else "arithmetic"
        return result

    return timed


def _rounds(work: Callable[[], Any], setup: Callable[[], Any] | None, seconds: float) -> int:
    """How many runs take so many seconds, from the second of two."""
    for _ in range(2):
        if setup is not None:
            setup()
        started = perf_counter()
        work()
        took = perf_counter() - started
    return max(5, min(1000, int(seconds / took)))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The limits, saved with the figures."""
    if LIMITS in config.stash:
        machine_info["limits"] = vars(config.stash[LIMITS])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The figures beside the limits: pytest-benchmark's own table has the times alone."""
    if LIMITS not in config.stash:
        return
    terminalreporter.section("speed, and the share of what the machine could do in this run")
    terminalreporter.write_line(str(config.stash[LIMITS]))
    for bench in config.stash[TIMED]:
        note = "  ".join(f"{key} {_figure(value)}" for key, value in bench.extra_info.items())
        terminalreporter.write_line(f"{1e3 * bench.stats.stats.median:10.3f} ms  {bench.name:66} {note}")


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
