"""Ways to spoil a checkpoint at random, from single bits to hostile structure; each answers what it did."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.checkpoint_files import CHECKPOINTS

BASES = sorted({path.parent.relative_to(CHECKPOINTS) for path in CHECKPOINTS.glob("*/*/model*")})
NUMBERS = [0, 1, 2, 7, 31, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
# fmt: off
HOSTILE: list[Any] = [
    None, True, -1, 10**400, -(2**63), 1e308, 5e-324, float("nan"), float("inf"), -0.0, 0.5, 1e400, *NUMBERS,
    "", "x" * 20_000, "NaN", "\ud800", "\x00\x1b[31m", "../../../etc/passwd", "/dev/zero", "F32", "4",
    [], {}, [[]] * 9, [0] * 5000, [1] * 70, [2**62] * 60, [-1], [1.5], [None], ["a", "b"], {"": {}}, {"content": 5},
]
# fmt: on


def make_case(rng: Random, folder: Path) -> tuple[Path, str]:
    """A spoilt copy of one of our checkpoints in `folder`: the path to open, and what was done to it."""
    base = rng.choice(BASES)
    folder.mkdir()
    for source in (CHECKPOINTS / base).iterdir():
        (folder / source.name).symlink_to(source)  # a mutation replaces the link by a file
    done = [rng.choice(MUTATIONS)(rng, folder) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    gguf = folder / "model.gguf"
    return gguf if gguf.is_symlink() or gguf.exists() else folder, f"{base}: {'; '.join(done)}"


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _pick(rng: Random, folder: Path, *patterns: str) -> Path | None:
    files = sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file())
    return rng.choice(files) if files else None


# --- bytes ---


def spoil_bytes(rng: Random, folder: Path) -> str:
    """Flip, overwrite, cut, lengthen, repeat or drop bytes; half of the time near the start, where the structure is."""
    path = _pick(rng, folder, "model*", "model*", "*.json")
    raw = bytearray(path.read_bytes() if path else b"")
    if path is None or not raw:
        return "nothing left"
    end = min(len(raw), rng.choice((64, 2000, 20_000, len(raw))))
    at, length = rng.randrange(end), rng.choice((1, 2, 4, 8, 32, 1000))
    kind = rng.choice(("flip", "flip", "number", "cut", "lengthen", "repeat", "drop", "zero", "noise"))
    match kind:
        case "flip":
            for _ in range(rng.choice((1, 1, 1, 3, 30))):
                raw[rng.randrange(end)] ^= 1 << rng.randrange(8)
        case "number":
            width = rng.choice((1, 2, 4, 8))
            raw[at : at + width] = (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
        case "cut":
            del raw[at:]
        case "lengthen":
            raw += rng.choice((bytes(length), rng.randbytes(length), bytes(1 << 22)))
        case "repeat":
            raw[at:at] = raw[at : at + length] * rng.choice((1, 2, 500))
        case "drop":
            del raw[at : at + length]
        case "zero":
            raw[at : at + length] = bytes(length)
        case "noise":
            raw[at : at + length] = rng.randbytes(length)
    _write(path, bytes(raw))
    return f"{path.name}: {kind} at {at} of {len(raw)}"


# --- JSON ---


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _nodes(value[key])


def _edit(rng: Random, value: Any) -> str:
    """Change one node of a JSON value in place."""
    nodes = list(_nodes(value))
    if not nodes:
        return "empty"
    shallow = [node for node in nodes if node[0] is value]
    container, key = rng.choice(rng.choice((shallow, nodes)))
    old, other = container[key], rng.choice(nodes)
    match rng.randrange(7):
        case 0 | 1 | 2:
            container[key] = rng.choice(HOSTILE)
        case 3:
            del container[key]
        case 4:
            container[key] = other[0][other[1]]
        case 5 if isinstance(old, int):
            container[key] = rng.choice((old + 1, old - 1, 2 * old, old // 2, -old, old << 40))
        case _ if isinstance(container, dict):
            container[f"{key}_"] = container.pop(key)
        case _:
            container.append(old)
    return f"{str(key)[:60]!r}: {str(old)[:40]} -> {str(container[key])[:40] if _has(container, key) else 'gone'}"


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def _raw_edit(rng: Random, text: str) -> tuple[str, str]:
    """Change the text of a JSON object in ways that no value has."""
    kind = rng.choice(("twice", "deep", "deep objects", "digits", "many", "many lists", "spaces", "surrogate", "comma"))
    key = next(iter(json.loads(text)), "a") if rng.random() < 0.7 else "a"
    size = rng.choice((10, 1000, 100_000, 1_000_000))
    member = {
        "twice": f"{json.dumps(key)}: 0",
        "deep": '"a": ' + "[" * size + "]" * rng.choice((0, size)),
        "deep objects": '"a": ' + '{"a":' * size + "0" + "}" * size,
        "digits": '"a": ' + "9" * size,
        "many": '"a": {' + ", ".join(f'"{i}": 0' for i in range(size // 10)) + "}",
        "many lists": '"a": [' + ",".join(["[]"] * size) + "]",
        "spaces": " " * size + '"a": 0',
        "surrogate": '"\\ud800": 0',
        "comma": '"a": 0,',
    }[kind]
    return text.replace("{", "{" + member + ", ", 1), f"{kind} x{size}"


def spoil_json(rng: Random, folder: Path) -> str:
    """Change config.json, the index, or a tokenizer's file."""
    path = _pick(rng, folder, "config.json", "config.json", "*.json")
    if path is None:
        return spoil_bytes(rng, folder)
    try:
        value = json.loads(path.read_bytes())
        if rng.random() < 0.2:
            text, done = _raw_edit(rng, json.dumps(value))
        else:
            done = "; ".join(_edit(rng, value) for _ in range(rng.choice((1, 1, 2))))
            text = json.dumps(value)
    except (ValueError, RecursionError):  # spoilt before
        return spoil_bytes(rng, folder)
    _write(path, text.encode())
    return f"{path.name}: {done}"


