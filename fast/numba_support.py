"""Does Numba take what the environment tells it? It says no by a traceback, by a warning with one, or by a crash."""

import os
import warnings

from assay.loaders.errors import CheckpointError

MOST_THREADS = 8192  # tried; with 99999 libgomp overflows the stack


def require_numba() -> None:
    """Import Numba; raises CheckpointError where its settings in the environment are none."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Environment variable 'NUMBA_", RuntimeWarning)
            from numba.core import config
    except (ValueError, RuntimeWarning) as error:
        raise _refused(str(error).splitlines()[0]) from error
    if config.DISABLE_JIT:  # type: ignore[attr-defined]  # these are set while it is imported
        raise _refused("with NUMBA_DISABLE_JIT there are no kernels, which the cpu backend is made of")
    if config.NUMBA_NUM_THREADS > MOST_THREADS:  # type: ignore[attr-defined]
        raise _refused(f"more than {MOST_THREADS} threads")
    features = config.CPU_FEATURES or ""  # type: ignore[attr-defined]
    if any(feature[:1] not in "+-" for feature in features.split(",")):
        raise _refused("each of NUMBA_CPU_FEATURES begins with + or -")


def _refused(why: str) -> CheckpointError:
    found = ", ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_"))
    return CheckpointError(
        f"Numba cannot be used: {why}", where="environment", got=found, remedy="correct or unset what is wrong"
    )
