"""The bundled tiny gpt-oss: random weights, every feature on (made by tests/make_checkpoints.py)."""

from pathlib import Path

TINY = Path(__file__).parent / "tiny"
# longer than the sliding window of 16, and two chunks of text so that attention has something to choose from
PROMPT = (
    "Once the window has passed, a key is gone: only layers that see everything remember how the sentence began. "
    "Numbers like 1024 and 3.14 count, and so do CAPITALS."
)
