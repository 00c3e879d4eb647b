"""How much error a backend's arithmetic makes by design, measured on the very inputs that are checked.

A profile is a computing dtype of the oracle and a dtype that every tap is rounded to. Its noise at a tap is
the difference between the oracle run that way and the oracle in float64, both forced through the backend's
own values, so that it is the error of that one step.
"""

from dataclasses import dataclass

import numpy as np

from assay.golden.emulate_bfloat16 import MlxLmBfloat16, TransformersBfloat16
from assay.golden.emulate_llamacpp import LlamaCpp, LlamaCppFloat32
from assay.golden.emulate_q8 import Q8
from assay.golden.emulation import Emulation
from assay.golden.errors import GoldenError
from assay.golden.rounding import round_mantissa


@dataclass(frozen=True)
class Profile:
    """The numerics of a backend: `compute` is NumPy's dtype, `mantissa` the explicit bits a stored value keeps."""

    name: str
    compute: np.dtype
    mantissa: int
    deviations: tuple[str, ...] = ()  # ids of mistakes that the backend makes by design (see golden/mistakes)
    emulation: type[Emulation] = Emulation  # steps that are more than the oracle's with a rounding at the end

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of one rounding to nearest: 2^-(mantissa + 1)."""
        return 2.0 ** -(self.mantissa + 1)

    def round(self, name: str, array: np.ndarray) -> np.ndarray:
        """A tap: the array as this profile would store it."""
        if self.mantissa >= np.finfo(self.compute).nmant or not np.issubdtype(array.dtype, np.floating):
            return array
        return round_mantissa(array.astype(np.float32), self.mantissa).astype(self.compute)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("float64", np.dtype(np.float64), 52),
        Profile("float32", np.dtype(np.float32), 23),
        Profile("float16", np.dtype(np.float32), 10),
        Profile("bfloat16", np.dtype(np.float32), 7),
        Profile("q8", np.dtype(np.float32), 23, (), Q8),
        Profile("transformers-bfloat16", np.dtype(np.float32), 7, (), TransformersBfloat16),
        Profile("mlx-lm-float32", np.dtype(np.float32), 23, ("yarn-ramp-rounded",)),
        Profile("mlx-lm-bfloat16", np.dtype(np.float32), 7, ("yarn-ramp-rounded",), MlxLmBfloat16),
        Profile("llama.cpp", np.dtype(np.float32), 23, ("yarn-ramp-rounded",), LlamaCpp),
        Profile("llama.cpp-float32", np.dtype(np.float32), 23, ("yarn-ramp-rounded",), LlamaCppFloat32),
    )
}


def profile_named(name: str) -> Profile:
    """A profile by name; GoldenError lists the known ones."""
    if name not in PROFILES:
        raise GoldenError(f"unknown profile {name!r}", expected=", ".join(PROFILES))
    return PROFILES[name]
