"""The MLX path as a backend."""

import platform
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import version

import numpy as np

from assay.fast.mlx_support import require_mlx
from assay.golden.backends import Progress
from assay.golden.backends.engines import run_engine
from assay.loaders.checkpoint import Checkpoint

require_mlx()

import mlx.core as mx  # noqa: E402

from assay.fast.metal import MetalModel  # noqa: E402


class MetalBackend:
    """`assay.fast.metal` over a checkpoint's weights, on MLX's default device."""

    name = "metal"

    def __init__(self, checkpoint: Checkpoint, mode: str):
        on_cpu = mx.default_device().type == mx.cpu
        self.profile = f"metal-cpu-{mode}" if on_cpu else mode
        self.versions = {"mlx": version("mlx"), "device": f"{mx.default_device()} on {platform.machine()}"}
        self.model = MetalModel(checkpoint.config, checkpoint.tensors, mode)
        for notice in self.model.notices:
            print(f"assay: metal: {notice}", file=sys.stderr)

    def run(
        self, tokens: list[int], chunks: list[int], names: Collection[str], progress: Progress = None
    ) -> Mapping[str, np.ndarray]:
        return run_engine(self.model, tokens, chunks, names, progress)


open_backend = MetalBackend
