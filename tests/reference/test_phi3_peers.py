"""phi-3 against the tools that run it: transformers tap by tap, llama.cpp and mlx-lm by their files and logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import assay.reference as reference
from assay.golden.backends import open_backend
from assay.golden.backends.reference import ReferenceBackend
from assay.golden.check import Report, check
from assay.golden.noise import profile_named
from assay.golden.record import record
from assay.loaders import open_checkpoint
from assay.loaders.checkpoint import Checkpoint
from tests import tiny
from tests.golden.injection import Mistake, assay, diverging, inject, random_tokens
from tests.golden.injection import check as check_transformers
from tests.golden.injection import record as record_golden

pytestmark = pytest.mark.peers

ORIGINAL = tiny.PHI3["original_max_position_embeddings"]
WINDOW = tiny.PHI3["sliding_window"]
FACTORS_OF_24 = {"short_factor": np.linspace(1, 2, 12).tolist(), "long_factor": np.geomspace(1, 40, 12).tolist()}
GIVEN = "one key head of 24, factors given, tied"
SHAPES: dict[str, dict[str, Any]] = {
    "no groups, window 18, LongRoPE": {"seed": 31},
    "grouped, no window, LongRoPE": {"seed": 32, "num_key_value_heads": 2, "sliding_window": None, "dtype": "float32"},
    GIVEN: {
        "seed": 33,
        "hidden_size": 96,
        "num_key_value_heads": 1,
        "rope_scaling": FACTORS_OF_24 | {"factor": 16.0, "attention_factor": 1.5},
        "tie_word_embeddings": True,
        "config_style": "transformers5",
    },
    "as phi-3-mini-4k, window 7": {"seed": 34, "sliding_window": 7, "rope_scaling": None, "intermediate_size": 80},
}
# within the original context, its last position, the first beyond, and far beyond; in one pass and in chunks
RUNS = [
    *((name, T, None) for name in SHAPES for T in (ORIGINAL, ORIGINAL + 1, 110)),
    ("no groups, window 18, LongRoPE", ORIGINAL, "1"),
    ("no groups, window 18, LongRoPE", 40, "20,4,1,1,5"),
    ("grouped, no window, LongRoPE", 60, "23,1,1,30"),
    ("grouped, no window, LongRoPE", 40, "1"),
    ("as phi-3-mini-4k, window 7", 40, "6,1,1,1,10"),
]
LARGEST_RATIO = 3.0  # multiples of the step's own float32 noise, as in test_transformers_peers.py

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Answers the Hugging Face directory of a shape, written once."""
    root = tmp_path_factory.mktemp("phi3")

    def made(name: str) -> Path:
        path = root / name
        return path if path.exists() else tiny.make_phi3(path, **SHAPES[name])

    return made


def compared(
    checkpoint: Checkpoint, tokens: list[int], chunks: list[int] | None = None
) -> tuple[float, Report, set[str]]:
    """NMSE of transformers' logits, the report on its taps, and the taps it lacks."""
    golden = record(checkpoint, ReferenceBackend(checkpoint, "float64"), tokens, chunks=chunks, taps="*")
    names = golden.provenance.taps
    taps = dict(open_backend("transformers", checkpoint, "float32").run(tokens, golden.provenance.chunks, names))
    report = check(golden, checkpoint, taps, "transformers", profile_named("float32"))
    return nmse(taps["logits"], golden.taps["logits"]), report, set(names) - set(taps)


def nmse(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.square(got - expected).sum() / np.square(expected).sum())


def oracle_logits(checkpoint: Checkpoint, tokens: list[int], *chunks: int) -> np.ndarray:
    """The oracle's logits of the tokens in chunks that end at these positions, and a last one."""
    cache = reference.KVCache()
    pieces = np.split(np.array(tokens), chunks)
    return np.concatenate([reference.forward(checkpoint.model(), piece, cache=cache) for piece in pieces])


@pytest.mark.parametrize(("name", "T", "chunks"), RUNS)
def test_agrees_with_transformers(folder: Folders, name: str, T: int, chunks: str | None) -> None:
    lengths = None if chunks is None else [int(n) for n in chunks.split(",")]
    error, report, missing = compared(open_checkpoint(folder(name)), random_tokens(T, seed=T), lengths)
    assert error < 1e-10
    assert [tap.tap for tap in report.taps if tap.verdict != "match"] == []
    assert max(tap.ratio or 0 for tap in report.taps) < LARGEST_RATIO
    assert {tap.rsplit(".", 1)[-1] for tap in missing} == {"attn_scores"}


