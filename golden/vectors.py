"""Blocks of each encoding, chosen to leave no case to luck, and the exact float32 values that they decode to.

All are made from stated sweeps and the raw stream of PCG64, which NumPy keeps stable, so that the files are the
same bytes everywhere. NaN is written as 0x7FC00000.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from assay.golden.block_forms import BLOCK_FORMS, BlockForm, Field
from assay.golden.errors import GoldenError
from assay.golden.store import replacing
from assay.reference.formats import MICROSCALED
from assay.reference.formats.packing import pack_codes, pack_split_half

SCHEMA = 1
NAN = np.uint32(0x7FC00000)
BYTES = np.arange(256, dtype=np.uint8)
Sweep = tuple[str, np.ndarray]  # what it covers, and the blocks uint8 [n, nbytes]


def vectors(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Blocks uint8 [n, nbytes] of an encoding of `BLOCK_FORMS` and their values, float32 [n, elements]."""
    form = BLOCK_FORMS[name]
    blocks = np.concatenate([part for _, part in sweeps(form)])
    values = form.decode(blocks)
    return blocks, np.where(np.isnan(values), NAN, values.view(np.uint32)).view(np.float32)


def write_vectors(folder: Path) -> list[dict[str, Any]]:
    """Write NAME.safetensors of every encoding and index.json; answers the index's entries.

    Each file is replaced whole or not at all. Raises GoldenError where writing fails.
    """
    from safetensors.numpy import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GoldenError(f"cannot be written: {error.strerror or error}", where=folder) from error
    entries = []
    for name, form in BLOCK_FORMS.items():
        blocks, expected = vectors(name)
        path = folder / f"{name}.safetensors"
        with replacing(path) as temporary:
            save_file({"blocks": blocks, "expected": expected}, temporary)
        entries.append(_entry(form, path, blocks))
    with replacing(folder / "index.json") as temporary:
        temporary.write_text(json.dumps({"schema": SCHEMA, "encodings": entries}, indent=1) + "\n")
    return entries


def _entry(form: BlockForm, path: Path, blocks: np.ndarray) -> dict[str, Any]:
    fields = [{"name": f.name, "offset": f.offset, "format": f.format.name} for f in form.fields]
    return {
        "name": form.name,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "blocks": len(blocks),
        "block_bytes": form.nbytes,
        "block_elements": form.elements,
        "layout": form.layout,
        "fields": fields,
        "built": [f"{len(part)} blocks: {what}" for what, part in sweeps(form)],
    }


def sweeps(form: BlockForm) -> Iterator[Sweep]:
    """The sets of blocks that make up an encoding's vectors."""
    if form.elements == 1:
        yield from _plain(form)
        return
    if pattern := _all_codes(form):
        yield pattern
    else:
        yield _scale_sweep(form)
    yield _byte_sweep(form)
    yield _extremes(form)
    if form.name in SUBSCALES:
        yield _subscales(form)
    yield "random bytes, scales included", _random(form, 256)


def _plain(form: BlockForm) -> Iterator[Sweep]:
    if form.nbytes <= 2:
        codes = np.arange(256**form.nbytes, dtype=np.uint32).astype(f"<u{form.nbytes}")
        yield "every code", codes.view(np.uint8).reshape(-1, form.nbytes)
        return
    edges = np.array([0, 1, 127, 128, 255], np.uint8)
    yield "edge values of the bytes in all combinations", _edge_bytes(form.nbytes, edges)
    yield "random bytes", _random(form, 4096)


def _edge_bytes(nbytes: int, edges: np.ndarray) -> np.ndarray:
    """The upper four bytes through all combinations of edges, the others zero or all ones."""
    upper = np.array(list(product(edges, repeat=4)), np.uint8)
    lower = [np.full((len(upper), nbytes - 4), fill, np.uint8) for fill in (0, 255)]
    return np.concatenate([np.concatenate((part, upper), axis=1) for part in lower])


