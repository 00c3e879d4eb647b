"""Dumps that need no library to write: a folder of raw or npy files, and llama.cpp's log of its graph's nodes."""

import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from assay.golden.backends.llamacpp_nodes import taps_of_node
from assay.golden.errors import GoldenError
from assay.golden.store import WEIGHTS
from assay.reference.formats.floats import bfloat16_to_float32
from assay.reference.taps import AFTER_LAYERS, ATTENTION, BEFORE_LAYERS, DENSE, EXPERTS, OUTPUT, kind_of

INDEX = "index.json"
RAW_DTYPES = {
    **{name: np.dtype(name).newbyteorder("<") for name in ("float64", "float32", "float16", "int64", "int32", "uint8")},
    "bfloat16": np.dtype("<u2"),
}
ENTRY = '{"file": "x.bin", "dtype": "float32", "shape": [2, 3]}'

_Files = dict[str, tuple[Path, str, tuple[int, ...]]]  # by tensor: the file, its dtype, its shape


class _Folder(Mapping[str, np.ndarray]):
    """The tensors of a folder, read when asked for; 16-bit floats widened to float32."""

    def __init__(self, tensors: dict[str, tuple[Path, str, tuple[int, ...]]]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        path, dtype, shape = self._tensors[name]
        if path.suffix == ".npy":
            return _read_npy(path)
        array = np.fromfile(path, RAW_DTYPES[dtype]).reshape(shape)
        if dtype == "bfloat16":
            return bfloat16_to_float32(array)
        return array.astype(np.float32) if dtype == "float16" else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_folder(path: Path) -> tuple[Mapping[str, np.ndarray], dict[str, str], str]:
    """Tensors of a folder, its metadata, and the profile that its dtypes suggest.

    With an index.json, {"name": {"file", "dtype", "shape"}}, the files are raw little-endian values, the last
    axis fastest; `tokens` may be a list of ids there. Without one, every .npy file is a tensor of its name.
    Raises GoldenError for an entry that is not so, or a file of another size.
    """
    if not (path / INDEX).exists():
        files: _Files = {file.stem: (file, "", ()) for file in sorted(path.glob("*.npy"))}
        if not files:
            raise GoldenError("a folder with no dump in it", where=path, expected=f"{INDEX}, or .npy files")
        half = any(
            _read_npy(f).dtype == np.float16 for name, (f, _, _) in files.items() if not name.startswith(WEIGHTS)
        )
        return _Folder(files), {}, "float16" if half else "float32"
    try:
        index = json.loads((path / INDEX).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GoldenError(f"cannot be read: {error}", where=path / INDEX) from error
    if not isinstance(index, dict):
        raise GoldenError("not an index", where=path / INDEX, expected=f'{{"name": {ENTRY}, ...}}')
    metadata = {}
    if isinstance(index.get("tokens"), list):
        metadata["tokens"] = ",".join(map(str, index.pop("tokens")))
    tensors = {name: _entry(path, name, entry) for name, entry in index.items()}
    dtypes = {dtype for name, (_, dtype, _) in tensors.items() if not name.startswith(WEIGHTS)}
    profile = next((name for name in ("bfloat16", "float16") if name in dtypes), "float32")
    return _Folder(tensors), metadata, profile


def _entry(folder: Path, name: str, entry: Any) -> tuple[Path, str, tuple[int, ...]]:
    """File, dtype and shape of one tensor, the file's size checked against them."""
    where = f"{folder / INDEX}, {name!r}"
    if not isinstance(entry, dict) or not {"file", "dtype", "shape"} <= entry.keys():
        raise GoldenError("not an entry of an index", where=where, expected=ENTRY, got=str(entry)[:80])
    file, dtype, shape = entry["file"], entry["dtype"], entry["shape"]
    if not isinstance(file, str) or Path(file).name != file:
        raise GoldenError("a tensor's file lies beside the index", where=where, expected="a file name", got=file)
    if not isinstance(dtype, str) or dtype not in RAW_DTYPES:
        raise GoldenError("unknown dtype", where=where, expected=", ".join(RAW_DTYPES), got=dtype)
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise GoldenError("not a shape", where=where, expected="a list of positive integers", got=shape)
    path, nbytes = folder / file, prod(shape) * RAW_DTYPES[dtype].itemsize
    if not path.is_file() or path.stat().st_size != nbytes:
        got = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        raise GoldenError("a file that does not hold its tensor", where=path, expected=f"{nbytes} bytes", got=got)
    return path, dtype, tuple(shape)


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise GoldenError(f"not an npy file of plain values: {error}", where=path) from error


# `common_debug_cb_eval:   Qcur-0 = (f32)  ROPE(Qcur-0{..}, inp_pos{..}}) = {32, 4, 48, 1}`
_NODE = re.compile(r"^\S*:\s+(\S.*?) = \((\w+)\)\s+(\w+)\(.*\) = \{(\d+), (\d+), (\d+), (\d+)\}\s*$")
_NUMBER = re.compile(r"-?(?:nan|inf|\d+\.?(\d*)(?:[eE][-+]?\d+)?)")
DECIMALS = 6
# which of ggml's axes, fastest first, is T; attention matrices, padded to the cache, are not read
_SPECS = (*BEFORE_LAYERS, *ATTENTION, *DENSE, *EXPERTS, *OUTPUT, *AFTER_LAYERS)
_T_AXIS = {spec.name: len(spec.axes) - 1 for spec in _SPECS if not spec.heavy} | {"attn_heads": 1, "expert_weights": 2}


def read_callback_log(path: Path, is_phi3: bool = False) -> dict[str, np.ndarray]:
    """Taps from a log of llama.cpp's nodes in the form of its eval-callback, by assay's names.

    phi-3's fused products keep all that they hold, as `layers.0.q+k+v` and `layers.0.gate+up`.
    Of nodes that share a name each is known by its operation; in a log of several batches they follow one
    another along T. Towards the end of the graph llama.cpp goes on with only the rows whose logits it is asked for,
    as a rule the last one: such taps have fewer rows. Raises GoldenError where a tensor is not whole, or has fewer than
    `DECIMALS` decimals: as llama.cpp ships, it prints the first and last 3 of each axis with 4.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GoldenError(f"cannot be read: {error}", where=path) from error
    batches: dict[str, list[np.ndarray]] = {}
    starts = [n for n, line in enumerate(lines) if _NODE.match(line)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=False):
        match = _NODE.match(lines[start])
        assert match is not None
        name, operation = match[1], match[3]
        taps = taps_of_node(name, operation, is_phi3)
        if taps and kind_of(taps[0]) in _T_AXIS:
            tap = "+".join((taps[0], *(kind_of(other) for other in taps[1:])))
            shape = [int(n) for n in match.groups()[3:]]
            batches.setdefault(tap, []).append(_printed(path, start, name, tap, lines[start + 1 : end], shape))
    if not batches:
        raise GoldenError(
            "not a log of llama.cpp's nodes", where=path, expected="lines as its eval-callback prints them"
        )
    return {tap: np.concatenate(arrays) for tap, arrays in batches.items()}


def _printed(path: Path, line: int, name: str, tap: str, text: list[str], shape: list[int]) -> np.ndarray:
    """The values of one node, [T, the rest]."""
    where = f"{path}, line {line + 1}, {name!r}"
    remedy = "print every element with %.9g, or write a dump: docs/your-own-engine.md"
    body = [row for row in text if not row.lstrip().startswith("sum")]
    if any("..." in row for row in body):
        raise GoldenError("the log holds only the edges of this tensor", where=where, remedy=remedy)
    numbers = [match for row in body for match in _NUMBER.finditer(row)]
    if len(numbers) != prod(shape):
        raise GoldenError("not the whole tensor", where=where, expected=f"{prod(shape)} values", got=len(numbers))
    fractions = [len(match[1]) for match in numbers if match[1]]
    if fractions and max(fractions) < DECIMALS:
        raise GoldenError("too few digits to judge by", where=where, got=f"{max(fractions)} decimals", remedy=remedy)
    values = np.array([float(match[0]) for match in numbers])
    fused = "+" in tap
    return values.reshape(shape[1 if fused else _T_AXIS[kind_of(tap)]], -1)
