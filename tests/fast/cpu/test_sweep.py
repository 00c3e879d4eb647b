"""A share of the sweep (see `tests.fast.cpu.sweep`): one checkpoint of each container over a window of 128."""

import pytest

from assay.fast.engine import CPU_MODES
from tests.fast.cpu.sweep import Row, reports, subjects

pytestmark = pytest.mark.long

# the largest ratios of the whole sweep are below 2: half of the allowance is a change to look into
LARGEST_RATIO = 2.0


@pytest.mark.parametrize("name", ["gpt_oss/gguf", "mistral/hf", "gpt_oss/mlx"])
def test_prompts_over_the_window(name, tmp_path):
    checkpoint = next(checkpoint for known, checkpoint in subjects(name, tmp_path) if known.endswith("window 128"))
    rows = {mode: Row() for mode in CPU_MODES}
    for mode, told, report in reports(checkpoint, [1, 129], CPU_MODES):
        rows[mode].add(told, report)
        assert report.not_supplied == []
    for row in rows.values():
        assert row.count == row.matching == 4
        assert row.largest < LARGEST_RATIO, row.where
