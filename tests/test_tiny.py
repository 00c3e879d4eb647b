"""The committed checkpoints are what their manifest says; the makers behind them keep their promises."""

import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.golden.tiny_model import TINY
from assay.reference.formats.mx import MXFP4
from tests import tiny
from tests.make_checkpoints import CHECKPOINTS, FAMILIES, make_all, make_bundled, manifest_of
from tests.tiny_tokenizers import SPLIT, train_tokenizer

MEGABYTE = 1_000_000
HARD_TEXT = "Hello WORLD's 12345\n\n  caf\u00e9 \u4f60\u597d \U0001f680 I've\tnot\r\n  x /* y */ <|return|>"


def nmse(got: np.ndarray, expected: np.ndarray) -> float:
    """Mean squared error over the mean square of what was expected."""
    return float(np.square(got - expected).sum() / np.square(expected).sum())


def float32_of(path: Path, name: str) -> np.ndarray:
    """A bfloat16 tensor of a safetensors file as float32."""
    from safetensors import deserialize

    info = dict(deserialize(path.read_bytes()))[name]
    assert info["dtype"] == "BF16"
    bits = np.frombuffer(info["data"], np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(info["shape"])


# --- the committed files


def test_committed_files_are_those_of_the_manifest() -> None:
    manifest = json.loads((CHECKPOINTS / "manifest.json").read_text())
    assert manifest_of(CHECKPOINTS) == manifest["files"]


def test_committed_files_are_small() -> None:
    sizes = {path: info["bytes"] for path, info in manifest_of(CHECKPOINTS).items()}
    assert sum(size for path, size in sizes.items() if not path.startswith("gpt_oss/")) < 1.4 * MEGABYTE
    assert sum(size for path, size in sizes.items() if path.startswith("gpt_oss/")) < 1.6 * MEGABYTE


def test_committed_files_name_no_machine() -> None:
    paths = re.compile(rb"/(tmp|home|root|Users|var|work|mnt|private)/|[A-Z]:\\\\|_name_or_path")
    found = {p.name: paths.findall(p.read_bytes()) for p in CHECKPOINTS.rglob("*") if p.is_file()}
    assert {name: hits for name, hits in found.items() if hits} == {}


@pytest.mark.parametrize(
    ("family", "file", "head"),
    [
        ("gpt_oss", "model-00001-of-00002.safetensors", "lm_head.weight"),
        ("llama", "model.safetensors", "model.embed_tokens.weight"),
        ("mistral", "model.safetensors", "lm_head.weight"),
        ("phi3", "model.safetensors", "lm_head.weight"),
    ],
)
def test_expected_logits_belong_to_the_weights(family: str, file: str, head: str) -> None:
    from safetensors.numpy import load_file

    expected = load_file(CHECKPOINTS / family / "expected.safetensors")
    assert expected["tokens"].shape == (40,)
    assert len(expected) == 4 + sum(name.endswith("block_out") for name in expected)
    head_VD = float32_of(CHECKPOINTS / family / "hf" / file, head)
    np.testing.assert_allclose(expected["logits"], expected["final_norm"] @ head_VD.T, atol=2e-5)


@pytest.mark.parametrize(
    ("folder", "family"), [("gpt_oss", "gpt_oss"), ("llama", "llama"), ("mistral", "llama"), ("phi3", "llama")]
)
def test_tokenizer_training_is_deterministic(folder: str, family: str) -> None:
    committed = (CHECKPOINTS / folder / "hf" / "tokenizer.json").read_text(encoding="utf-8")
    vocab_size = json.loads((CHECKPOINTS / folder / "hf" / "config.json").read_text())["vocab_size"]
    assert json.loads(train_tokenizer(family, vocab_size).to_str()) == json.loads(committed)


# --- tokenizers and the quantiser


@pytest.mark.parametrize("vocab_size", [320, 512, 1024])
@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_tokenizer_keeps_every_byte(family: str, vocab_size: int) -> None:
    tokenizer = train_tokenizer(family, vocab_size)
    ids = tokenizer.encode(HARD_TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == HARD_TEXT
    assert tokenizer.get_vocab_size() == vocab_size
    assert ids[-1] == tokenizer.token_to_id("<|return|>") or family == "llama"


def test_tokenizers_split_as_their_families_do() -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    def pieces(family: str, text: str) -> list[str]:
        splitter = Tokenizer(models.BPE())
        splitter.pre_tokenizer = pre_tokenizers.Split(Regex(SPLIT[family]), behavior="isolated")
        return [piece for piece, _ in splitter.pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("gpt_oss", "camelCase we'LL 12345/\n") == ["camel", "Case", " we'LL", " ", "123", "45", "/\n"]
    assert pieces("llama", "camelCase we'LL 12345/\n") == ["camelCase", " we", "'LL", " ", "123", "45", "/\n"]


def test_too_large_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"yields \d+ tokens, not 9000"):
        train_tokenizer("llama", 9000)


@given(
    arrays(np.float32, (3, 2, 64), elements=st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6))
)
def test_mxfp4_rounds_as_ml_dtypes_does(w: np.ndarray) -> None:
    blocks, scales = tiny.quantise_mxfp4(w)
    unit = np.repeat(np.exp2(scales.astype(np.float64) - 127), 32, axis=-1)
    rounded = np.clip(w / unit, -6, 6).astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * unit
    assert np.array_equal(MXFP4.decode({"blocks": blocks, "scales": scales}), rounded)
    largest = np.abs(w / unit).reshape(3, 2, 2, 32).max(-1)
    assert np.all((largest == 0) | (largest >= 4) & (largest < 8))  # the exponent is floor(log2(largest)) - 2


def test_mxfp4_bytes_by_hand() -> None:
    w = np.zeros((1, 32))
    w[0, :5] = [6.0, -1.0, 0.25, 0.75, -5.0]  # ties go to the even codes 0, 2 and 6
    blocks, scales = tiny.quantise_mxfp4(w)
    assert scales.tolist() == [[127]]
    assert blocks[0, 0, :3].tolist() == [7 | 10 << 4, 0 | 2 << 4, 14]
    assert not blocks[0, 0, 3:].any()


# --- the makers, tried with the tools that the checkpoints are for

GPT_OSS_SHAPES: list[dict[str, Any]] = [
    {},
    {"config_style": "transformers5", "rope_scaling": {"truncate": True}},
    {"shards": 1, "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 4, "sliding_window": 5},
    {"shards": 3, "hidden_size": 96, "intermediate_size": 32, "num_local_experts": 5, "num_experts_per_tok": 1},
]
LLAMA_SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "num_key_value_heads": 4, "rope_scaling": None, "dtype": "float32"},
    {"attention_bias": True, "config_style": "transformers5", "head_dim": 32},
    {"architecture": "mistral"},
]
TOKENS = np.random.default_rng(5).integers(0, 376, 48).tolist()


