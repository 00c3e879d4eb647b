"""Backends that other packages bring: entry points of the group `assay.backends`.

Each names a function `open_backend(checkpoint, mode)` that answers a `Backend`; `mode` is None unless --mode gives
one. Whatever goes wrong in it is said in one message that names the package and the line.
"""

import traceback
from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np

from assay.golden.backends import Backend, Progress
from assay.golden.errors import GoldenError
from assay.loaders.checkpoint import Checkpoint
from assay.loaders.errors import CheckpointError

GROUP = "assay.backends"
FAILURES = (Exception, SystemExit)  # a library that exits is a broken plugin too; Ctrl-C is not


def plugin_names() -> list[str]:
    """The names that installed packages register."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def open_plugin(name: str, checkpoint: Checkpoint, mode: str | None) -> Backend:
    """Load a checkpoint into a registered backend; GoldenError for a plugin that is broken, or two of the name."""
    points = tuple(entry_points(group=GROUP, name=name))
    if len({point.value for point in points}) > 1:
        raise GoldenError(
            f"several packages register a backend {name!r}",
            got=", ".join(_package(point) for point in points),
            remedy="uninstall all but one",
        )
    point = points[0]
    try:
        opener = point.load()
        if not callable(opener):
            raise TypeError(f"{point.value} is no function, but {type(opener).__name__}")
        backend = opener(checkpoint, mode)
    except CheckpointError:
        raise  # it says itself what is wrong with the request
    except FAILURES as error:
        raise _broken(point, "cannot be opened", error) from error
    return _Guarded(point, backend)


class _Guarded:
    """A plugin's backend, held to the protocol."""

    def __init__(self, point: EntryPoint, backend: Any):
        from assay.golden.noise import profile_named

        self._point, self._backend = point, backend
        for attribute in ("profile", "versions", "run"):
            if not hasattr(backend, attribute):
                raise _broken(point, "does not follow the protocol", AttributeError(f"it has no {attribute!r}"))
        self.name, self.profile = point.name, str(backend.profile)
        try:
            profile_named(self.profile)
            package = {} if point.dist is None else {point.dist.name: point.dist.version}
            self.versions = package | {str(name): str(version) for name, version in dict(backend.versions).items()}
        except (TypeError, ValueError) as error:
            raise _broken(point, "does not follow the protocol", error) from error

    def run(
        self, tokens: list[int], chunks: list[int], names: Collection[str], progress: Progress = None
    ) -> Mapping[str, np.ndarray]:
        try:
            taps = self._backend.run(tokens, chunks, names, progress)
            if not isinstance(taps, Mapping):
                raise TypeError(f"run answered {type(taps).__name__} and no mapping of names to arrays")
            return {str(name): np.asarray(array) for name, array in taps.items()}
        except CheckpointError:
            raise
        except FAILURES as error:
            raise _broken(self._point, "failed", error) from error


def _package(point: EntryPoint) -> str:
    return f"{point.value} of {point.dist.name} {point.dist.version}" if point.dist is not None else point.value


def _broken(point: EntryPoint, what: str, error: BaseException) -> GoldenError:
    frames = traceback.extract_tb(error.__traceback__)
    line = f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return GoldenError(
        f"the plugin of backend {point.name!r} {what}: {type(error).__name__}: {error}",
        where=f"{_package(point)}{line}",
    )