def spoil_header(rng: Random, folder: Path) -> str:
    """Change the header of a safetensors file, or the length of it."""
    path = _pick(rng, folder, "*.safetensors")
    raw = path.read_bytes() if path else b""
    length = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + length])
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        if rng.random() < 0.2:
            text, done = _raw_edit(rng, json.dumps(header))
        else:
            done = _edit(rng, rng.choice((entry, entry, header))) if rng.random() < 0.7 else _edit_entry(rng, entry)
            text = json.dumps(header)
    except (ValueError, RecursionError, LookupError, TypeError):
        return spoil_bytes(rng, folder)
    assert path is not None
    size = rng.choice(NUMBERS) if rng.random() < 0.05 else len(text)
    _write(path, struct.pack("<Q", size) + text.encode() + raw[8 + length :])
    return f"{path.name}: {done}"


def _edit_entry(rng: Random, entry: dict[str, Any]) -> str:
    """Another dtype of the same size, axes in another order, or data shifted."""
    same_size = {"BF16": "F16", "F16": "BF16", "F32": "U32", "U32": "F32", "U8": "F8_E8M0"}
    match rng.randrange(4):
        case 0:
            entry["dtype"] = same_size.get(entry["dtype"], "F64")
        case 1:
            rng.shuffle(entry["shape"])
        case 2:
            entry["shape"] += [1] * rng.choice((1, 40, 1000))
        case 3:
            step = rng.choice((-32, -2, -1, 1, 2, 32))
            entry["data_offsets"] = [offset + step for offset in entry["data_offsets"]]
    return f"entry {str(entry)[:80]}"


# --- GGUF ---

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class _Spot(NamedTuple):
    """An integer of a GGUF file that says how to read what follows."""

    what: str
    at: int
    width: int


def _spots(raw: bytes) -> tuple[list[_Spot], int, int]:
    """Those integers, and where metadata and tensor infos end; the file must be whole."""
    spots, at = [_Spot("version", 4, 4), _Spot("tensors", 8, 8), _Spot("entries", 16, 8)], 24

    def number(what: str, width: int) -> int:
        nonlocal at
        spots.append(_Spot(what, at, width))
        at += width
        if at > len(raw):
            raise IndexError("spoilt before")
        return int.from_bytes(raw[at - width : at], "little")

    def text(what: str) -> None:
        nonlocal at
        at += number(f"length of {what}", 8)

    n_tensors, n_entries = struct.unpack_from("<QQ", raw, 8)
    for _ in range(n_entries):
        text("key")
        kind = number("type", 4)
        if kind == 9:
            kind, count = number("array type", 4), number("array count", 8)
        else:
            count = 1
        for _ in range(count if kind == 8 else 0):
            text("string")
        at += 0 if kind == 8 else count * SIZES[kind]
    end_of_metadata = at
    for _ in range(n_tensors):
        text("name")
        for _ in range(number("axes", 4)):
            number("axis", 8)
        number("ggml type", 4)
        number("offset", 8)
    return spots, end_of_metadata, at


