"""Every mistake made in somebody else's code: found, at the right tap, with the right cause? One command prints it all.

    python -m tests.golden.mistakes.matrix [transformers] [more] [mlx-lm] [cpu] [outside] [gguf]

transformers (in two halves) and mlx-lm by changing the loaded model or its module, the Numba path by changing its
functions (as `assay selftest` does), and faults that the catalogue does not know in transformers and, by the file
that it reads, in llama.cpp. Exits with 1 unless
all mistakes are found at the right tap, 95 % with the right cause first, and at most 5 % of the unknown faults get a
cause. Needs the peers.
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from assay.golden.backends import open_backend
from assay.golden.check import check as check_taps
from assay.golden.noise import profile_named
from assay.golden.record import record as record_taps
from assay.golden.selftest import MODES, selftest
from assay.golden.store import load_golden
from assay.golden.tiny_model import TINY
from assay.loaders import open_checkpoint
from assay.reference.taps import default_taps
from tests.checkpoint_files import opened
from tests.golden import injected_gguf, injected_mlx, injected_more
from tests.golden.injected_kernels import KERNELS
from tests.golden.injected_outside import OUTSIDE
from tests.golden.injection import check, inject, random_tokens, record, shrink_embedding
from tests.golden.mistakes.test_causes_peers import twin
from tests.golden.test_injected_mistakes_peers import ROWS, SMALL, Goldens, goldens_in


class Row(NamedTuple):
    """One mistake in one backend; `expected` None: no cause should be given."""

    where: str
    what: str
    tap: str
    found_at: str | None
    expected: str | None
    cause: str | None
    ratio_after: float | None
    runner_up: str | None
    sentence: str

    @property
    def marks(self) -> str:
        """Found, right tap, right cause: a letter for each, a dash where not."""
        named = self.cause == self.expected
        return f"{'f' if self.found_at else '-'}{'t' if self.found_at == self.tap else '-'}{'c' if named else '-'}"


def row(where: str, what: str, tap: str, expected: str | None, report: dict[str, Any]) -> Row:
    first, cause = report["first_divergence"], report["cause"] or {}
    runner_up = cause.get("runner_up") or {}
    found = (cause.get("id"), cause.get("ratio_after"), runner_up.get("id"))
    sentence = (report["structure"] or {}).get("sentence", "")
    return Row(where, what, tap, first and first["tap"], expected, *found, sentence)


def in_transformers(goldens: Goldens, more: bool) -> Iterator[Row]:
    if more:
        cases = [(family, id, id, m) for family, table in injected_more.TABLE.items() for id, m in table.items()]
    else:
        cases = [(family, mistake.name, twin(family, mistake) or "", mistake) for family, mistake in ROWS]
    for family, what, id, mistake in cases:
        for mode in mistake.modes if id else ():
            with pytest.MonkeyPatch.context() as patch:
                inject(mistake.apply, patch)
                report = quietly(lambda: check(goldens(family), mode)[1])  # noqa: B023
            yield row(f"transformers {mode}, {family}", what, mistake.tap, id, report)


def outside(goldens: Goldens) -> Iterator[Row]:
    unknown = [(f"{family} {m.name}", family, m) for family, m in ROWS if twin(family, m) is None]
    unknown += [(what, "gpt-oss", mistake) for what, mistake in (OUTSIDE | KERNELS).items()]
    for what, family, mistake in unknown:
        for mode in mistake.modes:
            with pytest.MonkeyPatch.context() as patch:
                inject(mistake.apply, patch)
                report = quietly(lambda: check(goldens(family), mode)[1])  # noqa: B023
            yield row(f"unknown {mode}", what, mistake.tap, None, report)


def in_the_file(root: Path) -> Iterator[Row]:
    checkpoint = open_checkpoint(injected_gguf.GPT_OSS)
    tokens = [token % checkpoint.config.vocab_size for token in random_tokens(60)]
    golden = record_taps(checkpoint, open_backend("reference", checkpoint), tokens)
    for what, fault in injected_gguf.FAULTS.items():
        broken = open_checkpoint(injected_gguf.with_fault(fault, root / "fault.gguf"))
        for mode in ("default", "float32"):
            backend = open_backend("llama.cpp", broken, mode)
            taps = backend.run(tokens, [60], default_taps(checkpoint.config))
            report = check_taps(golden, checkpoint, taps, "llama.cpp", profile_named(backend.profile)).as_json()
            yield row(f"llama.cpp {mode}", what, fault.tap, None, report)


def in_mlx_lm(root: Path) -> Iterator[Row]:
    from assay.golden.backends import mlx_lm
    from tests.tiny import make_gpt_oss

    # its ramp is rounded by design: here the checkpoint's is too
    make_gpt_oss(root / "mlx", seed=3, sliding_window=12, num_hidden_layers=2, rope_scaling={"truncate": True})
    shrink_embedding(root / "mlx", SMALL, 1 / 128)  # else bfloat16 hides a wrong epsilon
    tokens = [*random_tokens(59), SMALL]
    path = quietly(lambda: record(root / "mlx", root / "mlx.safetensors", tokens))
    checkpoint, golden = open_checkpoint(root / "mlx"), load_golden(path)
    load = mlx_lm._load
    for mode in ("float32", "bfloat16"):
        for id, mistake in injected_mlx.GPT_OSS.items():

            def broken(*arguments: Any, apply: Callable[[Any], None] = mistake.apply) -> Any:
                model = load(*arguments)
                apply(model)
                return model

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mlx_lm, "_load", broken)
                backend = open_backend("mlx-lm", checkpoint, mode)
            ran = golden.provenance
            taps = backend.run(ran.tokens, ran.chunks, default_taps(checkpoint.config))
            report = check_taps(golden, checkpoint, taps, "mlx-lm", profile_named(backend.profile)).as_json()
            yield row(f"mlx-lm {mode}", id, mistake.tap, id, report)


def in_the_numba_path() -> Iterator[Row]:
    checkpoints = {"tiny gpt-oss": open_checkpoint(TINY)}
    checkpoints |= {name: opened(name) for name in ("gpt_oss/hf", "llama/hf", "mistral/hf", "phi3/hf")}
    for name, checkpoint in checkpoints.items():
        for mode in MODES:
            result = selftest(checkpoint, mode)
            assert result["clean"] == "match"
            for r in result["rows"]:
                tap = r["tap"] if r["right_tap"] else "elsewhere"
                found = (r["cause"], r["ratio_after"], r["runner_up"])
                yield Row(f"cpu {mode}, {name}", r["id"], tap, r["tap"], r["id"], *found, "")


def quietly(run: Callable[[], Any]) -> Any:
    """Without what the command line prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return run()


