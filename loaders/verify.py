"""Is a checkpoint whole and consistent? Every fault found is said with its tensor, file and byte."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from assay.loaders.checkpoint import Checkpoint, locate, open_checkpoint
from assay.loaders.errors import CheckpointError
from assay.loaders.findings import Finding, Severity, from_error
from assay.loaders.gguf_file import GgufFile, read_gguf
from assay.loaders.json_text import read_json
from assay.loaders.safetensors_file import open_safetensors_set, read_safetensors
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
    raw = _read(path)
    findings = raw.findings
    checkpoint = None
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        if raw.is_readable:  # else it is the same error, or follows from it
            findings += from_error(error)
    if checkpoint is not None:
        findings += _vocabulary(checkpoint, raw)
    total = sum(tensor.nbytes for tensor in raw.stored)
    if not quick:
        findings += _values(raw.stored, total, progress)
    return Verification(
        path=str(path),
        format=checkpoint.format if checkpoint else None,
        quick=quick,
        files=len({tensor.file for tensor in raw.stored}),
        tensors=len(raw.stored),
        bytes=total,
        scanned=0 if quick else sum(tensor.nbytes for tensor in raw.stored if tensor.fields),
        seconds=time.perf_counter() - started,
        findings=_placed(findings, raw.stored),
    )


@dataclass
class _Raw:
    """The files of a checkpoint before anything is made of them, and what is wrong with them by themselves."""

    findings: list[Finding]
    stored: list[Stored] = field(default_factory=list)
    gguf: GgufFile | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    is_readable: bool = True


def _read(path: Path) -> _Raw:
    try:
        source = locate(path)
        if source.is_file():
            file = read_gguf(source)
            return _Raw(_gguf_gaps(file), gguf_stored(file), file)
    except CheckpointError as error:
        return _Raw(from_error(error), is_readable=False)
    return _read_directory(source)


def _read_directory(directory: Path) -> _Raw:
    try:
        config = read_json(directory / "config.json")
    except CheckpointError as error:
        return _Raw(from_error(error) + _damaged_files(directory), is_readable=False)
    try:
        files = open_safetensors_set(directory)
    except CheckpointError as error:
        return _Raw(_damaged_files(directory) or from_error(error), is_readable=False)
    quantization = config.get("quantization")
    settings = quantization if isinstance(quantization, dict) else {}
    findings = _mlx_settings(directory, config, settings, files)
    return _Raw(findings, safetensors_stored(files, settings), config=config)


def _damaged_files(directory: Path) -> list[Finding]:
    """What is wrong with each file by itself: the reader of the set stops at the first."""
    findings = []
    for path in sorted(directory.glob("*.safetensors")):
        try:
            read_safetensors(path)
        except CheckpointError as error:
            findings += from_error(error)
    return findings


def _gguf_gaps(file: GgufFile) -> list[Finding]:
    """Bytes that belong to no tensor: llama.cpp refuses gaps (gguf.cpp), and ignores what follows the last one."""
    findings, path, end = [], str(file.path), file.data_start
    for tensor in file.tensors.values():
        if tensor.offset != end:
            what = "does not lie right behind the tensor before it, and llama.cpp refuses such a file"
            expected, got = (f"offset {byte - file.data_start}" for byte in (end, tensor.offset))
            findings.append(Finding("error", "structure", what, tensor.name, path, tensor.offset, expected, got))
        end = tensor.offset + -(-tensor.nbytes // file.alignment) * file.alignment
    if (size := file.path.stat().st_size) > end:
        what = f"{size - end} trailing bytes that belong to no tensor"
        findings.append(Finding("warning", "structure", what, None, path, end))
    return findings


def _mlx_settings(
    directory: Path, config: Mapping[str, Any], settings: Mapping[str, Any], names: Mapping[str, object]
) -> list[Finding]:
    """MLX's settings against each other and the modules there are; whether they fit the shapes, opening says."""
    file, findings = str(directory / "config.json"), []
    other = config.get("quantization_config")
    if settings and isinstance(other, dict) and "quant_method" not in other and other != settings:
        keys = [key for key in {**settings, **other} if settings.get(key) != other.get(key)]
        what = f"quantization and quantization_config disagree on {', '.join(map(repr, keys[:3]))}"
        got = f"{settings.get(keys[0])} and {other.get(keys[0])}"
        findings.append(Finding("error", "settings", what, None, file, None, "the same settings twice", got))
    for module, own in settings.items():
        if isinstance(own, dict) and f"{module}.scales" not in names:
            what = "quantisation settings for a module that has no scales"
            findings.append(Finding("warning", "settings", what, f"{module}.weight", file))
    return findings


def _vocabulary(checkpoint: Checkpoint, raw: _Raw) -> list[Finding]:
    from assay.loaders.vocabulary import check_directory, check_gguf

    if raw.gguf is not None:
        return check_gguf(checkpoint, raw.gguf.metadata)
    return check_directory(checkpoint, raw.config)


def _placed(findings: list[Finding], stored: list[Stored]) -> tuple[Finding, ...]:
    """The findings, those about a stored tensor with the place where it lies."""
    places = {tensor.name: tensor for tensor in stored}

    def at(finding: Finding) -> Finding:
        tensor = places.get(finding.tensor or "")
        if tensor is None or finding.byte is not None:
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
