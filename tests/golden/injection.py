"""Running the command line on transformers models with a mistake in them.

A mistake is made in transformers itself: in the loaded model's parameters and attributes, or in functions and
classes of its module. It takes the model, and pytest's `MonkeyPatch` for what is not the model's own. Nothing
of assay is changed. Peers are imported where they are used.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.cli.main import main

Apply = Callable[[Any, pytest.MonkeyPatch], None]
BOTH = ("float32", "bfloat16")
FLOAT32 = ("float32",)


@dataclass(frozen=True)
class Mistake:
    """What is done, the tap where it first acts, and on how many tokens it shows: on fewer nothing differs.

    `modes` are those it shows in: to round to bfloat16 is no mistake in bfloat16.
    """

    apply: Apply
    tap: str
    needs: int = 1
    modes: tuple[str, ...] = BOTH

    @property
    def name(self) -> str:
        return self.apply.__name__


def modeling(model: Any) -> Any:
    """The module of transformers that the model's class comes from."""
    return sys.modules[type(model).__module__]


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def experts(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


def norms(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def inject(mistake: Apply, patch: pytest.MonkeyPatch, with_weights: bool = False) -> None:
    """Let the transformers backend get its models with a mistake in them, until the patch is undone.

    It hands its weights over only `with_weights`: what is wrong in them is to be found at its tap otherwise.
    """
    from assay.golden.backends import hf

    load = hf._load
    if not with_weights:
        patch.delattr(hf.TransformersBackend, "weights", raising=False)

    def broken(*arguments: Any) -> Any:
        model = load(*arguments)
        mistake(model, patch)
        return model

    patch.setattr(hf, "_load", broken)


def assay(*arguments: object) -> int:
    """The exit status of the command line, run in this process."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return int(exit.value.code or 0)


def record(checkpoint: Path, golden: Path, tokens: list[int], *options: object) -> Path:
    """A golden of the oracle, by `assay record`."""
    listed = ",".join(map(str, tokens))
    assert assay("record", checkpoint, "--tokens", listed, "--out", golden, *options) == 0
    return golden


def check(golden: Path, mode: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report of `assay check --backend transformers`."""
    report = golden.with_suffix(".json")
    report.unlink(missing_ok=True)
    status = assay("check", golden, "--backend", "transformers", "--mode", mode, "--json", report)
    return status, json.loads(report.read_text())


def diverging(report: dict[str, Any]) -> set[str]:
    """The kinds of tap, names without their layer, that are out of their allowance."""
    return {tap["tap"].rsplit(".", 1)[-1] for tap in report["taps"] if tap["verdict"] == "diverges"}


def random_tokens(T: int, seed: int = 0) -> list[int]:
    """T token ids of the tiny vocabularies, none of them special."""
    return np.random.default_rng(seed).integers(8, 384, T).tolist()


def shrink_embedding(directory: Path, token: int, factor: float) -> None:
    """Scale one token's row of a checkpoint's embedding, in the file."""
    from safetensors.torch import load_file, save_file

    name = "model.embed_tokens.weight"
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][token] *= factor
            save_file(tensors, path, metadata={"format": "pt"})