@pytest.fixture
def llama_cpp_tree() -> None:
    if "ASSAY_LLAMA_CPP" not in os.environ:
        pytest.skip("ASSAY_LLAMA_CPP does not name a llama.cpp source tree")


@pytest.mark.peers
@pytest.mark.parametrize("options", GPT_OSS_SHAPES)
def test_transformers_reads_the_intended_gpt_oss(tmp_path: Path, options: dict[str, Any]) -> None:
    hf = tiny.make_gpt_oss(tmp_path / "hf", seed=7, **options)
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == options.get("shards", 2)
    loaded = {name: w.numpy() for name, w in tiny.transformers_model(hf).state_dict().items()}
    intended = tiny.gpt_oss_tensors({name: w.shape for name, w in loaded.items()}, seed=7)
    for name, w in loaded.items():
        if f"{name}_blocks" in intended:
            parts = {part: intended[f"{name}_{part}"].numpy() for part in ("blocks", "scales")}
            assert np.array_equal(w, MXFP4.decode(parts).swapaxes(1, 2)), name
        else:
            assert np.array_equal(w, intended[name].float().numpy()), name
    assert set(index["weight_map"]) == set(intended)


@pytest.mark.peers
@pytest.mark.parametrize("options", LLAMA_SHAPES)
def test_transformers_reads_the_intended_llama(tmp_path: Path, options: dict[str, Any]) -> None:
    import torch

    hf = tiny.make_llama(tmp_path / "hf", seed=8, **options)
    loaded = tiny.transformers_model(hf).state_dict()
    dtype = getattr(torch, options.get("dtype", "bfloat16"))
    tied = options.get("tie_word_embeddings", options.get("architecture") != "mistral")
    for name, w in loaded.items():
        source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        intended = torch.from_numpy(tiny.random_weight(source, tuple(w.shape), 8)).to(dtype).float()
        assert torch.equal(w, intended), name
    assert any("q_proj.bias" in name for name in loaded) == options.get("attention_bias", False)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("change", "least"),
    [
        ({"sliding_window": 100}, 1e-2),
        ({"swiglu_limit": 100.0}, 1e-3),
        ({"rope_scaling": {"truncate": True}}, 1e-2),
        ({"rope_scaling": {"factor": 1.0}}, 1e-2),
        ({"num_experts_per_tok": 1}, 1e-2),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, 1e-2),
    ],
)
def test_every_feature_shows_in_the_logits(tmp_path: Path, change: dict[str, Any], least: float) -> None:
    plain = tiny.transformers_taps(tiny.make_gpt_oss(tmp_path / "plain", seed=9), TOKENS)["logits"]
    changed = tiny.transformers_taps(tiny.make_gpt_oss(tmp_path / "changed", seed=9, **change), TOKENS)["logits"]
    assert least < nmse(changed, plain) < 4


