"""Outside encoders on values that are not all benign: ties, zeros of both signs, sparse groups, wide ranges.

Each answers how many groups differ and how many were judged. The magnitudes stay where ggml's C and MLX are
defined; what lies beyond is in docs/encodings.md, "Encoders' exceptions", and in test_encode_ggml.py.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from assay.loaders.gguf_file import GGML_TYPES
from assay.loaders.quantise import encode
from assay.reference.formats import MLX_BITS, MLX_MODES
from assay.reference.formats.encode_ggml import GGML_ENCODERS
from tests.reference.formats import libggml

COLUMNS = 256


def samples(rows: int, seed: int = 3) -> np.ndarray:
    """float32 [rows, 256] in five parts: normal, on a coarse grid, zeros, sparse, heavy-tailed."""
    rng = np.random.default_rng(seed)
    scale = 2.0 ** rng.integers(-24, 8, (rows, 1))
    normal = rng.normal(size=(rows, COLUMNS))
    kind = rng.choice(5, (rows, 1), p=(0.4, 0.25, 0.02, 0.13, 0.2))
    grid = np.round(normal * 8) / 4
    sparse = normal * (rng.random((rows, COLUMNS)) < 0.05)
    heavy = np.sign(normal) * np.exp(np.clip(normal * 3, -9, 9))
    values = np.select([kind == k for k in range(5)], [normal, grid, normal * 0, sparse, heavy]) * scale
    return np.clip(values, -6e4, 6e4).astype(np.float32)


def _pieces(groups: int, group: int) -> list[np.ndarray]:
    rows = -(-groups * group // COLUMNS)
    return [samples(min(20_000, rows - start), seed=start) for start in range(0, rows, 20_000)]


def ggml(name: str, groups: int) -> tuple[int, int]:
    """`ggml_quantize_chunk` without an importance matrix."""
    wrong = judged = 0
    for values in _pieces(groups, GGML_TYPES[libggml.NUMBERS[name]].elements):
        ours, theirs = GGML_ENCODERS[name](values), libggml.quantize(name, values)
        wrong, judged = wrong + int((ours != theirs).any(axis=-1).sum()), judged + ours[..., 0].size
    return wrong, judged


def _mx_quantize(values: np.ndarray, dtype: str, **settings: object) -> list[np.ndarray]:
    import mlx.core as mx

    parts = mx.quantize(mx.array(values).astype(getattr(mx, dtype)), **settings)
    return [np.array(part.view(mx.uint16) if part.dtype == mx.bfloat16 else part) for part in parts]


def mlx_mode(mode: str, groups: int) -> tuple[int, int]:
    """mx.quantize's mxfp4, mxfp8 and nvfp4 on the CPU."""
    format = MLX_MODES[mode]
    wrong = judged = 0
    for values in _pieces(groups, format.group):
        ours = encode(values, f"MLX {mode}")
        codes, scales = _mx_quantize(values, "float32", group_size=format.group, bits=format.element.bits, mode=mode)
        differ = (codes.view(np.uint8).reshape(ours["blocks"].shape) != ours["blocks"]).any(axis=-1)
        differ |= scales != ours["scales"]
        wrong, judged = wrong + int(differ.sum()), judged + differ.size
    return wrong, judged


def mlx_affine(bits: int, group: int, stored: str, groups: int) -> tuple[int, int]:
    """mx.quantize's affine mode, of input in the dtype of the scales."""
    import mlx.core as mx

    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[stored]
    name = f"affine{bits}/{group}" + ("" if stored == "BF16" else f" {stored}")
    wrong = judged = 0
    for values in _pieces(groups, group):
        rounded = np.array(mx.array(values).astype(getattr(mx, dtype)).astype(mx.float32))
        ours = encode(rounded, name)
        theirs = _mx_quantize(rounded, dtype, group_size=group, bits=bits)
        shape = (*ours["scales"].shape, -1)
        differ = np.zeros(shape[:-1], bool)
        for mine, other in zip(ours.values(), theirs, strict=True):
            pair = [np.ascontiguousarray(part).view(np.uint8).reshape(shape) for part in (mine, other)]
            differ |= (pair[0] != pair[1]).any(axis=-1)
        wrong, judged = wrong + int(differ.sum()), judged + differ.size
    return wrong, judged


ENCODING_WITNESSES: dict[str, Callable[[int], tuple[int, int]]] = {
    **{f"{name} libggml": partial(ggml, name) for name in GGML_ENCODERS},
    **{f"{mode} mlx": partial(mlx_mode, mode) for mode in MLX_MODES},
    **{
        f"affine{bits}/{group} {stored} mlx": partial(mlx_affine, bits, group, stored)
        for bits in MLX_BITS
        for group in (32, 64, 128)
        for stored in ("F32", "F16", "BF16")
    },
}
