"""A share of the fuzz run for every day; the whole one is `python -m tests.loaders.fuzz --count 20000`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.loaders import fuzz
from tests.loaders.mutations import make_case

COUNT = 300

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="limits and measures need Linux")


def test_spoilt_checkpoints_end_well():
    answers = fuzz.run(range(COUNT), seed=20_000, workers=min(4, os.cpu_count() or 1))
    assert [answer["case"] for answer in answers] == list(range(COUNT))
    assert all(map(fuzz.is_fine, answers)), fuzz.summary(answers)
    outcomes = [answer["outcome"] for answer in answers]
    assert (
        min(outcomes.count("opened"), outcomes.count("refused")) > COUNT // 10
    )  # neither all harmless nor all hopeless


def test_the_same_seed_makes_the_same_case(tmp_path):
    for case in range(20):
        contents = []
        for copy in ("a", "b"):
            folder = tmp_path / copy / str(case)
            folder.parent.mkdir(exist_ok=True)
            _, done = make_case(Random(f"7/{case}"), folder)
            files = sorted(path for path in folder.iterdir() if path.is_file() and path.resolve() != Path("/dev/zero"))
            contents.append((done, [(path.name, path.read_bytes()) for path in files]))
        assert contents[0] == contents[1]


FAULTY = {
    "an exception": ("raise KeyError('x')", "KeyError"),
    "memory": ("import numpy; numpy.empty(80 << 20, numpy.uint8)", "MemoryError"),
    "memory in small pieces": ("x = [bytes(1000) for _ in range(80_000)]", "MemoryError"),
    "a loop": ("while True: pass", "died or hung"),
    "a crash": ("import os; os.abort()", "died or hung"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_the_limits_hold(fault, tmp_path):
    """A reader with a fault in it, in a worker of its own: the fuzz run would say so."""
    body, words = FAULTY[fault]
    program = (
        "import json, pathlib, random\n"
        "from tests.loaders import fuzz\n"
        f"def examine(path, rng):\n    {body}\n"
        "fuzz.examine = examine\n"
        f"print(json.dumps(fuzz._limited(pathlib.Path({str(tmp_path)!r}), random.Random(0))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | fuzz.ENVIRONMENT, timeout=60
    )
    outcome = json.loads(done.stdout)["outcome"] if done.returncode == 0 else "the worker died or hung"
    assert words in outcome
    assert not fuzz.is_fine({"outcome": outcome, "beyond": 0})