def spoil_gguf(rng: Random, folder: Path) -> str:
    """Change a count, length, type, axis or offset of a GGUF file, or add a hostile metadata entry."""
    path = _pick(rng, folder, "model.gguf")
    if path is None:
        return rng.choice((spoil_header, spoil_json))(rng, folder)
    raw = bytearray(path.read_bytes())
    try:
        spots, metadata_end, infos_end = _spots(raw)
    except (IndexError, KeyError, struct.error, MemoryError, OverflowError):
        return spoil_bytes(rng, folder)
    if rng.random() < 0.2:
        entry, done = _hostile_entry(rng)
        start = -(-infos_end // 32) * 32
        struct.pack_into("<Q", raw, 16, struct.unpack_from("<Q", raw, 16)[0] + 1)
        head = raw[:metadata_end] + entry + raw[metadata_end:infos_end]
        raw = head + bytes(-len(head) % 32) + raw[start:]
    else:
        spot = rng.choice([s for s in spots if s.what == rng.choice(spots).what] or spots)
        old = int.from_bytes(raw[spot.at : spot.at + spot.width], "little")
        new = rng.choice((*NUMBERS, old + 1, old - 1, 2 * old, len(raw), rng.randrange(45))) % 2 ** (8 * spot.width)
        raw[spot.at : spot.at + spot.width] = new.to_bytes(spot.width, "little")
        done = f"{spot.what} at {spot.at}: {old} -> {new}"
    _write(path, bytes(raw))
    return f"{path.name}: {done}"


def _hostile_entry(rng: Random) -> tuple[bytes, str]:
    """One more metadata entry."""

    def text(content: bytes) -> bytes:
        return struct.pack("<Q", len(content)) + content

    keys = (
        b"general.architecture",
        b"general.alignment",
        b"tokenizer.ggml.tokens",
        b"llama.block_count",
        b"split.count",
    )
    key = rng.choice((*keys, b"x", b"\xff\xfe", b"", b"k" * 70_000, b"tokenizer.ggml.eos_token_id"))
    depth, number = rng.choice((1, 2, 100, 30_000)), rng.choice(NUMBERS)
    done, value = rng.choice(
        (
            ("nested arrays", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth),
            ("array of many", struct.pack("<IIQ", 9, rng.choice((0, 8, 12)), number)),
            ("number", struct.pack("<IQ", 10, number)),
            ("string", struct.pack("<IQ", 8, number)),
            ("bad text", struct.pack("<I", 8) + text(b"\xc3\x28\xed\xa0\x80")),
            ("many strings", struct.pack("<IIQ", 9, 8, depth) + text(b"") * depth),
            ("bool", struct.pack("<IB", 7, rng.choice((0, 1, 2)))),
            ("unknown type", struct.pack("<I", rng.choice((13, 255, 2**32 - 1)))),
        )
    )
    return text(key) + value, f"entry {key[:30]!r}: {done} {depth} {number}"


# --- files ---


def spoil_files(rng: Random, folder: Path) -> str:
    """Take a file away, or put something in its place that is no file, or another file."""
    names = sorted(path.name for path in folder.iterdir())
    path = folder / rng.choice(names) if names else folder / "config.json"
    kinds = ("gone", "empty", "folder", "loop", "pipe", "zeros", "other", "dangling", "swap", "copy")
    kind = rng.choice(kinds)
    content = path.read_bytes() if path.is_file() else b""
    other = folder / rng.choice(names or ["config.json"])
    copied = other.read_bytes() if other.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "pipe":
            os.mkfifo(path)
        case "zeros":
            path.symlink_to("/dev/zero")
        case "other" | "copy":
            path.write_bytes(copied)
        case "dangling":
            path.symlink_to("nowhere")
        case "swap":
            (folder / f"model-{rng.randrange(3)}-of-2.safetensors").write_bytes(content)
    return f"{path.name}: {kind}"


MUTATIONS: list[Callable[[Random, Path], str]] = [
    *([spoil_bytes] * 3),
    *([spoil_json] * 3),
    *([spoil_header] * 4),
    *([spoil_gguf] * 6),
    spoil_files,
]