def _random(form: BlockForm, n: int) -> np.ndarray:
    """Random blocks, seeded by the encoding's name."""
    raw = np.random.PCG64(zlib.crc32(form.name.encode())).random_raw(-(-n * form.nbytes // 8))
    return raw.astype("<u8").view(np.uint8)[: n * form.nbytes].reshape(n, form.nbytes).copy()


def _unit(field: Field) -> int:
    """The code of 1."""
    if field.nbytes == 4:
        return 0x3F800000
    codes = np.arange(2 ** (8 * field.nbytes))
    return int(np.flatnonzero(field.format.to_float32(field.stored(codes)) == 1)[0])


def _set_units(form: BlockForm, blocks: np.ndarray) -> np.ndarray:
    for field in form.fields:
        field.put(blocks, np.full(len(blocks), _unit(field)))
    return blocks


def _scale_codes(field: Field) -> np.ndarray:
    """Codes of a scale: all of 8 bits; else four mantissas under both signs and all exponents, of 8-bit ones some."""
    if field.nbytes == 1:
        return np.arange(256)
    exponent_bits = {"F16": 5, "BF16": 8, "F32": 8}[field.format.name]
    exponents = np.arange(32) if exponent_bits == 5 else np.unique([1, 2, 126, 127, 128, 254, 255, *range(0, 256, 8)])
    mantissa_bits = 8 * field.nbytes - 1 - exponent_bits
    mantissas = np.array([0, 1, 2 ** (mantissa_bits - 1), 2**mantissa_bits - 1])
    positive = (exponents[:, None] << mantissa_bits | mantissas).ravel()
    return np.concatenate((positive, positive | 1 << (8 * field.nbytes - 1)))


def _scale_sweep(form: BlockForm) -> Sweep:
    """Each field's scale codes in turn against random codes, the other field at 1."""
    every_half = form.name == "Q8_0"
    parts = []
    for field in form.fields:
        codes = np.arange(2**16) if every_half else _scale_codes(field)
        blocks = _set_units(form, _random(form, len(codes)))
        field.put(blocks, codes)
        parts.append(blocks)
    which = "all 65,536 codes" if every_half else "signs, exponents and four mantissas of each"
    return f"{' and '.join(f.name for f in form.fields)} through {which}, random elements", np.concatenate(parts)


def _byte_sweep(form: BlockForm) -> Sweep:
    """Each byte of the codes, sub-scales included, through all 256 values, under scales of 1."""
    blocks = BYTES[:, None] + (BYTES[0] + np.arange(form.nbytes) * 37).astype(np.uint8)
    return "every byte through 256 values, scales 1", _set_units(form, blocks)


def _extremes(form: BlockForm) -> Sweep:
    """All-equal bytes under scales from one end of the codes to the other."""
    parts = []
    for fill in (0x00, 0x0F, 0x77, 0x80, 0x88, 0xF0, 0xFF):
        blocks = np.full((32, form.nbytes), fill, np.uint8)
        for i, field in enumerate(form.fields):
            codes = _scale_codes(field)
            spread = codes[np.linspace(0, len(codes) - 1, 32).astype(int)]
            field.put(blocks, np.roll(spread, 7 * i))
        parts.append(blocks)
    return "bytes all equal, 7 fills, under 32 scales from end to end", np.concatenate(parts)


def _all_codes(form: BlockForm) -> Sweep | None:
    """Every element code under every 8-bit scale, where that is few enough blocks."""
    base = form.name.removesuffix("_GGUF")
    if base not in MICROSCALED or any(field.nbytes != 1 for field in form.fields):
        return None
    bits = MICROSCALED[base].element.bits
    ascending = np.arange(max(2**bits, form.elements)) % 2**bits
    codes = ascending.astype(np.uint8).reshape(-1, form.elements)
    if form.elements == 32 and bits == 4:
        codes[:, 16:] = codes[:, 16:][:, ::-1]  # each code in both halves of a byte
    packed = np.concatenate([_packed(form, row) for row in codes]).reshape(len(codes), -1)
    blocks = np.repeat(
        np.concatenate((np.zeros((len(codes), len(form.fields)), np.uint8), packed), axis=1), 256, axis=0
    )
    for i, field in enumerate(form.fields):
        field.put(blocks, np.tile(BYTES + np.uint8(64 * i), len(codes)))
    return f"all {2**bits} codes under all 256 scales", blocks


def _packed(form: BlockForm, codes: np.ndarray) -> np.ndarray:
    if form.name == "MXFP4_GGUF":
        return pack_split_half(codes)
    if form.name == "NVFP4_GGUF":
        return pack_split_half(codes.reshape(4, 16)).ravel()
    return pack_codes(codes, MICROSCALED[form.name].element.bits)


def pack_six_bit_pairs(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Q4_K's and Q5_K's 12 bytes from 8 scales and 8 minima below 64: uint8 [..., 8] twice -> [..., 12]."""
    first = scales[..., :4] | scales[..., 4:] >> 4 << 6
    second = minima[..., :4] | minima[..., 4:] >> 4 << 6
    return np.concatenate((first, second, scales[..., 4:] & 15 | minima[..., 4:] << 4), axis=-1)


def pack_six_bit_scales(scales: np.ndarray) -> np.ndarray:
    """Q3_K's 12 bytes from 16 scales below 64: uint8 [..., 16] -> [..., 12]."""
    upper = (scales >> 4).reshape(*scales.shape[:-1], 4, 4)
    last = upper[..., 0, :] | upper[..., 1, :] << 2 | upper[..., 2, :] << 4 | upper[..., 3, :] << 6
    return np.concatenate((scales[..., :8] & 15 | scales[..., 8:] << 4, last), axis=-1)


SIX_BITS = np.arange(64)
SOME_BYTES = np.unique([1, 127, 128, 255, *range(0, 256, 5)])  # all 256 alone would make Q6_K's file the largest
# offset, fields, values of each, and their packing: uint8 [n, fields] -> uint8 [n, bytes]
SUBSCALES: dict[str, tuple[int, int, np.ndarray, Callable[[np.ndarray], np.ndarray]]] = {
    "Q2_K": (0, 32, np.arange(16), lambda fields: fields[:, :16] | fields[:, 16:] << 4),
    "Q3_K": (96, 16, SIX_BITS, pack_six_bit_scales),
    "Q4_K": (4, 16, SIX_BITS, lambda fields: pack_six_bit_pairs(fields[:, :8], fields[:, 8:])),
    "Q5_K": (4, 16, SIX_BITS, lambda fields: pack_six_bit_pairs(fields[:, :8], fields[:, 8:])),
    "Q6_K": (192, 16, SOME_BYTES, lambda fields: fields),
}


def _subscales(form: BlockForm) -> Sweep:
    """Every sub-block's scale or minimum alone at each value, the others zero, d and dmin 1."""
    offset, count, values, pack = SUBSCALES[form.name]
    fields = np.zeros((count, len(values), count), np.uint8)
    fields[np.arange(count), :, np.arange(count)] = values
    packed = pack(fields.reshape(-1, count))
    blocks = _set_units(form, _random(form, len(packed)))
    blocks[:, offset : offset + packed.shape[1]] = packed
    return f"each of {count} sub-scales alone at {len(values)} values", blocks