@pytest.mark.parametrize("T", [ORIGINAL, ORIGINAL + 1])
def test_longrope_of_another_architecture(tmp_path: Path, T: int) -> None:
    """transformers' Mistral takes it too, with the original context among the scaling's own keys."""
    scaling = {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": ORIGINAL}
    scaling |= {key: tiny.PHI3["rope_scaling"][key] for key in ("short_factor", "long_factor")}
    mistral = tiny.make_llama(tmp_path / "hf", seed=36, architecture="mistral", rope_scaling=scaling)
    error, report, _ = compared(open_checkpoint(mistral), random_tokens(T))
    assert (error < 1e-10, report.verdict) == (True, "match")


@pytest.mark.parametrize("backend", ["cpu", "transformers"])
@pytest.mark.parametrize(("name", "T", "chunks"), RUNS)
def test_check_passes(folder: Folders, tmp_path: Path, name: str, T: int, chunks: str | None, backend: str) -> None:
    options = () if chunks is None else ("--chunks", chunks)
    golden = record_golden(folder(name), tmp_path / "golden.safetensors", random_tokens(T), *options)
    modes = ("exact",) if backend == "cpu" else ("float32", "bfloat16")
    for mode in modes:
        assert assay("check", golden, "--backend", backend, "--mode", mode) == 0


def test_each_feature_shows(tmp_path: Path, folder: Folders) -> None:
    """What agrees above would mean little for a feature that does not act."""
    tokens, name = random_tokens(60), "no groups, window 18, LongRoPE"
    settings: dict[str, Any] = SHAPES[name]
    scaling = tiny.PHI3["rope_scaling"]
    expected = oracle_logits(open_checkpoint(folder(name)), tokens)
    changes: dict[str, dict[str, Any]] = {
        "window": {"sliding_window": WINDOW + 1},
        "long factors": {"rope_scaling": {"long_factor": scaling["short_factor"]}},
        "attention factor": {"rope_scaling": {"attention_factor": 1.0}},
        "where it begins": {"original_max_position_embeddings": 64},
    }
    for what, change in changes.items():
        changed = open_checkpoint(tiny.make_phi3(tmp_path / what, **settings | change))
        assert nmse(oracle_logits(changed, tokens), expected) > 1e-4, what
    short = {"rope_scaling": {"short_factor": scaling["long_factor"]}}  # acts within the original context only
    changed = open_checkpoint(tiny.make_phi3(tmp_path / "short factors", **settings | short))
    assert np.array_equal(oracle_logits(changed, tokens), expected)
    within = tokens[:ORIGINAL]
    assert nmse(oracle_logits(changed, within), oracle_logits(open_checkpoint(folder(name)), within)) > 1e-3


def test_chunks_agree_on_one_side_of_the_switch_only(folder: Folders) -> None:
    """Cached keys stay as they were turned, in transformers too: `test_agrees_with_transformers` has such chunks."""
    checkpoint, tokens = open_checkpoint(folder("grouped, no window, LongRoPE")), random_tokens(60)
    within, beyond = oracle_logits(checkpoint, tokens[:ORIGINAL]), oracle_logits(checkpoint, tokens)
    assert nmse(oracle_logits(checkpoint, tokens[:ORIGINAL], 1, 20), within) < 1e-25
    assert nmse(oracle_logits(checkpoint, tokens, ORIGINAL + 1, 40), beyond) < 1e-25
    assert nmse(oracle_logits(checkpoint, tokens, ORIGINAL)[ORIGINAL:], beyond[ORIGINAL:]) > 1e-3
    assert nmse(beyond[:ORIGINAL], within) > 1e-3  # earlier positions too: the whole call is turned by the long factors


# --- other containers, other engines ---


@pytest.mark.parametrize("name", [name for name in SHAPES if name != GIVEN])
def test_gguf_and_mlx_hold_the_same_model(folder: Folders, tmp_path: Path, name: str) -> None:
    hf = open_checkpoint(folder(name))
    outtype = "f32" if SHAPES[name].get("dtype") == "float32" else "bf16"
    gguf = open_checkpoint(tiny.to_gguf(folder(name), tmp_path / "x.gguf", outtype=outtype))
    mlx = open_checkpoint(tiny.to_mlx(folder(name), tmp_path / "mlx"))
    tokens = random_tokens(60)
    for other in (gguf, mlx):
        assert other.config == hf.config
        for key, tensor in hf.tensors.items():
            assert np.array_equal(other.tensors[key].decode().view(np.uint32), tensor.decode().view(np.uint32)), key
            assert not any(part.flags.owndata for part in other.tensors[key].parts.values()), key
        np.testing.assert_allclose(oracle_logits(other, tokens), oracle_logits(hf, tokens), rtol=0, atol=1e-12)


def test_fused_matrices_are_split_while_quantised(folder: Folders, tmp_path: Path) -> None:
    """The pieces one below the other are what gguf-py and mlx decode of the whole."""
    import gguf
    import mlx.core as mx

    name, layer = "no groups, window 18, LongRoPE", "model.layers.1"
    pieces = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
    q8_0 = tiny.quantize_gguf(tiny.to_gguf(folder(name), tmp_path / "x.gguf"), tmp_path / "q8_0.gguf", "Q8_0")
    mlx = tiny.to_mlx(folder(name), tmp_path / "mlx", q_bits=4, q_group_size=32)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(q8_0).tensors}
    stored = dict(mx.load(str(mlx / "model.safetensors")))
    for (fused, parts), gguf_name in zip(pieces.items(), ("attn_qkv", "ffn_up"), strict=True):
        keys = [f"{layer}.{fused.split('.')[0]}.{part}.weight" for part in parts]
        tensor = theirs[f"blk.1.{gguf_name}.weight"]
        whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        from_gguf, from_mlx = (open_checkpoint(path).tensors for path in (q8_0, mlx))
        assert np.array_equal(np.concatenate([from_gguf[key].decode() for key in keys]), whole)
        weight, scales, biases = (stored[f"{layer}.{fused}.{part}"] for part in ("weight", "scales", "biases"))
        # in float32 the sum of code times scale and bias is rounded once, as ours is
        whole = mx.dequantize(weight, *(s.astype(mx.float32) for s in (scales, biases)), group_size=32, bits=4)
        assert np.array_equal(np.concatenate([from_mlx[key].decode() for key in keys]), np.array(whole))
        assert {from_gguf[key].encoding.name for key in keys} == {"Q8_0"}


