"""The Numba path as a backend."""

import sys
from collections.abc import Collection, Mapping
from importlib.metadata import version

import numpy as np

from assay.fast.cpu.engine import CpuModel
from assay.golden.backends import Progress, releasing
from assay.golden.backends.engines import run_engine
from assay.golden.errors import GoldenError
from assay.loaders.checkpoint import Checkpoint

PROFILES = {"exact": "float32", "q8": "q8", "exact-f16": "float32-f16-cache", "q8-f16": "q8-f16-cache"}


class CpuBackend:
    """`assay.fast.cpu` over a checkpoint's weights.

    Mode `exact` computes in float32 throughout; `q8` rounds the inputs of products with quantised weights to int8;
    `exact-f16` and `q8-f16` keep keys and values in float16.
    """

    name = "cpu"

    def __init__(self, checkpoint: Checkpoint, mode: str):
        self.versions = {"numba": version("numba"), "numpy": np.__version__}
        self.profile = PROFILES[mode]
        self.checkpoint = checkpoint
        try:
            self.model = CpuModel(checkpoint.config, checkpoint.tensors, mode=mode)
        except ValueError as error:  # Numba's too, of threads that it cannot have
            raise GoldenError(str(error)) from error
        for notice in self.model.notices:
            print(f"assay: cpu: {notice}", file=sys.stderr)

    def run(
        self, tokens: list[int], chunks: list[int], names: Collection[str], progress: Progress = None
    ) -> Mapping[str, np.ndarray]:
        return run_engine(self.model, tokens, chunks, names, releasing(self.checkpoint, progress))


open_backend = CpuBackend
