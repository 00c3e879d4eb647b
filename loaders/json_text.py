"""JSON objects read strictly: no key twice, nothing that no terminal can show, and no memory bombs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assay.loaders.errors import CheckpointError

ROOM = 48 << 20  # bytes that parsing may take beyond the size of the file
MAX_SETTINGS = 16 << 20  # bytes; real config.json files have at most some hundred thousand
# bytes of memory per occurrence, measured on CPython 3.11 to 3.13 and rounded up: an object, a list, an item, a text
_COST = {b"{": 240, b"[": 96, b",": 40, b'"': 30}


def parse_object(raw: bytes, error: Callable[..., CheckpointError], most: int) -> dict[str, Any]:
    """A JSON object; `error` makes what is raised from what is wrong and what was got.

    A few bytes such as "{}," become hundreds in memory, so the sum is estimated before anything is parsed, and more
    than `most` bytes of it refused.
    """
    width = 2 if raw.isascii() else 5  # bytes per character: as read, and decoded
    need = width * len(raw) + sum(cost * raw.count(mark) for mark, cost in _COST.items())
    if need > most:
        raise error(f"is implausible: reading it could take {need >> 20} MB", f"{len(raw)} bytes")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except RecursionError as cause:
        raise error("is nested too deeply") from cause
    except _TwiceError as cause:
        raise error(str(cause)) from cause
    except ValueError as cause:  # bad JSON, bad UTF-8, or an integer of too many digits
        raise error(f"is not JSON: {cause}", raw[:40]) from cause
    if not isinstance(value, dict):
        raise error("is not a JSON object", type(value).__name__)
    return value


def read_json(path: Path, longest: int = MAX_SETTINGS, most: int = ROOM) -> dict[str, Any]:
    """A JSON object from a file of `longest` bytes that takes `most` in memory; CheckpointError if it is not one."""

    def error(what: str, got: object = None) -> CheckpointError:
        return CheckpointError(f"the file {what}", where=path, got=got)

    try:
        if path.exists() and not path.is_file():  # a pipe would keep us waiting, a device never ends
            raise CheckpointError("not a file", where=path)
        if (size := path.stat().st_size) > longest:
            raise CheckpointError("too long", where=path, expected=f"at most {longest} bytes", got=f"{size} bytes")
        return parse_object(path.read_bytes(), error, most)
    except OSError as cause:
        raise CheckpointError(f"cannot be read: {cause.strerror}", where=path) from cause


class _TwiceError(ValueError):
    """A key given twice: which of the two counts differs between readers."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise _TwiceError(f"holds {name!r} twice")
        entries[name] = value
    return entries