@pytest.mark.peers
def test_activations_are_well_scaled(tmp_path: Path) -> None:
    import torch

    hf = tiny.make_gpt_oss(tmp_path / "hf", seed=10)
    taps = tiny.transformers_taps(hf, TOKENS)
    assert all(0.2 < taps[name].std() < 4 for name in taps)
    model, chosen, gates = tiny.transformers_model(hf), [], []
    for layer in model.model.layers:
        layer.mlp.router.register_forward_hook(lambda _m, _i, output: chosen.append(output[2]))
        experts = layer.mlp.experts
        gate = lambda x, e=experts: (x[0] @ e.gate_up_proj + e.gate_up_proj_bias[:, None])[..., ::2]  # noqa: E731
        experts.register_forward_pre_hook(lambda _m, inputs, gate=gate: gates.append(gate(inputs)))
    with torch.no_grad():
        model(torch.tensor([TOKENS]), use_cache=False)
    beyond_limit = (torch.stack(gates) > 7).float().mean().item()
    assert 0.003 < beyond_limit < 0.03
    counts = torch.stack([torch.bincount(ids.flatten(), minlength=4) for ids in chosen])
    assert counts.min() >= 1  # every expert is used, none by every token
    assert counts.max() < len(TOKENS)


@pytest.mark.peers
def test_engines_agree_on_gpt_oss_once_yarn_is_rounded(tmp_path: Path, llama_cpp_tree: None) -> None:
    # llama.cpp and mlx-lm always round the ramp's ends; what is left is bfloat16, Q8_0 activations and, at a few
    # tokens, another expert: hence the median over tokens
    hf = tiny.make_gpt_oss(tmp_path / "hf", seed=1, rope_scaling={"truncate": True})
    expected = tiny.transformers_taps(hf, TOKENS)["logits"]

    def typical(got: np.ndarray) -> float:
        return float(np.median([nmse(row, expected[t]) for t, row in enumerate(got)]))

    assert typical(tiny.llama_cpp_logits(tiny.to_gguf(hf, tmp_path / "model.gguf"), TOKENS)) < 2e-3
    assert typical(tiny.mlx_logits(tiny.to_mlx(hf, tmp_path / "mlx"), TOKENS)) < 2e-3
    assert typical(tiny.mlx_logits(tiny.to_mlx(hf, tmp_path / "mlx-q8", q_bits=8), TOKENS)) < 1e-2
    exact = tiny.make_gpt_oss(tmp_path / "exact", seed=1)
    assert typical(tiny.llama_cpp_logits(tiny.to_gguf(exact, tmp_path / "exact.gguf"), TOKENS)) < 2e-3
    expected = tiny.transformers_taps(exact, TOKENS)["logits"]
    assert typical(tiny.mlx_logits(tiny.to_mlx(exact, tmp_path / "exact-mlx"), TOKENS)) > 2e-2


