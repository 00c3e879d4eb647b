"""assay generate: the oracle's text and ids, streamed; reproducible, and stopped where it should."""

import io
import signal
import subprocess
import sys

import numpy as np
import pytest

import assay.reference as reference
from assay.cli import shared
from assay.fast.engine import cache_bytes
from assay.loaders.registry import find_shape
from tests.checkpoint_files import CHECKPOINTS, copied, edit_json, edit_tensors, expected, opened, tokens_of
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


@pytest.mark.parametrize("model", ["llama/hf", "gpt_oss/gguf", "mistral/hf"])
def test_guesses_change_nothing(model):
    """A prompt that repeats itself, so that there is something to guess."""
    twice = ",".join(str(5 + i % 17) for i in range(40))
    asked = ["generate", CHECKPOINTS / model, "--tokens", twice, "--max-tokens", 30]
    plain, guessed = run(*asked), run(*asked, "--speculate", 5)
    assert plain.status == guessed.status == 0
    assert guessed.out == plain.out
    assert "guesses right" in " ".join(guessed.err.split())


def test_longrope_factors_that_change_on_the_way():
    """Every backend runs everything again there: greedy tokens are those of fresh passes over the whole sequence."""
    checkpoint = opened("phi3/hf")
    original = checkpoint.config.rope_scaling.original_max_position_embeddings
    prompt = [5 + 7 * i % 300 for i in range(original - 3)]
    seen = list(prompt)
    while len(seen) < original + 5 and seen[-1] not in checkpoint.stop_tokens:
        seen.append(int(reference.forward(checkpoint.model(), np.array(seen))[-1].argmax()))
    for backend in ("reference", "cpu"):
        asked = ["--tokens", ",".join(map(str, prompt)), "--max-tokens", 8, "--backend", backend]
        result = run("generate", CHECKPOINTS / "phi3/hf", *asked)
        assert [int(word) for word in result.out.split()] == seen[len(prompt) :], backend
    assert len(seen) > original + 1


def test_chat_is_the_template_filled_in(tmp_path):
    """What the user says goes where the template says, and tokens are those of that text."""
    folder = copied("llama/hf", tmp_path / "hf")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }} went past")
    asked = ["--backend", "reference", "--max-tokens", 8]
    chat, prompt = (
        run("generate", folder, *given, *asked) for given in (("--chat", "The river"), ("--prompt", PROMPT))
    )
    assert chat.status == 0
    assert chat.out == prompt.out
    assert "give one of" in refused("generate", folder, "--chat", "a", "--prompt", "b")


def test_ctrl_c_ends_it_with_what_there_is():
    """As a terminal does it: a signal while tokens come."""
    command = [sys.executable, "-m", "assay.cli", "generate", str(LLAMA), "--tokens", IDS, "--max-tokens", "400"]
    process = subprocess.Popen(
        [*command, "--backend", "reference"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    got = [int(word) for word in (first + out).split()]
    assert (first + out).endswith(b"\n")
    assert 0 < len(got) < 400
    assert got[:3] == ids("--max-tokens", 3)[: len(got)]
    assert b"interrupted" in err
    assert b"Traceback" not in err


def test_a_cache_that_memory_cannot_hold(monkeypatch):
    monkeypatch.setattr(shared, "free_memory", lambda: 1000)
    message = refused("generate", LLAMA, "--tokens", "1,2,3")
    assert "keys and values of 67 tokens" in message
    assert "fewer --max-tokens" in message


def test_the_size_of_a_cache():
    """gpt-oss-20b's, counted by hand: 12 layers of 128 positions at the most, 12 of all, 8 heads of 64, two float32."""
    config = find_shape("gpt-oss-20b").config
    float32, float16 = np.dtype(np.float32), np.dtype(np.float16)
    assert cache_bytes(config, 100, float32) == 24 * 100 * 8 * 64 * 2 * 4
    assert cache_bytes(config, 131072, float32) == (12 * 128 + 12 * 131072) * 8 * 64 * 2 * 4
    assert cache_bytes(config, 131072, float16) == (12 * 128 + 12 * 131072) * 8 * 64 * 2 * 2


def test_tokens_from_a_file_and_other_containers(tmp_path):
    (tmp_path / "tokens.txt").write_text(IDS)
    out = [
        generated("--tokens", f"@{tmp_path}/tokens.txt", "--max-tokens", 4, model=CHECKPOINTS / name)
        for name in ("llama/hf", "llama/gguf")
    ]
    assert out[0] == out[1] != ""


def typed(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))


ENDINGS = [(b"", ""), (b"\n", ""), (b"\r\n", ""), (b"\n\n", "\n"), (b" \n", " ")]


@pytest.mark.parametrize(("ending", "left"), ENDINGS)
def test_a_prompt_from_standard_input(monkeypatch, ending, left):
    """UTF-8 whatever the locale, and as it is but for one line break."""
    typed(monkeypatch, "Ein Flu\u00df\r\nging".encode() + ending)
    out = generated("--prompt", "-", "--max-tokens", 4)
    assert out == generated("--prompt", f"Ein Flu\u00df\r\nging{left}", "--max-tokens", 4)


def test_what_a_user_says_from_standard_input(tmp_path, monkeypatch):
    folder = copied("llama/hf", tmp_path / "hf")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} went past")
    typed(monkeypatch, b"The river\n")
    out = generated("--chat", "-", "--max-tokens", 4, model=folder)
    assert out == generated("--prompt", PROMPT, "--max-tokens", 4)