def summary(rows: list[Row]) -> bool:
    """Print the rates of each backend, and whether they are as promised."""
    known, unknown = ([r for r in rows if (r.expected is None) is none] for none in (False, True))
    for where in dict.fromkeys(r.where for r in rows):
        mine = [r for r in rows if r.where == where]
        found, tap, cause = (sum(mark in r.marks for r in mine) for mark in "ftc")
        kind = "without a cause" if mine[0].expected is None else "with the right cause first"
        print(f"{where:38} {len(mine):4} made, {found:4} found, {tap:4} at the right tap, {cause:4} {kind}")
    found, tap, cause = (sum(mark in r.marks for r in known) for mark in "ftc")
    wrong = sum(r.cause is not None for r in unknown)
    faults, misnamed = ({r.what for r in rs} for rs in (unknown, [r for r in unknown if r.cause is not None]))
    distinct = len({r.expected for r in known})
    print(
        f"known: {len(known)} made of {distinct} mistakes, {found} found, {tap} at the right tap, {cause} named first"
    )
    print(f"unknown: {len(unknown)} made of {len(faults)} faults, {wrong} given a cause ({len(misnamed)} faults)")
    everywhere = all(r.marks.startswith("ft") for r in rows)
    return everywhere and cause >= 0.95 * len(known) and wrong <= 0.05 * len(unknown)


def main(sections: list[str]) -> int:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        goldens = quietly(lambda: goldens_in(Path(folder)))
        made = {
            "transformers": lambda: in_transformers(goldens, more=False),
            "more": lambda: in_transformers(goldens, more=True),
            "mlx-lm": lambda: in_mlx_lm(Path(folder)),
            "cpu": in_the_numba_path,
            "outside": lambda: outside(goldens),
            "gguf": lambda: in_the_file(Path(folder)),
        }
        for section in sections or made:
            for r in made[section]():
                rows.append(r)
                left = "" if r.ratio_after is None else f"leaves {r.ratio_after:.2g} x noise, then {r.runner_up}"
                print(f"{r.marks} {r.where}: {r.what}: {r.found_at}: {r.cause or r.sentence} {left}", flush=True)
    return 0 if summary(rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