def test_gguf_of_given_attention_factor_has_the_converters(folder: Folders, tmp_path: Path) -> None:
    """llama.cpp's converter computes the attention factor by the formula, whatever the config says."""
    hf = open_checkpoint(folder(GIVEN)).config.rope_scaling
    gguf = open_checkpoint(tiny.to_gguf(folder(GIVEN), tmp_path / "x.gguf")).config.rope_scaling
    assert (hf.short_factor, hf.long_factor) == (gguf.short_factor, gguf.long_factor)
    assert hf.attention_factor == 1.5
    assert gguf.attention_factor == pytest.approx(1.23560917927)  # sqrt(1 + ln(128 / 24) / ln(24))


@pytest.mark.parametrize(("T", "most"), [(60, 1e-5), (300, 1e-5)])
def test_llama_cpp_computes_the_same_logits(tmp_path: Path, T: int, most: float) -> None:
    """It chooses the factors by the size of its context, here 256 or 512, and has no window."""
    context = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    hf = tiny.make_phi3(tmp_path / "hf", seed=35, dtype="float32", sliding_window=None, **context)
    gguf = tiny.to_gguf(hf, tmp_path / "x.gguf", outtype="f32")
    tokens = random_tokens(T)
    assert nmse(tiny.llama_cpp_logits(gguf, tokens), oracle_logits(open_checkpoint(gguf), tokens)) < most


def test_llama_cpp_has_no_window(folder: Folders, tmp_path: Path) -> None:
    name = "as phi-3-mini-4k, window 7"
    gguf = tiny.to_gguf(folder(name), tmp_path / "x.gguf", outtype="f32")
    tokens = random_tokens(40)
    expected, got = oracle_logits(open_checkpoint(gguf), tokens), tiny.llama_cpp_logits(gguf, tokens)
    assert nmse(got[:7], expected[:7]) < 1e-5
    assert nmse(got[7:], expected[7:]) > 1e-2


