"""What the oracle takes: `assay record` and then `assay check`, each a process of its own, with all default taps.

    python -m tests.speed.oracle                         a synthetic gpt-oss of 24 layers and small widths
    python -m tests.speed.oracle gpt-oss-20b.gguf        any other checkpoint

Prints wall clock and CPU seconds and the most that was resident.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from assay.loaders.registry import Shape, find_shape
from assay.loaders.synth import synth
from tests.speed.resident import peak


def small(layers: int = 24) -> Shape:
    """gpt-oss-20b with a tenth of its widths, and eight experts."""
    shape = find_shape("gpt-oss-20b")
    config = replace(
        shape.shortened(layers),
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
    )
    return replace(shape, config=config, special_tokens={0: "<bos>", 1: "<eos>", 2: "<pad>"}, bos=0, eos=1, pad=2)


def run(*arguments: object) -> float:
    """Run an `assay` command, print what it took, answer its seconds; exits where the command fails."""
    command = [sys.executable, "-m", "assay.cli", *map(str, arguments)]
    started = time.perf_counter()
    process = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(process, 0)
    took = time.perf_counter() - started
    cpu, resident = usage.ru_utime + usage.ru_stime, peak(usage) / 1e3
    print(f"assay {arguments[0]}: {took:.1f} s, {cpu:.1f} s of CPU, {resident:.2f} GB resident", flush=True)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(code)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of recording a golden and of checking with it.")
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--mode", default="q8")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = given.path
        if path is None:
            path = folder / "small.gguf"
            synth(small(), path, "gguf")
        ids = ",".join(str((i * 7919 + 13) % 2000) for i in range(given.tokens))
        golden = folder / "golden.safetensors"
        recorded = run("record", path, "--tokens", ids, "--out", golden)
        checked = run("check", golden, "--backend", given.backend, "--mode", given.mode, "--model", path)
    print(f"the check took {checked / recorded:.2f} times as long as the oracle")


if __name__ == "__main__":
    main()
