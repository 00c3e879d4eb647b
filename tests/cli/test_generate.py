"""assay generate: the oracle's text and ids, streamed; reproducible, and stopped where it should."""

import numpy as np
import pytest

from tests.checkpoint_files import CHECKPOINTS, copied, edit_json, expected, opened, tokens_of
from tests.cli.run import refused, run

LLAMA = CHECKPOINTS / "llama/hf"
PROMPT = "The river went past"
IDS = ",".join(map(str, tokens_of("llama")))


def generated(*arguments, model=LLAMA) -> str:
    result = run("generate", model, "--backend", "reference", *arguments)
    assert result.status == 0, result
    assert "tokens in" in result.err
    return result.out


def ids(*arguments, model=LLAMA) -> list[int]:
    return [int(word) for word in generated("--tokens", IDS, *arguments, model=model).split()]


def test_greedy_ids_are_reproducible_and_start_with_transformers_s_choice():
    first = ids("--max-tokens", 6)
    assert first == ids("--max-tokens", 6, "--seed", 5) == ids("--max-tokens", 6, "--top-k", 1, "--temperature", 2)
    assert len(first) == 6
    assert first[0] == expected("llama")["logits"][-1].argmax()
    assert ids("--max-tokens", 3) == first[:3]


def test_seeds():
    def sampled(seed: int) -> list[int]:
        return ids("--max-tokens", 12, "--temperature", 1.5, "--seed", seed)

    assert sampled(1) == sampled(1) != sampled(2)


def test_settings_reach_the_sampler():
    greedy = ids("--max-tokens", 8)
    hot = ["--max-tokens", 8, "--temperature", 100, "--seed", 3]
    assert ids(*hot) != greedy
    assert ids(*hot, "--top-p", 1e-9) == greedy
    assert ids("--max-tokens", 1, "--repetition-penalty", 1e6) != greedy[:1] or greedy[0] not in tokens_of("llama")


@pytest.mark.parametrize("seed", range(4))
def test_text_is_what_the_tokenizer_makes_of_the_ids(seed):
    """Streamed piece by piece, it is the whole text: also when it ends inside a character."""
    tokenizer = opened("llama/hf").tokenizer
    prompt_ids = ",".join(map(str, tokenizer.encode(PROMPT).ids))
    settings = ["--max-tokens", 20, "--temperature", 3, "--seed", seed]
    out = [int(word) for word in generated("--tokens", prompt_ids, *settings).split()]
    assert generated("--prompt", PROMPT, *settings) == tokenizer.decode(out, skip_special_tokens=False) + "\n"


def test_a_stop_token_ends_it(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    greedy = ids("--max-tokens", 5)
    edit_json(folder / "generation_config.json", lambda c: c.__setitem__("eos_token_id", [1, greedy[0]]))
    assert ids("--max-tokens", 5, model=folder) == greedy[:1]


def test_the_context_bounds_it(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    edit_json(folder / "config.json", lambda c: c.__setitem__("max_position_embeddings", 43))
    assert ids("--max-tokens", 64, model=folder) == ids("--max-tokens", 3)


def test_tokens_from_a_file_and_other_containers(tmp_path):
    (tmp_path / "tokens.txt").write_text(IDS)
    out = [
        generated("--tokens", f"@{tmp_path}/tokens.txt", "--max-tokens", 4, model=CHECKPOINTS / name)
        for name in ("llama/hf", "llama/gguf")
    ]
    assert out[0] == out[1] != ""


WRONG = {
    "neither prompt nor tokens": ([], "either --prompt or --tokens"),
    "outside the vocabulary": (["--tokens", "384"], "token outside the vocabulary"),
    "no tokens": (["--tokens", ","], "no tokens to run"),
    "top-p": (["--tokens", "1", "--top-p", "0"], "0 < top_p <= 1"),
    "penalty": (["--tokens", "1", "--repetition-penalty", "0"], "repetition_penalty > 0"),
    "temperature": (["--tokens", "1", "--temperature", "inf"], "finite temperature"),
    "backend": (["--tokens", "1", "--backend", "vllm"], "cannot generate with backend 'vllm'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_generated(case):
    arguments, part = WRONG[case]
    assert part in refused("generate", LLAMA, *arguments)


def test_text_without_a_tokenizer(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused("generate", folder, "--prompt", "a text")
    assert len(ids("--max-tokens", 2, model=folder)) == 2


def test_the_logits_of_the_checkpoint_are_not_flat():
    """The greedy choices above are choices: the most likely token leads clearly."""
    top = np.sort(expected("llama")["logits"][-1])
    assert top[-1] - top[-2] > 1e-3
