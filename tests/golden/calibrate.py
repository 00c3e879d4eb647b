"""Where the allowance lies: between the most that a clean backend shows and the least that a mistake does.

    python -m tests.golden.calibrate [CHECKPOINT...]

Over several prompts the Numba path is checked clean, and with each mistake of the catalogue that is injected into it,
in float32, rounded to bfloat16, and with 8-bit activations. Prints the largest clean ratio, the mistakes nearest above
the allowance, and those between the two, if any: then, or with a clean run above the allowance, it exits with 1. Needs
no peer; about two minutes of CPU.
`tests.golden.clean_sweep` measures the clean side on other backends, the peers' tests the other one on transformers.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from assay.golden.backends import open_backend
from assay.golden.forced import forced_pass, noisy_pass
from assay.golden.measure import ALLOWANCE, Comparison, compare
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.injections import INJECTIONS, Injection
from assay.golden.noise import Profile, profile_named
from assay.golden.record import record
from assay.golden.selftest import good_prompt
from assay.golden.store import Golden
from assay.loaders import Checkpoint, open_checkpoint
from assay.reference.taps import default_taps, tap_table
from tests.checkpoint_files import CHECKPOINTS

SEEDS = 10  # clean prompts
SAME = 1.5  # times the clean runs' largest ratio: up to there a mistake is nothing on these tokens
NEAREST = 5  # mistakes that are listed
EVERY = ("float32", "bfloat16", "q8")
DEFAULT = [
    *((str(CHECKPOINTS / name / "hf"), mode) for name in ("gpt_oss", "llama", "mistral", "phi3") for mode in EVERY[:2]),
    *((str(CHECKPOINTS / name), "q8") for name in ("gpt_oss/gguf", "llama/gguf-q8_0", "llama/gguf-q4_1")),
]


def ratios(golden: Golden, checkpoint: Checkpoint, injection: Injection, profile: Profile) -> dict[str, float]:
    """Each tap's ratio in a run of the Numba path with a mistake in it; infinite for values that are not finite."""
    ran, names = golden.provenance, default_taps(checkpoint.config)
    with injection.backend(checkpoint, profile.name) as backend, np.errstate(all="ignore"):
        taps = dict(backend.run(ran.tokens, ran.chunks, names))
        expected = forced_pass(checkpoint, ran.tokens, ran.chunks, taps, taps)
        noisy = noisy_pass(checkpoint, ran.tokens, ran.chunks, taps, expected, profile)
    table = tap_table(checkpoint.config)
    found = {
        name: _compared(expected, taps, noisy, name, table[name].axes.index("T"), profile)
        for name in taps
        if not table[name].integer
    }
    return {name: float("inf") if c.nonfinite else c.ratio for name, c in found.items()}


def _compared(
    expected: Mapping[str, np.ndarray],
    taps: Mapping[str, np.ndarray],
    noisy: Mapping[str, np.ndarray],
    name: str,
    T_axis: int,
    profile: Profile,
) -> Comparison:
    return compare(expected[name], taps[name], noisy[name], T_axis, profile.unit_roundoff)


class Found(NamedTuple):
    """The clean runs' largest ratio, and each injected mistake's largest one on any of its taps."""

    clean: float
    mistakes: dict[str, float]

    def within(self, low: float, high: float) -> list[str]:
        """Mistakes from weak to strong with a ratio above the one and up to the other, as text."""
        chosen = sorted((ratio, id) for id, ratio in self.mistakes.items() if low < ratio <= high)
        return [f"{id} {ratio:.4g}" for ratio, id in chosen]


def calibrate(checkpoint: Checkpoint, profile: Profile, say: Callable[[str], None]) -> Found:
    """Clean runs over SEEDS prompts, and on the first of them every mistake that can be injected."""
    prompts = [good_prompt(checkpoint, seed) for seed in range(SEEDS)]
    goldens = [record(checkpoint, open_backend("reference", checkpoint), *p[:1], chunks=p[1]) for p in prompts]
    clean = 0.0
    for seed, golden in enumerate(goldens):
        say(f"clean, prompt {seed + 1} of {SEEDS}")
        clean = max(clean, *ratios(golden, checkpoint, Injection(), profile).values())
    acting = [id for id, mistake in CATALOGUE.items() if mistake.acts(checkpoint) and id in INJECTIONS]
    # a wrong choice of experts has no ratio; bfloat16 has what rounds to it by design
    measured = [
        id
        for id in acting
        if CATALOGUE[id].taps != ("expert_ids",) and not (profile.name == "bfloat16" and CATALOGUE[id].grain)
    ]
    mistakes = {}
    for i, id in enumerate(measured):
        say(f"{i + 1} of {len(measured)}: {id}")
        mistakes[id] = max(ratios(goldens[0], checkpoint, INJECTIONS[id], profile).values())
    return Found(clean, mistakes)


def main(paths: list[str]) -> int:
    """Print the table; 1 if some clean run is above the allowance or some mistake between the two."""
    pairs = [(path, profile) for path in paths for profile in EVERY] if paths else DEFAULT
    failed = False
    for path, name in pairs:

        def say(text: str, what: str = f"{path}, {name}") -> None:
            if sys.stderr.isatty():
                print(f"\r\033[K{what}: {text}", end="", file=sys.stderr, flush=True)

        found = calibrate(open_checkpoint(Path(path)), profile_named(name), say)
        say("")
        level = min(SAME * found.clean, ALLOWANCE)
        same, missed, above = found.within(-1, level), found.within(level, ALLOWANCE), found.within(ALLOWANCE, np.inf)
        print(f"\r{path}, {name}: clean {found.clean:.2f} at the most of {SEEDS} runs, allowance {ALLOWANCE:g}")
        print(f"   {len(above)} mistakes above it, nearest: " + ", ".join(above[:NEAREST]))
        print(f"   {len(same)} as a clean run on these tokens" + f": {', '.join(same)}" * bool(same))
        if missed:
            print(f"   {len(missed)} between the two: " + ", ".join(missed))
        sys.stdout.flush()
        failed = failed or found.clean > ALLOWANCE or bool(missed)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
