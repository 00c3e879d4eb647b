"""What the `golden` fixture of the pytest plugin does."""

import re
from collections.abc import Callable, Collection, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from assay.golden.backends import open_backend
from assay.golden.backends.dump import Dump, dump_of, open_dump
from assay.golden.check import Report, check, incomparable_tokens, require_same_checkpoint
from assay.golden.detail import Details
from assay.golden.errors import GoldenError
from assay.golden.html.page import about_of, write_page
from assay.golden.noise import profile_named
from assay.golden.record import checkpoint_of, record, split_into_chunks
from assay.golden.report import print_report
from assay.golden.store import Golden, load_golden, save_golden
from assay.loaders.checkpoint import Checkpoint
from assay.loaders.errors import CheckpointError

# an engine: tokens to taps, by assay's names or those of a name map
Engine = Callable[[list[int]], Mapping[str, Any]]
UPDATE = "run pytest with --golden-update, and commit the golden"


class GoldenFixture:
    """The `golden` fixture of one test.

    `reports` answers the folder for HTML reports, `recorded` takes the paths of goldens that were written.
    """

    def __init__(
        self, test: pytest.Item, reports: Callable[[], Path], update: bool, record_missing: bool, recorded: list[str]
    ):
        self.test, self.reports = test, reports
        self.update, self.record_missing, self.recorded = update, record_missing, recorded

    @property
    def path(self) -> Path:
        """Where the test's golden lies by convention: `FOLDER OF THE TEST/MODULE/TEST.safetensors`."""
        module = self.test.path
        return module.parent / module.stem / f"{_file_name(self.test.name)}.safetensors"

    def check(
        self,
        engine: Engine | Mapping[str, Any] | str | Path,
        *,
        model: str | Path | None = None,
        tokens: Collection[int] | None = None,
        prompt: str | None = None,
        chunks: Collection[int] | None = None,
        taps: str | None = None,
        path: str | Path | None = None,
        names: str | None = None,
        profile: str | None = None,
        strict: bool = False,
    ) -> Report:
        """Fail the test unless the engine's taps are within their allowances; answer the report.

        `engine` is called with the token ids and answers taps by name; or it is such taps already, or the path of a
        dump. `model`, and `tokens` or `prompt`, say what to record where the golden is missing; with a golden at hand
        they may be left out, and must agree with it where they are given. Paths are relative to the test's folder;
        `chunks`, `taps`, `names`, `profile` and `strict` are those of `assay record` and `assay check`.
        """
        __tracebackhide__ = True
        folder = self.test.path.parent
        try:
            model = None if model is None else folder / model
            place = self.path if path is None else folder / path
            golden, checkpoint = self._golden(place, model, tokens, prompt, chunks, taps)
            dump = self._dump(engine, golden, checkpoint, names)
            report, page = self._judged(golden, checkpoint, dump, profile, strict)
        except CheckpointError as error:
            said = f"golden: {error}"
        else:
            said = _said(report, page) if page is not None else ""
        if said:  # not while the error is handled: pytest would print both
            pytest.fail(said, pytrace=False)
        return report

    def _golden(
        self,
        place: Path,
        model: Path | None,
        tokens: Collection[int] | None,
        prompt: str | None,
        chunks: Collection[int] | None,
        taps: str | None,
    ) -> tuple[Golden, Checkpoint | None]:
        """The golden, recorded if it has to be, and the checkpoint if there is one."""
        if tokens is not None and prompt is not None:
            raise GoldenError("give golden.check either tokens or prompt")
        shards = place.with_suffix(".safetensors.index.json")
        stored = next((load_golden(path) for path in (place, shards) if path.exists()), None)
        if stored is None and not (self.update or self.record_missing):
            raise GoldenError("the golden is missing", where=place, remedy=UPDATE)
        checkpoint = checkpoint_of(stored, model)
        if prompt is not None and checkpoint is not None:
            tokens = checkpoint.tokenizer.encode(prompt).ids
        if stored is not None and not self.update:
            _require_same_run(stored, tokens, chunks)
            if checkpoint is not None:
                require_same_checkpoint(stored, checkpoint)
            return stored, checkpoint
        if stored is not None:  # what the test does not say stays as it was
            tokens = tokens if tokens is not None else stored.provenance.tokens
            chunks = chunks if chunks is not None else stored.provenance.chunks
            taps = taps if taps is not None else ",".join(stored.provenance.taps)
        return self._recorded(place, checkpoint, tokens, chunks, taps)

    def _recorded(
        self,
        place: Path,
        checkpoint: Checkpoint | None,
        tokens: Collection[int] | None,
        chunks: Collection[int] | None,
        taps: str | None,
    ) -> tuple[Golden, Checkpoint]:
        if checkpoint is None or tokens is None:
            lacking = "model" if checkpoint is None else "tokens or prompt"
            raise GoldenError("the golden cannot be recorded", where=place, remedy=f"give golden.check {lacking}")
        place.parent.mkdir(parents=True, exist_ok=True)
        oracle = open_backend("reference", checkpoint)
        made = record(checkpoint, oracle, tokens, chunks=chunks, taps=taps, beside=place.parent)
        written = save_golden(made, place)
        self.recorded.append(str(written))
        return load_golden(written), checkpoint

    def _dump(
        self,
        engine: Engine | Mapping[str, Any] | str | Path,
        golden: Golden,
        checkpoint: Checkpoint | None,
        names: str | None,
    ) -> Dump:
        config = None if checkpoint is None else checkpoint.config
        is_phi3 = checkpoint is not None and checkpoint.is_phi3
        if isinstance(engine, str | Path):
            return open_dump(self.test.path.parent / engine, config, names, is_phi3=is_phi3)
        taps = engine(list(golden.provenance.tokens)) if callable(engine) else engine
        if not isinstance(taps, Mapping):
            raise GoldenError("no taps", expected="a mapping of names to arrays", got=type(taps).__name__)
        return dump_of({str(name): _array(name, value) for name, value in taps.items()}, config, names, is_phi3=is_phi3)

    def _judged(
        self, golden: Golden, checkpoint: Checkpoint | None, dump: Dump, profile: str | None, strict: bool
    ) -> tuple[Report, Path | None]:
        """The report, and if the check failed its page."""
        judged_by = profile_named(profile or dump.profile)
        layers = checkpoint.config.num_hidden_layers if checkpoint else None
        details = Details(golden.provenance.tokens, judged_by.unit_roundoff, layers)
        name = self.test.name
        report = None if dump.tokens is None else incomparable_tokens(golden, dump.tokens, name, judged_by)
        if report is None:
            report = check(golden, checkpoint, dump.taps, name, judged_by, strict=strict, observe=details)
        if report.verdict in ("match", "known-deviation"):
            return report, None
        folder = self.reports()
        folder.mkdir(parents=True, exist_ok=True)
        page = folder.absolute() / f"{_file_name(self.test.nodeid)}.html"
        write_page(page, report, details.taps, about_of(golden, checkpoint))
        self.test.user_properties.append(("golden_report", str(page)))  # for whatever collects those, as JUnit XML
        return report, page


