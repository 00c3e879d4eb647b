"""What `convert` writes, read by the engines it is for: their logits equal those on the original tool's conversion."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay.loaders.checkpoint import open_checkpoint
from assay.loaders.convert import convert
from assay.loaders.synth import synth
from assay.reference import forward
from tests import tiny
from tests.checkpoint_files import CHECKPOINTS, expected, tokens_of
from tests.loaders.test_synth import tiny as small_shape

pytestmark = pytest.mark.peers


def converted(name: str, to: str, tmp_path: Path) -> Path:
    target = tmp_path / ("model.gguf" if to == "gguf" else to)
    convert(open_checkpoint(CHECKPOINTS / name), target, to)
    return target


def nmse(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


def oracle_logits(path: Path, tokens: list[int]) -> np.ndarray:
    return forward(open_checkpoint(path).model(), np.array(tokens))


@pytest.mark.parametrize("source", ["gpt_oss/hf", "gpt_oss/mlx", "llama/hf", "phi3/hf"])
def test_llama_cpp_gives_the_logits_of_its_own_conversion(source: str, tmp_path: Path) -> None:
    family = source.split("/")[0]
    tokens = tokens_of(family)
    ours = converted(source, "gguf", tmp_path)
    own = CHECKPOINTS / family / "gguf" / "model.gguf"
    np.testing.assert_array_equal(tiny.llama_cpp_logits(ours, tokens), tiny.llama_cpp_logits(own, tokens))


@pytest.mark.parametrize("source", ["gpt_oss/hf", "gpt_oss/gguf"])
def test_mlx_lm_gives_the_logits_of_its_own_conversion(source: str, tmp_path: Path) -> None:
    tokens = tokens_of("gpt_oss")
    ours = converted(source, "mlx", tmp_path)
    np.testing.assert_array_equal(
        tiny.mlx_logits(ours, tokens), tiny.mlx_logits(CHECKPOINTS / "gpt_oss" / "mlx", tokens)
    )


@pytest.mark.parametrize("source", ["llama/gguf", "mistral/hf", "phi3/gguf"])
def test_mlx_lm_gives_the_logits_of_its_own_conversion_of_a_dense_model(source: str, tmp_path: Path) -> None:
    family = source.split("/")[0]
    tokens = tokens_of(family)
    own = tiny.to_mlx(CHECKPOINTS / family / "hf", tmp_path / "own")
    ours = converted(source, "mlx", tmp_path)
    np.testing.assert_array_equal(tiny.mlx_logits(ours, tokens), tiny.mlx_logits(own, tokens))


def test_llama_cpp_computes_a_converted_mistral(tmp_path: Path) -> None:
    """Without its window, which llama.cpp ignores."""
    tokens = tokens_of("mistral")
    ours = converted("mistral/hf", "gguf", tmp_path)
    source = open_checkpoint(CHECKPOINTS / "mistral" / "hf")
    unwindowed = replace(source, config=replace(source.config, sliding_window=None))
    wanted = forward(unwindowed.model(), np.array(tokens))
    assert nmse(tiny.llama_cpp_logits(ours, tokens), wanted) < 1e-4  # a cache in 16 bits


@pytest.mark.parametrize("source", ["gpt_oss/gguf", "gpt_oss/mlx", "llama/gguf", "mistral/hf", "phi3/gguf"])
def test_transformers_gives_the_logits_of_the_original(source: str, tmp_path: Path) -> None:
    family = source.split("/")[0]
    if source == "mistral/hf":  # by way of MLX
        converted(source, "mlx", tmp_path)
        convert(open_checkpoint(tmp_path / "mlx"), tmp_path / "safetensors", "safetensors")
        ours = tmp_path / "safetensors"
    else:
        ours = converted(source, "safetensors", tmp_path)
    taps = tiny.transformers_taps(ours, tokens_of(family))
    # the same weights in another order of loading: float32 noise at most
    np.testing.assert_allclose(taps["logits"], expected(family)["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("source", ["llama/gguf-q8_0", "llama/gguf-q4_0", "llama/gguf-q4_1"])
def test_mlx_lm_computes_ggufs_quantised_weights(source: str, tmp_path: Path) -> None:
    tokens = tokens_of("llama")
    ours = converted(source, "mlx", tmp_path)
    wanted = oracle_logits(CHECKPOINTS / source / "model.gguf", tokens)
    assert nmse(tiny.mlx_logits(ours, tokens), wanted) < 1e-4  # 16-bit activations


def test_llama_cpp_computes_mlx_quantised_weights(tmp_path: Path) -> None:
    tokens = tokens_of("llama")
    ours = converted("llama/mlx-4bit", "gguf", tmp_path)
    wanted = oracle_logits(CHECKPOINTS / "llama" / "mlx-4bit", tokens)
    assert nmse(tiny.llama_cpp_logits(ours, tokens), wanted) < 1e-3  # activations in 8 bits


def test_transformers_reads_decoded_blocks(tmp_path: Path) -> None:
    tokens = tokens_of("llama")
    ours = converted("llama/gguf-q8_0", "safetensors", tmp_path)
    wanted = oracle_logits(CHECKPOINTS / "llama" / "gguf-q8_0" / "model.gguf", tokens)
    np.testing.assert_allclose(tiny.transformers_taps(ours, tokens)["logits"], wanted, rtol=0, atol=2e-5)


def test_tokenizers_of_the_engines_give_the_same_ids(tmp_path: Path) -> None:
    from llama_cpp import Llama
    from transformers import AutoTokenizer

    text = "The river's 1953 mill: WHAT YOU WATCH, \"isn't it\"?\n\n  caf\u00e9 \u4f60\u597d"
    wanted = open_checkpoint(CHECKPOINTS / "llama" / "hf").tokenizer.encode(text).ids
    gguf = converted("llama/hf", "gguf", tmp_path)
    directory = tmp_path / "back"
    convert(open_checkpoint(gguf), directory, "safetensors")
    assert AutoTokenizer.from_pretrained(directory).encode(text) == wanted
    assert Llama(str(gguf), vocab_only=True, verbose=False).tokenize(text.encode(), special=True) == wanted
    assert json.loads((directory / "generation_config.json").read_text())["bos_token_id"] == wanted[0]


@pytest.mark.parametrize(
    ("to", "encoder", "bound"),
    [
        ("gguf", None, 1e-3),  # llama.cpp's activations in 8 bits
        ("safetensors", None, 1e-9),
        ("mlx", "affine8/64 F32", 1e-9),  # with bfloat16 scales MLX rounds s q + b: 3e-3
    ],
)
@pytest.mark.parametrize("name", ["smollm2-135m", "phi-3-mini"])
def test_engines_read_random_checkpoints(name: str, to: str, encoder: str | None, bound: float, tmp_path: Path) -> None:
    target = tmp_path / ("model.gguf" if to == "gguf" else to)
    synth(small_shape(name), target, to, layers=2, encoder=encoder)
    tokens = open_checkpoint(target).tokenizer.encode("The river and the mill, and the other river").ids
    engine = {"gguf": tiny.llama_cpp_logits, "safetensors": transformers_logits, "mlx": tiny.mlx_logits}[to]
    assert nmse(engine(target, tokens), oracle_logits(target, tokens)) < bound


def test_transformers_reads_a_random_gpt_oss(tmp_path: Path) -> None:
    synth(small_shape("gpt-oss-20b"), tmp_path / "hf", "safetensors", layers=2)
    tokens = open_checkpoint(tmp_path / "hf").tokenizer.encode("The river and the mill").ids
    np.testing.assert_allclose(
        transformers_logits(tmp_path / "hf", tokens), oracle_logits(tmp_path / "hf", tokens), rtol=0, atol=2e-4
    )


def transformers_logits(directory: Path, tokens: list[int]) -> np.ndarray:
    return tiny.transformers_taps(directory, tokens)["logits"]
