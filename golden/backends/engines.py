"""What the fast paths share as backends: an engine driven chunk by chunk with a recorder for a tap."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from assay.fast.engine import Engine
from assay.golden.backends import Progress
from assay.reference.taps import Recorder


def run_engine(
    engine: Engine[Any], tokens: list[int], chunks: list[int], names: Collection[str], progress: Progress
) -> Mapping[str, np.ndarray]:
    """The named taps of the tokens, fed to an engine in chunks of the given lengths, joined along T."""
    recorder = Recorder(engine.config, names, progress)
    cache, start = engine.new_cache(), 0
    for T in chunks:
        engine.forward(np.array(tokens[start : start + T]), cache=cache, tap=recorder)
        start += T
    return recorder.values