def _require_same_run(golden: Golden, tokens: Collection[int] | None, chunks: Collection[int] | None) -> None:
    """Refuse a golden that was recorded from other tokens, or in other chunks, than the test says."""
    recorded = golden.provenance
    if tokens is not None and list(tokens) != recorded.tokens:
        raise GoldenError(
            "the golden was recorded from other tokens than the test has",
            where=golden.path,
            expected=f"{len(tokens)} tokens: {list(tokens)[:8]}",
            got=f"{len(recorded.tokens)} tokens: {recorded.tokens[:8]}",
            remedy=UPDATE,
        )
    if chunks is not None and (wanted := split_into_chunks(len(recorded.tokens), chunks)) != recorded.chunks:
        raise GoldenError(
            "the golden was recorded in other chunks",
            where=golden.path,
            expected=wanted,
            got=recorded.chunks,
            remedy=UPDATE,
        )


def _said(report: Report, page: Path) -> str:
    """The terminal's report as plain text, and where the page is."""
    text = StringIO()
    print_report(report, Console(file=text, width=100, no_color=True))
    return f"{text.getvalue()}HTML report: {page}"


def _file_name(text: str) -> str:
    """A test's name as a file's: what file systems may refuse becomes an underscore."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_.")[:150]


def _array(name: object, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # a torch tensor in bfloat16 or on another device, say
        raise GoldenError(f"tap {str(name)!r} is no array: {error}", remedy="hand over NumPy arrays") from error