def test_standard_input_that_is_no_text(monkeypatch):
    typed(monkeypatch, b"caf\xe9\n")
    assert "--prompt is not UTF-8: invalid continuation byte at position 3" in refused(
        "generate", LLAMA, "--prompt", "-"
    )


@pytest.mark.parametrize(("stdin", "why"), [("<&-", "it is closed"), ("0>/dev/null", "Bad file descriptor")])
def test_standard_input_that_cannot_be_read(stdin, why):
    command = f'"{sys.executable}" -m assay.cli generate "{LLAMA}" --prompt - {stdin}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"assay: --prompt - reads standard input, which cannot be read: {why}\n")


WRONG = {
    "neither prompt nor tokens": ([], "either --prompt or --tokens"),
    "outside the vocabulary": (["--tokens", "384"], "token outside the vocabulary"),
    "no tokens": (["--tokens", ","], "no tokens to run"),
    "top-p": (["--tokens", "1", "--top-p", "0"], "0 < top_p <= 1"),
    "penalty": (["--tokens", "1", "--repetition-penalty", "0"], "repetition_penalty > 0"),
    "temperature": (["--tokens", "1", "--temperature", "inf"], "finite temperature"),
    "guesses, drawn": (["--tokens", "1", "--speculate", "4", "--temperature", "1"], "only greedy tokens"),
    "guesses, q8": (["--tokens", "1", "--speculate", "4", "--mode", "q8"], "logits of cpu q8 may depend"),
    "guesses, oracle": (["--tokens", "1", "--speculate", "4", "--backend", "reference"], "expected: --backend cpu"),
    "threads": (["--tokens", "1", "--threads", "4096"], "4096 threads: expected 1 to"),
    "threads, oracle": (
        ["--tokens", "1", "--threads", "1", "--backend", "reference"],
        "--threads goes with --backend cpu",
    ),
    "threads, metal": (["--tokens", "1", "--threads", "1", "--backend", "metal"], "--threads goes with --backend cpu"),
    "mode": (["--tokens", "1", "--mode", "int4"], "expected: exact, q8, exact-f16, q8-f16"),
    "beyond the context": (["--tokens", ",".join(["1"] * 512)], "fills the context"),
    "backend": (["--tokens", "1", "--backend", "vllm"], "cannot generate with backend 'vllm'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_generated(case):
    arguments, part = WRONG[case]
    assert part in refused("generate", LLAMA, *arguments)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_model_whose_logits_are_no_numbers(tmp_path, backend, temperature):
    folder = copied("llama/hf", tmp_path / "hf")

    def spoil(entries):
        dtype, shape, data = entries["model.norm.weight"]
        entries["model.norm.weight"] = dtype, shape, b"\xff" * len(data)

    edit_tensors(folder / "model.safetensors", spoil)
    asked = ["--tokens", "1,2", "--backend", backend, "--temperature", temperature]
    message = refused("generate", folder, *asked)
    assert "384 of 384 logits are NaN or infinite" in message
    if (backend, temperature) == ("cpu", 0):
        assert refused("generate", folder, *asked, "--speculate", 4) == message


def test_text_without_a_tokenizer(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused("generate", folder, "--prompt", "a text")
    assert len(ids("--max-tokens", 2, model=folder)) == 2


def test_the_logits_of_the_checkpoint_are_not_flat():
    """The greedy choices above are choices: the most likely token leads clearly."""
    top = np.sort(expected("llama")["logits"][-1])
    assert top[-1] - top[-2] > 1e-3
