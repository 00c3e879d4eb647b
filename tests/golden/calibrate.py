"""Where the allowance lies: between the most that a clean backend shows and the least that a mistake does.

    python -m tests.golden.calibrate [CHECKPOINT...]

Over several prompts the Numba path is checked clean, and with each mistake of the catalogue that is injected into it,
in float32 and rounded to bfloat16. Prints the largest clean ratio and the mistakes that are nearest to the allowance;
exits with 1 if the allowance does not separate the two. Needs no peer.
`tests.golden.clean_sweep` measures the clean side on other backends, the peers' tests the other one on transformers.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from assay.golden.backends import open_backend
from assay.golden.forced import forced_pass, noisy_pass
from assay.golden.measure import ALLOWANCE, Comparison, compare
from assay.golden.mistakes import CATALOGUE
from assay.golden.mistakes.injections import INJECTIONS, Injection
from assay.golden.noise import Profile, profile_named
from assay.golden.record import record
from assay.golden.selftest import CLEARLY, coverage, good_prompt
from assay.golden.store import Golden
from assay.loaders import Checkpoint, open_checkpoint
from assay.reference.taps import default_taps, tap_table
from tests.checkpoint_files import CHECKPOINTS

SEEDS = 3
NEAREST = 5  # mistakes that are listed


def ratios(golden: Golden, checkpoint: Checkpoint, injection: Injection, profile: Profile) -> dict[str, float]:
    """Each tap's ratio in a run of the Numba path with a mistake in it; infinite for values that are not finite."""
    ran, names = golden.provenance, default_taps(checkpoint.config)
    with injection.backend(checkpoint, profile.name == "bfloat16") as backend, np.errstate(all="ignore"):
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


def calibrate(checkpoint: Checkpoint, profile: Profile) -> tuple[float, dict[str, float]]:
    """The largest clean ratio over SEEDS prompts, and every visible mistake's largest one on any of its taps."""
    clean, mistakes = 0.0, {}
    for seed in range(SEEDS):
        tokens, chunks = good_prompt(checkpoint, seed)
        golden = record(checkpoint, open_backend("reference", checkpoint), tokens, chunks=chunks)
        clean = max(clean, *ratios(golden, checkpoint, Injection(), profile).values())
        if seed == 0:
            for id in coverage(golden, checkpoint, profile)["visible"]:
                if id in INJECTIONS and CATALOGUE[id].taps != ("expert_ids",):
                    mistakes[id] = max(ratios(golden, checkpoint, INJECTIONS[id], profile).values())
    return clean, mistakes


def main(paths: list[str]) -> int:
    """Print the table; 1 if some clean run is above the allowance or some mistake below it."""
    failed = False
    for path in paths or [str(CHECKPOINTS / "gpt_oss/hf"), str(CHECKPOINTS / "llama/hf")]:
        checkpoint = open_checkpoint(Path(path))
        for name in ("float32", "bfloat16"):
            clean, mistakes = calibrate(checkpoint, profile_named(name))
            if name == "bfloat16":  # roundings to bfloat16 are none there
                mistakes = {id: ratio for id, ratio in mistakes.items() if not CATALOGUE[id].grain}
            weakest = sorted(mistakes.items(), key=lambda item: item[1])[:NEAREST]
            print(
                f"{path}, {name}: clean {clean:.2f} at the most; allowance {ALLOWANCE:g}; of {len(mistakes)} mistakes"
            )
            print("   nearest to it: " + ", ".join(f"{id} {ratio:.4g}" for id, ratio in weakest), flush=True)
            failed = failed or clean > ALLOWANCE or weakest[0][1] <= ALLOWANCE
    print(f"visible is a mistake of more than {CLEARLY:g} times the allowance at its own taps, one step at a time")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
