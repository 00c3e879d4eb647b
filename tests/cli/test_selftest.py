"""What `assay selftest` prints."""

from tests.checkpoint_files import CHECKPOINTS
from tests.cli.run import run
from tests.golden.faults import GPT_OSS


def test_the_tokens_it_suggests_are_one_line_that_record_takes(tmp_path):
    """Wrapped at the width of a pipe, a token id would be cut in two."""
    checkpoint, short, longer = CHECKPOINTS / GPT_OSS, tmp_path / "short.safetensors", tmp_path / "longer.safetensors"
    assert run("record", checkpoint, "--tokens", "5,9,3", "--out", short).status == 0
    said = run("selftest", "--model", checkpoint, "--golden", short).out
    (line,) = (line for line in said.splitlines() if line.startswith("--tokens 5,9,3,"))
    assert run("record", checkpoint, *line.split(), "--taps", "logits", "--out", longer).status == 0
