"""The oracle as a backend, in float64 or float32."""

from collections.abc import Collection, Mapping

import numpy as np

import assay.reference as reference
from assay.golden.backends import Progress, releasing
from assay.loaders.checkpoint import Checkpoint
from assay.reference.taps import Recorder


class ReferenceBackend:
    """`assay.reference.forward` over a checkpoint's weights."""

    name = "reference"

    def __init__(self, checkpoint: Checkpoint, mode: str):
        self.profile = mode
        self.versions = {"numpy": np.__version__}
        self.checkpoint, self.model = checkpoint, checkpoint.model(np.dtype(mode))

    def run(
        self, tokens: list[int], chunks: list[int], names: Collection[str], progress: Progress = None
    ) -> Mapping[str, np.ndarray]:
        recorder = Recorder(self.model.config, names, releasing(self.checkpoint, progress))
        cache, start = reference.KVCache(), 0
        for T in chunks:
            reference.forward(self.model, np.array(tokens[start : start + T]), cache=cache, tap=recorder)
            start += T
        return recorder.values


open_backend = ReferenceBackend
