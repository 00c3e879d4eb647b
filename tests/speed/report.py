"""What a paired run found, and how it is printed: tables in Markdown."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from assay.loaders import Checkpoint
from assay.reference.config import GptOssConfig
from tests.speed.limits import Limits
from tests.speed.work import matrix_bytes, token_work


@dataclass(frozen=True)
class Work:
    """One thing that is timed."""

    name: str
    order: dict[str, Any]
    tokens: int


@dataclass
class Findings:
    """Everything that is printed."""

    path: str
    gigabytes: float
    machine: dict[str, Any]
    threads: int
    limits: list[Limits] = field(default_factory=list)
    info: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by work and engine
    start: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)


def print_findings(
    found: Findings,
    engines: Sequence[str],
    baseline: str,
    work: Sequence[Work],
    checkpoint: Checkpoint,
    arguments: argparse.Namespace,
) -> None:
    """Tables in Markdown."""
    print(f"{found.path}, {found.gigabytes:.2f} GB, {checkpoint.config.num_hidden_layers} layers")
    print(f"{', '.join(str(value) for value in found.machine.values())}; {found.threads} threads")
    for engine, info in found.info.items():
        print(f"- {engine}: {', '.join(f'{key} {value}' for key, value in info.items())}")
    for limits in found.limits:
        print(f"- measured before a round: {limits}")
    if found.limits and found.seconds:
        print()
        print_speeds(found, engines, baseline, work, checkpoint)
        print_starts(found, engines)
    if found.errors:
        against = f"the oracle's ({arguments.golden.name})" if arguments.golden else "the exact mode's"
        print(f"\nlogits of a prompt beside {against}, end to end:\n")
        print("| engine | NMSE | KL, nats | same top token |\n|---|---|---|---|")
        for engine, error in found.errors.items():
            print(f"| {engine} | {error['nmse']:.1e} | {error['kl_nats']:.1e} | {error['top1_agreement']:.0%} |")
    if found.checks:
        print(f"\nassay check, {arguments.check} tokens, each step by itself (the allowance is 4):\n")
        print(
            "| engine | profile | verdict | largest error, x noise | at | first divergence |\n|---|---|---|---|---|---|"
        )
        for engine, report in found.checks.items():
            ratio = f"{report['largest ratio']:.2f}"
            row = (engine, report["profile"], report["verdict"], ratio, report["at"], report["first divergence"] or "")
            print(f"| {' | '.join(row)} |")


def print_speeds(
    found: Findings, engines: Sequence[str], baseline: str, work: Sequence[Work], checkpoint: Checkpoint
) -> None:
    read = statistics.median(limits.read for limits in found.limits)
    columns = ["work", "engine", "median, s", "from - to", "tokens/s", f"/ {baseline}"]
    columns += ["GB/s of weights", f"of {read / 1e9:.1f}", "NMSE"]
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for item in work:
        medians = {engine: statistics.median(found.seconds[item.name][engine]) for engine in engines}
        for engine in engines:
            times = found.seconds[item.name][engine]
            rate = step_bytes(item, checkpoint) / medians[engine]
            columns = [
                item.name,
                engine,
                f"{medians[engine]:.3f}",
                f"{min(times):.3f} - {max(times):.3f}",
                f"{item.tokens / medians[engine]:.1f}",
                f"{medians[baseline] / medians[engine]:.2f}",
                f"{rate / 1e9:.1f}" if rate else "",
                f"{rate / read:.0%}" if rate else "",
                f"{found.errors[engine]['nmse']:.1e}" if engine in found.errors else "",
            ]
            print(f"| {' | '.join(columns)} |")


def print_starts(found: Findings, engines: Sequence[str]) -> None:
    print("\n| engine | first token, s | peak resident, MB | of it private | mapped |\n|---|---|---|---|---|")
    for engine in engines:
        memory, start = found.memory[engine], statistics.median(found.start[engine])
        private = memory.get("largest private seen", 0.0)
        print(f"| {engine} | {start:.2f} | {memory['peak']:.0f} | {private:.0f} | {memory.get('mapped', 0.0):.0f} |")
    print("\nfirst token: from the start of the process, 8 tokens of prompt, the file in the system's cache")


def step_bytes(item: Work, checkpoint: Checkpoint) -> float:
    """Bytes of weights that must be read: for each decoded token, or step of a batch. 0 for prompts."""
    if item.order["do"] == "decode":
        return item.order["N"] * token_work(checkpoint)[0]
    if item.order["do"] == "batch":
        config, B = checkpoint.config, item.order["B"]
        experts, others = matrix_bytes(checkpoint)
        share = 1.0
        if isinstance(config, GptOssConfig):  # of the experts that B tokens choose, were their choices independent
            share = 1 - (1 - config.num_experts_per_tok / config.num_local_experts) ** B
        return item.order["N"] * (share * experts + others)
    return 0.0
