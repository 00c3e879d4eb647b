"""SmolLM2-135M as llama.cpp's quantiser makes it: K-quants and their mixtures, against llama.cpp itself.

llama.cpp rounds activations to 8 bits before each product with such weights. How much that moves its logits is
measured without us: on the same weights, widened to float32 by llama.cpp, it does no such rounding. There the oracle
must agree to float32 accuracy, every greedy token included; on the file as it is, the distance must be that noise and
nothing else, and every tensor within its allowance once the oracle rounds activations as ggml does.

576 columns are no whole K-quant blocks, so only ffn_down is K-quantised here: Q3_K, Q4_K, Q5_K, Q6_K; the other
matrices get Q4_0, Q5_0, Q5_1 or Q8_0.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from assay.fast.cpu.engine import CpuModel
from assay.golden.backends import open_backend
from assay.golden.check import check
from assay.golden.noise import profile_named
from assay.golden.record import record
from assay.loaders import Checkpoint, open_checkpoint
from assay.reference.generate import Sampling, generate
from assay.reference.taps import default_taps
from tests.test_smollm2_peers import NEW_TOKENS, greedy, oracle_greedy, quiet_stderr, smollm2

pytestmark = pytest.mark.peers

# a text of 16 tokens, and what each file continues
TEXT = "Photosynthesis is the process by which plants make sugar. The capital of France is"
PROMPTS = {
    "Q4_K_M": "Water boils at",
    "Q5_K_M": "def fibonacci(n):\n    ",
    "Q6_K": "The capital of France is",
    "Q3_K_M": "Photosynthesis is the process by which",
    "Q2_K": "Photosynthesis is the process by which",
    "Q8_0": "def fibonacci(n):\n    ",
}
K_QUANTS = {"Q4_K_M": {"Q4_K", "Q6_K"}, "Q5_K_M": {"Q5_K", "Q6_K"}, "Q6_K": {"Q6_K"}, "Q3_K_M": {"Q4_K", "Q5_K"}}
K_QUANTS |= {"Q2_K": {"Q3_K"}, "Q8_0": set()}


class Quantised(NamedTuple):
    """A quantised file, and llama.cpp on it and on the same weights in float32."""

    name: str
    checkpoint: Checkpoint
    as_it_is: Any
    in_float32: Any


def quantise(source: Path, target: Path, ftype: int) -> Path:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = ftype, True
    with quiet_stderr():
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    assert status == 0
    return target


@pytest.fixture(scope="module", params=PROMPTS)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quantised]:
    import llama_cpp

    folder, name = tmp_path_factory.mktemp("smollm2"), request.param
    path, widened = folder / f"{name}.gguf", folder / "f32.gguf"
    quantise(smollm2(), path, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"))
    quantise(path, widened, llama_cpp.LLAMA_FTYPE_ALL_F32)
    options: dict[str, Any] = {"n_ctx": 64, "logits_all": True, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
    f32 = llama_cpp.GGML_TYPE_F32
    as_it_is, in_float32 = (
        llama_cpp.Llama(str(path), **options),
        llama_cpp.Llama(str(widened), type_k=f32, type_v=f32, **options),
    )
    yield Quantised(name, open_checkpoint(path), as_it_is, in_float32)
    widened.unlink()  # half a gigabyte each


def logits(llama: Any, ids: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)], np.float64)


def test_it_is_apart_from_llama_cpp_by_llama_cpp_s_own_rounding_of_activations(quantised: Quantised) -> None:
    checkpoint = quantised.checkpoint
    assert K_QUANTS[quantised.name] <= {tensor.encoding.name for tensor in checkpoint.tensors.values()}
    ids = checkpoint.tokenizer.encode(TEXT).ids
    golden = record(checkpoint, open_backend("reference", checkpoint), ids)

    ours = np.asarray(golden.taps["logits"], np.float64)
    theirs, exact = (logits(llama, ids) for llama in (quantised.as_it_is, quantised.in_float32))
    size = np.linalg.norm(exact)
    assert np.linalg.norm(ours - exact) < 2e-6 * size  # measured: 6.2e-7 to 9.1e-7
    noise = np.linalg.norm(theirs - exact)  # measured: 0.041 to 0.096 of the logits
    assert 0.02 < noise / size < 0.2
    assert np.linalg.norm(theirs - ours) / noise == pytest.approx(1, abs=1e-3)

    backend = open_backend("llama.cpp", checkpoint)
    taps = backend.run(ids, [len(ids)], default_taps(checkpoint.config))
    report = check(golden, checkpoint, taps, "llama.cpp", profile_named(backend.profile))
    assert report.verdict == "match"
    ratios = {result.tap: result.ratio or 0.0 for result in report.taps}
    assert max(ratios.values()) < 2  # measured: at most 1.5
    assert ratios["logits"] == pytest.approx(1, abs=0.01)  # the emulated rounding of its input is all of its error


def test_greedy_continuation_is_llama_cpp_s_on_the_same_weights_in_float32(quantised: Quantised) -> None:
    checkpoint = quantised.checkpoint
    ids = checkpoint.tokenizer.encode(PROMPTS[quantised.name]).ids
    assert oracle_greedy(checkpoint, ids) == greedy(quantised.in_float32, ids, checkpoint.stop_tokens)


@pytest.mark.parametrize("quantised", ["Q4_K_M", "Q5_K_M", "Q6_K"], indirect=True)
def test_the_cpu_path_computes_it_in_both_modes(quantised: Quantised) -> None:
    """Each tensor within its allowance, and in float32 the oracle's text: the one that is llama.cpp's in float32."""
    checkpoint = quantised.checkpoint
    ids = checkpoint.tokenizer.encode(TEXT).ids
    golden = record(checkpoint, open_backend("reference", checkpoint), ids)
    for mode in ("exact", "q8"):
        backend = open_backend("cpu", checkpoint, mode)
        taps = backend.run(ids, [len(ids) - 2, 1, 1], golden.taps)  # by tiles, and token by token
        assert check(golden, checkpoint, taps, "cpu", profile_named(backend.profile)).verdict == "match"
    prompt = checkpoint.tokenizer.encode(PROMPTS[quantised.name]).ids
    model = CpuModel(checkpoint.config, checkpoint.tensors)
    past = model.new_cache()
    step = lambda new: model.forward(new, cache=past)  # noqa: E731
    text = list(generate(step, prompt, NEW_TOKENS, Sampling(), frozenset(checkpoint.stop_tokens)))
    assert text == greedy(quantised.in_float32, prompt, checkpoint.stop_tokens)
