"""Backends: whatever turns tokens into taps. Each module here adapts one; they are imported when asked for."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np

from assay.fast.engine import CPU_MODES
from assay.golden.errors import GoldenError
from assay.loaders.checkpoint import Checkpoint

Progress = Callable[[str], None] | None


def releasing(checkpoint: Checkpoint, progress: Progress) -> Callable[[str], None]:
    """A progress that also lets go of the weights of each layer that is done."""

    def computed(name: str) -> None:
        checkpoint.layer_done(name)
        if progress is not None:
            progress(name)

    return computed


class Backend(Protocol):
    """An engine with a checkpoint loaded.

    It may have a method `weights()` too, which answers the weights that it decoded, by canonical name: they are
    compared before any tap (golden/weights.py).
    """

    name: str
    profile: str  # a key of assay.golden.noise.PROFILES: how it computes by design
    versions: dict[str, str]

    def run(
        self, tokens: list[int], chunks: list[int], names: Collection[str], progress: Progress = None
    ) -> Mapping[str, np.ndarray]:
        """The named taps of the tokens, fed in chunks of the given lengths; those it does not expose are absent.

        `progress` is called with the name of each tap as it is computed.
        """
        ...


@dataclass(frozen=True)
class _Known:
    module: str
    modes: tuple[str, ...]  # the first is the default
    install: str = ""


KNOWN = {
    "reference": _Known("assay.golden.backends.reference", ("float64", "float32")),
    "cpu": _Known("assay.golden.backends.cpu", CPU_MODES),
    "metal": _Known("assay.golden.backends.metal", ("float32", "bfloat16"), "pip install 'assay[metal]'"),
    # its own dependencies hold MLX's library on macOS only
    "mlx-lm": _Known("assay.golden.backends.mlx_lm", ("float32", "bfloat16"), "pip install 'assay[metal,peers]'"),
    "transformers": _Known("assay.golden.backends.hf", ("float32", "bfloat16"), "pip install 'assay[peers]'"),
    "llama.cpp": _Known("assay.golden.backends.llamacpp", ("default", "float32"), "pip install 'assay[peers]'"),
    "openai-torch": _Known(
        "assay.golden.backends.openai_torch",
        ("bfloat16", "float32"),
        "pip install torch, then pip install --no-deps --ignore-requires-python gpt-oss",
    ),
}


def open_backend(name: str, checkpoint: Checkpoint, mode: str | None = None) -> Backend:
    """Load a checkpoint into a backend, ours or a plugin's; GoldenError if it is unknown, broken or not installed."""
    if name not in KNOWN:
        from assay.golden.backends.plugins import open_plugin, plugin_names

        registered = plugin_names()
        if name in registered:
            return open_plugin(name, checkpoint, mode)
        raise GoldenError(f"unknown backend {name!r}", expected=", ".join(dict.fromkeys([*KNOWN, *registered])))
    known = KNOWN[name]
    if mode is not None and mode not in known.modes:
        raise GoldenError(f"backend {name!r} has no mode {mode!r}", expected=", ".join(known.modes))
    try:
        opener: Callable[[Checkpoint, str], Backend] = import_module(known.module).open_backend
    except ModuleNotFoundError as error:
        raise GoldenError(
            f"backend {name!r} needs the package {error.name!r}", remedy=known.install or "install it"
        ) from error
    return opener(checkpoint, mode or known.modes[0])
