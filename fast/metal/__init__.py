"""The MLX path: Apple GPUs through Metal, or any CPU. Importing it imports MLX: do so where it is used.

Raises CheckpointError on import where MLX is absent or too old.
"""

from assay.fast.mlx_support import require_mlx

require_mlx()

from assay.fast.metal.cache import MetalCache  # noqa: E402
from assay.fast.metal.engine import MODES, MetalModel  # noqa: E402

__all__ = ["MODES", "MetalCache", "MetalModel"]