@pytest.mark.peers
@pytest.mark.parametrize("options", LLAMA_SHAPES[:3])
def test_engines_agree_on_llama(tmp_path: Path, llama_cpp_tree: None, options: dict[str, Any]) -> None:
    options = options | {"dtype": "float32", "config_style": "released"}  # mlx-lm does not read rope_parameters
    hf = tiny.make_llama(tmp_path / "hf", seed=11, **options)
    expected = tiny.transformers_taps(hf, TOKENS)["logits"]
    gguf_file = tiny.to_gguf(hf, tmp_path / "model.gguf", outtype="f32")
    assert nmse(tiny.llama_cpp_logits(gguf_file, TOKENS), expected) < 1e-5  # its cache is float16
    assert nmse(tiny.mlx_logits(tiny.to_mlx(hf, tmp_path / "mlx"), TOKENS), expected) < 1e-10
    q4 = tiny.to_mlx(hf, tmp_path / "mlx-q4", q_bits=4, q_group_size=64)  # 96 inputs do not divide: a mixed file
    assert nmse(tiny.mlx_logits(q4, TOKENS), expected) < 0.3


@pytest.mark.peers
@pytest.mark.parametrize(("type_name", "most"), [("Q8_0", 5e-3), ("Q4_0", 0.4), ("Q4_1", 0.4)])
def test_llama_cpp_quantises_every_matrix(tmp_path: Path, type_name: str, most: float) -> None:
    import gguf

    source = CHECKPOINTS / "llama" / "gguf" / "model.gguf"
    quantised = tiny.quantize_gguf(source, tmp_path / "model.gguf", type_name)
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(quantised).tensors if len(tensor.shape) == 2}
    assert types == {type_name}
    assert nmse(tiny.llama_cpp_logits(quantised, TOKENS), tiny.llama_cpp_logits(source, TOKENS)) < most


@pytest.mark.peers
def test_the_script_makes_the_committed_files(tmp_path: Path, llama_cpp_tree: None) -> None:
    from safetensors.numpy import load_file

    committed = json.loads((CHECKPOINTS / "manifest.json").read_text())
    if any(version(package) != number for package, number in committed["versions"].items()):
        pytest.skip(f"made with other versions: {committed['versions']}")
    make_all(tmp_path)
    remade = json.loads((tmp_path / "manifest.json").read_text())["files"]
    changed = {name for name in committed["files"] | remade if committed["files"].get(name) != remade.get(name)}
    assert changed <= {f"{family}/expected.safetensors" for family in FAMILIES}  # its last bits are the processor's
    for family in FAMILIES:
        ours, theirs = (load_file(root / family / "expected.safetensors") for root in (tmp_path, CHECKPOINTS))
        assert all(np.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


@pytest.mark.peers
def test_the_script_makes_the_bundled_model(tmp_path: Path) -> None:
    make_bundled(tmp_path / "tiny")
    names = {file.name for file in TINY.iterdir()}
    assert names == {file.name for file in (tmp_path / "tiny").iterdir()}
    assert all((TINY / name).read_bytes() == (tmp_path / "tiny" / name).read_bytes() for name in names)


def test_the_bundled_model_is_small() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 1_500_000
