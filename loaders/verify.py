"""Is a checkpoint whole and consistent? Every fault found is said with its tensor, file and byte."""

import time
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from assay.loaders.checkpoint import locate
from assay.loaders.errors import CheckpointError, reporting
from assay.loaders.findings import MOST, Faults, Finding, Severity, TooManyFaultsError, from_error
from assay.loaders.gguf_checkpoint import gguf_checkpoint
from assay.loaders.gguf_file import GgufFile, read_gguf
from assay.loaders.json_text import read_json
from assay.loaders.safetensors_checkpoint import directory_checkpoint
from assay.loaders.safetensors_file import read_safetensors, read_safetensors_set
from assay.loaders.scan import Numbers, Stored, gguf_stored, safetensors_stored, scan

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Verification:
    """What was looked at and what was found; `bytes` are those of the weights, `scanned` those read for values."""

    path: str
    format: str | None
    quick: bool
    files: int
    tensors: int
    bytes: int
    scanned: int
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def is_good(self) -> bool:
        """Whether there is no error; warnings do not count."""
        return all(finding.severity != "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object; docs/verify.md says what each key means."""
        return {"verdict": "good" if self.is_good else "invalid", **asdict(self)}


def verify(path: str | Path, *, quick: bool = False, progress: Progress = lambda done, total: None) -> Verification:
    """Check a checkpoint's structure, shapes, settings and vocabulary, and unless `quick` every value in it.

    Raises CheckpointError only where there is nothing to check: no such path.
    """
    started = time.perf_counter()
    path = Path(path)
    if not path.exists():
        raise CheckpointError("no such file or directory", where=path)
    faults, contents = Faults(), _Contents()
    try:
        with reporting(faults):
            source = locate(path)
            read = _read_gguf if source.is_file() else _read_directory
            read(source, contents, faults)
    except OSError as error:
        faults(CheckpointError(f"cannot be read: {error.strerror or error}", where=path))
    except TooManyFaultsError:
        what = f"{MOST} faults are listed, and there may be more: the search for them ended here"
        faults.findings.append(Finding("error", "structure", what, file=str(path)))
    findings = faults.findings + contents.vocabulary
    total = sum(tensor.nbytes for tensor in contents.stored)
    if not quick:
        findings += _values(contents.stored, total, progress)
    return Verification(
        path=str(path),
        format=contents.format,
        quick=quick,
        files=len({tensor.file for tensor in contents.stored}),
        tensors=len(contents.stored),
        bytes=total,
        scanned=0 if quick else sum(tensor.nbytes for tensor in contents.stored if tensor.fields),
        seconds=time.perf_counter() - started,
        findings=_placed(findings, contents.stored),
    )


@dataclass
class _Contents:
    """What could be read of a checkpoint, as far as reading came: tensors, format, findings about the vocabulary."""

    stored: list[Stored] = field(default_factory=list)
    format: str | None = None
    vocabulary: list[Finding] = field(default_factory=list)


def _read_gguf(path: Path, contents: _Contents, faults: Faults) -> None:
    from assay.loaders.vocabulary import EMBEDDING, check_gguf

    file = read_gguf(path, faults)
    contents.stored = gguf_stored(file)
    _gguf_gaps(file, faults)
    checkpoint = gguf_checkpoint(file, faults)
    contents.format = checkpoint.format
    if EMBEDDING in checkpoint.tensors:
        contents.vocabulary = check_gguf(checkpoint, file.metadata)


def _read_directory(directory: Path, contents: _Contents, faults: Faults) -> None:
    from assay.loaders.vocabulary import EMBEDDING, check_directory

    config: dict[str, Any] | None = None
    with reporting(faults):
        config = read_json(directory / "config.json")
    try:
        files, faulty = read_safetensors_set(directory, faults)
    except CheckpointError as error:  # about the set, or its only file: look at each by itself
        faults(error)
        for path in sorted(directory.glob("*.safetensors")):
            with reporting(faults):
                read_safetensors(path, faults)
        return
    faults.hide(faulty)
    quantization = (config or {}).get("quantization")
    settings = quantization if isinstance(quantization, dict) else {}
    contents.stored = safetensors_stored(files, settings)
    if config is None:
        return
    _mlx_settings(directory, config, settings, files.keys() | faulty, faults)
    checkpoint = directory_checkpoint(directory, config, files, faulty, faults)
    contents.format = checkpoint.format
    if EMBEDDING in checkpoint.tensors:
        contents.vocabulary = check_directory(checkpoint, config)


def _gguf_gaps(file: GgufFile, faults: Faults) -> None:
    """Bytes that belong to no tensor: llama.cpp refuses gaps (gguf.cpp), and ignores what follows the last one.

    A tensor may also begin where a misplaced one before it should have ended, and anywhere behind one left out.
    """
    path, padded = str(file.path), lambda nbytes: -(-nbytes // file.alignment) * file.alignment
    end, intended, is_known = file.data_start, file.data_start, True
    for tensor in file.order:
        if tensor is None:
            is_known = False
            continue
        place = tensor.offset
        if is_known and place not in (end, intended):
            what = "does not lie right behind the tensor before it, and llama.cpp refuses such a file"
            expected, got = (f"offset {byte - file.data_start}" for byte in (end, place))
            faults.add(Finding("error", "structure", what, tensor.name, path, place, expected, got))
            place = end
        end, intended, is_known = tensor.offset + padded(tensor.nbytes), place + padded(tensor.nbytes), True
    end = max(end, intended)
    if is_known and (size := file.path.stat().st_size) > end:
        what = f"{size - end} trailing bytes that belong to no tensor"
        faults.add(Finding("warning", "structure", what, None, path, end))


def _mlx_settings(
    directory: Path, config: Mapping[str, Any], settings: Mapping[str, Any], names: Set[str], faults: Faults
) -> None:
    """MLX's settings against each other and the modules there are; whether they fit the shapes, opening says."""
    file = str(directory / "config.json")
    other = config.get("quantization_config")
    if settings and isinstance(other, dict) and "quant_method" not in other and other != settings:
        keys = [key for key in {**settings, **other} if settings.get(key) != other.get(key)]
        what = f"quantization and quantization_config disagree on {', '.join(map(repr, keys[:3]))}"
        got = f"{settings.get(keys[0])} and {other.get(keys[0])}"
        faults.add(Finding("error", "settings", what, None, file, None, "the same settings twice", got))
    for module, own in settings.items():
        if isinstance(own, dict) and f"{module}.scales" not in names:
            what = "quantisation settings for a module that has no scales"
            faults.add(Finding("warning", "settings", what, f"{module}.weight", file))


def _placed(findings: list[Finding], stored: list[Stored]) -> tuple[Finding, ...]:
    """The findings, those about a stored tensor with the place where it lies, unless they are about another file."""
    places = {tensor.name: tensor for tensor in stored}

    def at(finding: Finding) -> Finding:
        tensor = places.get(finding.tensor or "")
        if tensor is None or finding.byte is not None:
            return finding
        if finding.file not in (str(tensor.file), str(tensor.file.parent)):
            return finding
        return replace(finding, file=str(tensor.file), byte=tensor.begin)

    return tuple(at(finding) for finding in findings)


def _values(stored: list[Stored], total: int, progress: Progress) -> list[Finding]:
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    findings: list[Finding] = []
    try:
        for numbers in scan(stored, advance):
            findings += _from_numbers(numbers)
    except CheckpointError as error:
        findings += from_error(error)
    return findings


def _from_numbers(numbers: Numbers) -> list[Finding]:
    stored, what = numbers.stored, numbers.field.what
    if numbers.is_zero:
        return [Finding("warning", "values", f"every {what} is zero", stored.name, str(stored.file), stored.begin)]
    findings = []
    for is_finite, (byte, code) in numbers.first.items():
        count = numbers.count[is_finite]
        wrong = "too large for float32" if is_finite else "not finite"
        text = f"a {what} is {wrong}" if count == 1 else f"{count} {what}s are {wrong}, the first"
        text += f" at element {numbers.index(byte)}"
        # a scale may be so large, if the codes beside it are all small
        severity: Severity = "warning" if is_finite and what == "scale" else "error"
        got = numbers.text(code)
        findings.append(Finding(severity, "values", text, stored.name, str(stored.file), byte, got=got))
    return findings
