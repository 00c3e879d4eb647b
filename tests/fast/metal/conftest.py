"""These tests import MLX, which is an extra: without it they are not collected (`make peers` has it)."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("mlx") else ["test_*.py"]
