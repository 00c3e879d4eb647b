"""One engine in a process of its own, told what to do by JSON lines on standard input, answering the same way.

`python -m tests.speed.worker ENGINE FILE THREADS LONGEST SEQUENCES`; see `tests.speed.paired`.
"""

import json
import os
import resource
import sys
from pathlib import Path
from time import perf_counter

started = perf_counter()  # before the imports that take time

import numpy as np  # noqa: E402

from tests.speed.engines import Engine, open_engine  # noqa: E402
from tests.speed.resident import peak  # noqa: E402

LONGEST_PROMPT = 8  # of a batch's sequences


def memory() -> dict[str, float]:
    """Megabytes: the largest ever resident, and what is resident now, private and mapped from files."""
    try:
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:  # not Linux
        return {"peak": peak(resource.getrusage(resource.RUSAGE_SELF))}
    kilobytes = {"peak": "VmHWM", "private": "RssAnon", "mapped": "RssFile"}
    return {what: int(status[key].split()[0]) * 1024 / 1e6 for what, key in kilobytes.items()}


def tokens(seed: int, *shape: int, vocabulary: int) -> np.ndarray:
    """Random tokens, the same for every engine."""
    return np.random.default_rng(seed).integers(0, vocabulary, shape)


def do(engine: Engine, order: dict, vocabulary: int) -> dict:
    """Carry out one order of timed work."""
    what = order["do"]
    if what == "prefill":
        return {"seconds": engine.prefill(tokens(order["seed"], order["T"], vocabulary=vocabulary))}
    if what == "decode":
        prompt = tokens(0, order["past"], vocabulary=vocabulary)
        return {"seconds": engine.decode(prompt, tokens(order["seed"], order["N"], vocabulary=vocabulary))}
    assert what == "batch"
    # lengths of their own, but short: prompts are not timed, and a slow engine takes a minute for 20 of 64 tokens
    prompts = [tokens(b, 1 + b % LONGEST_PROMPT, vocabulary=vocabulary) for b in range(order["B"])]
    steps = tokens(order["seed"], order["N"], order["B"], vocabulary=vocabulary)
    return {"seconds": engine.batch(prompts, steps)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes elsewhere
    name, path = sys.argv[1], Path(sys.argv[2])
    threads, longest, sequences, vocabulary = map(int, sys.argv[3:7])
    engine = open_engine(name, path, threads, longest, sequences)
    opened = perf_counter() - started
    first = engine.prefill(tokens(99, 8, vocabulary=vocabulary))
    answer: dict = {"info": engine.info, "opened": opened, "first": first}
    private = 0.0
    while True:
        now = memory()
        private = max(private, now.get("private", 0.0))
        answers.write(json.dumps(answer | {"memory": now | {"largest private seen": private}}) + "\n")
        line = sys.stdin.readline()
        if not line:
            return
        order = json.loads(line)
        if order["do"] != "logits":
            answer = do(engine, order, vocabulary)
            continue
        asked = engine if order["engine"] == name else open_engine(order["engine"], path, threads, longest, sequences)
        np.save(order["out"], asked.logits(np.array(order["tokens"])))
        answer = {}


if __name__ == "__main__":
    main()
