"""What `assay warmup` compiles is all that a model needs."""

import subprocess
import sys

COMPILED_LATER = """
import gc

import numpy as np
from numba.core.registry import CPUDispatcher

from assay.fast.cpu import CpuModel, warmup
from assay.fast.cpu.batch import forward_batch
from assay.golden.tiny_model import TINY
from assay.loaders import open_checkpoint


def compiled():
    functions = [function for function in gc.get_objects() if isinstance(function, CPUDispatcher)]
    return {(function.py_func.__name__, str(types)) for function in functions for types in function.overloads}


for step in warmup.steps():
    step()
before = compiled()
assert before
tiny = open_checkpoint(TINY)
for mode in ("exact", "q8"):
    model = CpuModel(tiny.config, tiny.tensors, mode=mode)
    caches = [model.new_cache(), model.new_cache()]
    for count in (100, 1, 4, 1):
        model.forward(np.zeros(count, np.int64), cache=caches[0])
    forward_batch(model, [np.zeros(3, np.int64), np.zeros(2, np.int64)], caches=caches)
print(compiled() - before)
"""


def test_nothing_is_compiled_after_it():
    """Prompts of many and few tokens, single tokens and batches, in both modes: no kernel of other types."""
    done = subprocess.run([sys.executable, "-c", COMPILED_LATER], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
