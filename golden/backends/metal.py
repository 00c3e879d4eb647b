"""The MLX path as a backend."""

import platform
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import version

import mlx.core as mx
import numpy as np

from assay.fast.metal import MetalModel
from assay.golden.backends import Progress
from assay.golden.backends.engines import run_engine
from assay.loaders.checkpoint import Checkpoint


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
