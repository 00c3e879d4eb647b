"""ggml's own decoders and encoders, through ctypes, from the library in the llama-cpp-python wheel."""

import ctypes
import functools
from pathlib import Path

import numpy as np

from assay.loaders.gguf_file import GGML_TYPES

NUMBERS = {type.name: number for number, type in GGML_TYPES.items()}


@functools.cache
def library(name: str = "ggml-base") -> ctypes.CDLL:
    """libggml-base, which holds every conversion, or another one beside it."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    (path,) = (p for p in folder.iterdir() if p.name in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll"))
    return ctypes.CDLL(str(path))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def dequantize(name: str, blocks: np.ndarray) -> np.ndarray:
    """`dequantize_row_*` of blocks uint8 [n, nbytes]: float32 [n, elements]."""
    type = GGML_TYPES[NUMBERS[name]]
    blocks = np.ascontiguousarray(blocks)
    assert blocks.shape[1:] == (type.nbytes,)
    values = np.empty((len(blocks), type.elements), np.float32)
    suffix = name.lower().replace("_k", "_K")
    getattr(library(), f"dequantize_row_{suffix}")(_pointer(blocks), _pointer(values), ctypes.c_int64(values.size))
    return values


def quantize(name: str, values: np.ndarray) -> np.ndarray:
    """`ggml_quantize_chunk` of float32 [rows, I] without an importance matrix: uint8 [rows, n, nbytes]."""
    type = GGML_TYPES[NUMBERS[name]]
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    blocks = np.empty((rows, columns // type.elements, type.nbytes), np.uint8)
    chunk = library().ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    written = chunk(
        ctypes.c_int(NUMBERS[name]),
        _pointer(values),
        _pointer(blocks),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        None,
    )
    assert written == blocks.nbytes
    return blocks


def rounded(name: str, values: np.ndarray) -> np.ndarray:
    """float32 values [..., I] through the CPU backend's own `quantize_row_*`, which rounds activations, and back."""
    type = GGML_TYPES[NUMBERS[name]]
    values = np.ascontiguousarray(values, np.float32)
    blocks = np.empty((values.size // type.elements, type.nbytes), np.uint8)
    quantize_row = getattr(library("ggml-cpu"), f"quantize_row_{name.lower().replace('_k', '_K')}")
    quantize_row(_pointer(values), _pointer(blocks), ctypes.c_int64(values.size))
    return dequantize(name, blocks).reshape(values.shape)
