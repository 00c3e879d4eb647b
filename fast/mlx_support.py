"""Is there an MLX, and one that the metal path, or mlx-lm, can run on?"""

import re
from importlib import import_module

from assay.loaders.errors import CheckpointError

OLDEST = (0, 30)  # the first with every mode of `mx.quantize` that checkpoints come in
INSTALL = "pip install 'assay[metal]'"


def require_mlx(backend: str = "metal", install: str = INSTALL) -> None:
    """Raise CheckpointError, with what to install, where MLX is absent, without its library, or too old."""
    try:
        version: str = import_module("mlx.core").__version__
    except ImportError as error:
        raise CheckpointError(f"backend {backend!r} needs MLX", got=error, remedy=install) from error
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise CheckpointError(
            f"MLX {version} is not supported", expected=f"{oldest} or later", remedy=f"{install} --upgrade"
        )
