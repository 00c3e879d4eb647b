"""A run beside the last saved one: `python -m tests.speed.compare RUN.json [SAVED.json]`.

Of the times a drift of the machine is part; of the shares of the limit, measured in each run, much less.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

STORE = Path(".benchmarks")


def last_saved() -> Path:
    """The newest file that `make bench` saved."""
    saved = sorted(STORE.glob("*/*.json"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise SystemExit(f"no saved run under {STORE.resolve()}: make bench saves one")
    return saved[-1]


def by_name(path: Path) -> dict[str, Any]:
    return {bench["fullname"]: bench for bench in json.loads(path.read_text("utf-8"))["benchmarks"]}


def compare(now: Path, before: Path) -> None:
    """Print, for each benchmark of both: the times, their ratio (above 1: faster now), and that of the shares."""
    new, old = by_name(now), by_name(before)
    print(f"{now} beside {before}; ratios above 1: better now")
    print(f"{'before':>10} {'now':>10} {'time':>6} {'share':>6}")
    ratios: list[float] = []
    for name in [name for name in new if name in old]:
        times = [1e3 * run[name]["stats"]["median"] for run in (old, new)]
        shares = [run[name]["extra_info"].get("share of limit") for run in (old, new)]
        share = f"{shares[1] / shares[0]:6.2f}" if all(shares) else " " * 6
        ratios.append(times[0] / times[1])
        print(f"{times[0]:8.3f}ms {times[1]:8.3f}ms {ratios[-1]:6.2f} {share}  {name.partition('::')[2]}")
    if ratios:
        print(f"{len(ratios)} benchmarks, geometric mean of the ratios {statistics.geometric_mean(ratios):.2f}")
    for what, names in (("only now", new.keys() - old.keys()), ("only before", old.keys() - new.keys())):
        if names:
            print(f"{what}: {', '.join(sorted(name.partition('::')[2] for name in names))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("saved", type=Path, nargs="?")
    arguments = parser.parse_args()
    compare(arguments.run, arguments.saved or last_saved())