def test_mlx_lm_always_takes_the_long_factors(folder: Folders, tmp_path: Path) -> None:
    name = "grouped, no window, LongRoPE"
    mlx = tiny.to_mlx(folder(name), tmp_path / "mlx")
    tokens = random_tokens(60)
    assert nmse(tiny.mlx_logits(mlx, tokens), oracle_logits(open_checkpoint(mlx), tokens)) < 1e-10
    within = tokens[:ORIGINAL]
    assert nmse(tiny.mlx_logits(mlx, within), oracle_logits(open_checkpoint(mlx), within)) > 1e-3


# --- mistakes made in transformers are found where they act ---


def long_factors_never(model: Any, patch: pytest.MonkeyPatch) -> None:
    rope = model.model.rotary_emb
    rope.long_inv_freq = rope.original_inv_freq


def short_factors_never(model: Any, patch: pytest.MonkeyPatch) -> None:
    """What mlx-lm does."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    long_factors, _ = ROPE_INIT_FUNCTIONS["longrope"](model.config, "cpu", seq_len=ORIGINAL + 1)
    model.model.rotary_emb.original_inv_freq = long_factors


def switch_one_early(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.config.rope_parameters["original_max_position_embeddings"] = ORIGINAL - 1
    model.config.original_max_position_embeddings = ORIGINAL - 1


def attention_factor_missing(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.model.rotary_emb.attention_scaling = 1.0


def key_and_query_rows_swapped(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        q, k, v = layer.self_attn.qkv_proj.weight.data.chunk(3)
        layer.self_attn.qkv_proj.weight.data = k.new_tensor(np.concatenate([w.float().numpy() for w in (k, q, v)]))


def qkv_interleaved_by_head(model: Any, patch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX's order: each head's q, k and v together."""
    for layer in model.model.layers:
        weight = layer.self_attn.qkv_proj.weight
        weight.data = weight.data.unflatten(0, (3, 4, 16)).transpose(0, 1).flatten(0, 2).contiguous()


def gate_and_up_swapped(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        weight = layer.mlp.gate_up_proj.weight
        weight.data = weight.data.unflatten(0, (2, -1)).flip(0).flatten(0, 1).contiguous()


def window_one_more(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.config.sliding_window += 1


MISTAKES = [
    (Mistake(long_factors_never, "layers.0.q_rope", needs=ORIGINAL + 1), {"q_rope", "k_rope"}),
    (Mistake(switch_one_early, "layers.0.q_rope", needs=ORIGINAL), {"q_rope", "k_rope"}),
    (Mistake(short_factors_never, "layers.0.q_rope", needs=2), {"q_rope", "k_rope"}),
    (Mistake(attention_factor_missing, "layers.0.q_rope", needs=1), {"q_rope", "k_rope"}),
    (Mistake(key_and_query_rows_swapped, "layers.0.q"), {"q", "k"}),
    (Mistake(qkv_interleaved_by_head, "layers.0.q"), {"q", "k", "v"}),
    (Mistake(gate_and_up_swapped, "layers.0.gate"), {"gate", "up"}),
    (Mistake(window_one_more, "layers.0.attn_heads", needs=WINDOW + 1), {"attn_heads"}),
]


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize(("mistake", "kinds"), MISTAKES, ids=[mistake.name for mistake, _ in MISTAKES])
def test_mistake_is_found_where_it_first_acts(
    folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Mistake, kinds: set[str], mode: str
) -> None:
    """On a prompt that is just long enough; with one token less, where that hides it, the check passes."""
    checkpoint, tokens = folder("no groups, window 18, LongRoPE"), random_tokens(60)
    length = max(mistake.needs, 2)
    golden = record_golden(checkpoint, tmp_path / "golden.safetensors", tokens[:length])
    shorter = record_golden(checkpoint, tmp_path / "shorter.safetensors", tokens[: length - 1])
    inject(mistake.apply, monkeypatch)
    status, report = check_transformers(golden, mode)
    assert (status, report["first_divergence"] and report["first_divergence"]["tap"]) == (1, mistake.tap)
    assert diverging(report) == kinds
    if mistake.needs > 1:
        assert check_transformers(shorter, mode)[0] == 0
