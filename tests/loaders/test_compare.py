"""Two checkpoints compared: the same across containers, one bit seen, every known slip named."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from assay.loaders import Checkpoint
from assay.loaders.compare import compare
from assay.reference.config import FrequencyFactors
from tests.checkpoint_files import opened, with_weight

Q, K, V = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
O_PROJ, NORM, EMBED = "model.layers.1.self_attn.o_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
GATE, UP, DOWN = (f"model.layers.1.mlp.experts.{name}_proj.weight" for name in ("gate", "up", "down"))
GATE_BIAS, UP_BIAS, DOWN_BIAS = (name.replace("weight", "bias") for name in (GATE, UP, DOWN))
Change = Callable[[np.ndarray], np.ndarray]


def differences(a: Checkpoint, b: Checkpoint) -> dict[str, str | None]:
    return {difference.name: difference.explanation for difference in compare(a, b).differences}


def changed(base: str, **changes: Change) -> tuple[Checkpoint, Checkpoint]:
    """A checkpoint and a copy with some weights changed, by the ends of their names."""
    a = b = opened(base)
    for name, change in changes.items():
        b = with_weight(b, name, change)
    return a, b


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *(
            ("gpt_oss/hf", "gpt_oss/gguf"),
            ("gpt_oss/gguf", "gpt_oss/mlx"),
            ("llama/hf", "llama/gguf"),
            ("phi3/hf", "phi3/gguf"),
        ),
        ("llama/gguf-q8_0", "llama/gguf-q8_0"),
    ],
)
def test_the_same_weights_in_other_containers(a, b):
    """Written by transformers, llama.cpp's converter and mlx-lm: fused or not, permuted or not, other nibble orders."""
    result = compare(opened(a), opened(b))
    assert result.is_same
    assert result.as_json()["verdict"] == "same"
    assert set(result.sha256) == set(opened(a).tensors)
    for name in (Q, EMBED):
        bits = opened(a).tensors[name].decode().astype("<f4").tobytes()
        assert result.sha256[name] == hashlib.sha256(bits).hexdigest()


@pytest.mark.parametrize("piece", [1000, 1 << 22])
def test_one_bit_is_seen_and_placed(piece, monkeypatch):
    monkeypatch.setattr("assay.loaders.compare.PIECE", piece)

    def flip(values: np.ndarray) -> np.ndarray:
        values.view(np.uint32)[3, 5, 7] ^= 1 << 20
        return values

    a, b = changed("gpt_oss/hf", **{DOWN: flip})
    (difference,) = compare(a, b).differences
    assert (difference.name, difference.first, difference.differing) == (DOWN, (3, 5, 7), 1)
    assert difference.values[0] != difference.values[1]
    assert float(difference.values[0]) == a.tensors[DOWN].decode()[3, 5, 7]
    assert difference.explanation is None
    assert difference.encodings == ("MXFP4", "F32")
    assert difference.sha256[0] != difference.sha256[1]
    bits = b.tensors[DOWN].decode().astype("<f4").tobytes()
    assert difference.sha256[1] == hashlib.sha256(bits).hexdigest()
    assert 0 < difference.relative_error < 1e-3


def test_nan_equals_itself_and_the_sign_of_zero_counts():
    def nan(values: np.ndarray) -> np.ndarray:
        values[0] = np.nan
        return values

    a, b = changed("llama/hf", **{NORM: nan})
    assert not differences(b, b)
    assert differences(a, b) == {NORM: None}
    a, b = changed("llama/hf", **{K: lambda w: np.where(w > 0, w, np.float32(0))})
    c = with_weight(b, K, lambda w: np.where(w == 0, np.float32(-0.0), w))
    assert differences(b, c) == {K: "A is B with every zero positive"}
    assert differences(c, b) == {K: "B is A with every zero positive"}


def halves_to_pairs(w: np.ndarray) -> np.ndarray:
    """Rows of each head of 16: 0, 8, 1, 9, ..., as llama.cpp's converter puts them."""
    order = [16 * h + 8 * half + j for h in range(len(w) // 16) for j in range(8) for half in (0, 1)]
    return w[order]


def pairs_to_halves(w: np.ndarray) -> np.ndarray:
    back = np.empty_like(w)
    back[[16 * h + 8 * half + j for h in range(len(w) // 16) for j in range(8) for half in (0, 1)]] = w
    return back


def in_blocks(order: list[int]) -> Change:
    return lambda w: w.reshape(-1, len(order))[:, order].reshape(w.shape)


SPLIT_READ_AS_ADJACENT = [i // 2 + 16 * (i % 2) for i in range(32)]  # byte j holds elements j and j + 16
ADJACENT_READ_AS_SPLIT = [2 * (i % 16) + i // 16 for i in range(32)]  # byte j holds elements 2j and 2j + 1
SLIPS: dict[str, tuple[str, str, Change, str]] = {
    "square transposed": ("llama/hf", O_PROJ, lambda w: w.T, "B holds it transposed"),
    "experts transposed in bytes": (
        "gpt_oss/hf",
        DOWN,
        lambda w: np.stack([m.T.reshape(m.shape) for m in w]),
        "B holds it transposed",
    ),
    "bytes of the transposed taken for it": ("llama/hf", K, lambda w: w.reshape(64, 32).T, "B holds it transposed"),
    "RoPE rows left in pairs": ("llama/hf", Q, halves_to_pairs, "a permutation is missing"),
    "RoPE rows put into halves twice": ("llama/hf", K, pairs_to_halves, "applied twice"),
    "split read as adjacent": (
        "gpt_oss/hf",
        UP,
        in_blocks(SPLIT_READ_AS_ADJACENT),
        "B takes its codes for adjacent ones",
    ),
    "adjacent read as split": (
        "gpt_oss/hf",
        UP,
        in_blocks(ADJACENT_READ_AS_SPLIT),
        "B takes its codes for split halves",
    ),
    "nibbles of a byte": ("gpt_oss/hf", DOWN, in_blocks([1, 0]), "high and low nibble"),
    "nibbles of a byte of ggml's blocks of 32": (
        "gpt_oss/gguf",
        DOWN,
        in_blocks([*range(16, 32), *range(16)]),
        "high and low nibble",
    ),
    "nibbles of a byte of Q4_K": (
        "llama/hf",
        O_PROJ,
        in_blocks([*range(32, 64), *range(32)]),
        "high and low nibble",
    ),
    "exponent off by one": ("gpt_oss/hf", GATE, lambda w: w * np.float32(0.5), "B is A times 2^-1"),
    "exponent off by minus two": ("llama/hf", NORM, lambda w: w * np.float32(4), "B is A times 2^2"),
    "sign": ("llama/hf", O_PROJ, lambda w: -w, "B is A times -1"),
    "rows": ("llama/hf", V, lambda w: w[::-1], "rows are in another order: 0 is A's 31, 1 is A's 30, 2 is A's 29 and"),
    "two rows": ("llama/hf", EMBED, lambda w: w[[0, 2, 1, *range(3, len(w))]], "order: 1 is A's 2, 2 is A's 1"),
    "columns": ("llama/hf", V, lambda w: np.roll(w, 1, axis=1), "columns are in another order: 0 is A's 63"),
    "experts": ("gpt_oss/hf", DOWN, lambda w: w[[0, 2, 1, 3]], "experts are in another order: 1 is A's 2, 2 is A's 1"),
    "biases of experts": (
        "gpt_oss/hf",
        DOWN_BIAS,
        lambda b: b[[0, 2, 1, 3]],
        "experts are in another order: 1 is A's 2, 2 is A's 1",
    ),
    "rows of one expert": (
        "gpt_oss/hf",
        DOWN,
        lambda w: np.stack((w[0], w[1], w[2][::-1], w[3])),
        "rows are in another order: 0 is A's 63",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_known_slip_is_named(slip):
    base, name, change, words = SLIPS[slip]
    a, b = changed(base, **{name: change})
    found = differences(a, b)
    assert set(found) == {name}
    assert found[name] is not None
    assert words in found[name]


@pytest.mark.parametrize(("dtype", "words"), [(ml_dtypes.bfloat16, "bfloat16"), (np.float16, "float16")])
def test_rounding_is_named_in_both_directions(dtype, words):
    rng = np.random.default_rng(5)
    exact = with_weight(opened("llama/hf"), O_PROJ, lambda w: w + rng.normal(0, 1e-3, w.shape).astype(np.float32))
    rounded = with_weight(exact, O_PROJ, lambda w: w.astype(dtype).astype(np.float32))
    assert differences(exact, rounded) == {O_PROJ: f"B is A rounded to {words}"}
    assert differences(rounded, exact) == {O_PROJ: f"A is B rounded to {words}"}
    cut = with_weight(exact, O_PROJ, lambda w: (w.view(np.uint32) >> 16 << 16).view(np.float32))
    assert differences(exact, cut) == {O_PROJ: "B is A cut to bfloat16"}


def test_gate_and_up_swapped():
    a = opened("gpt_oss/hf")
    gate, up = (a.tensors[name].decode() for name in (GATE, UP))
    swapped = with_weight(with_weight(a, GATE, lambda _: up), UP, lambda _: gate)
    assert differences(a, swapped) == {GATE: f"B holds here what A calls {UP}", UP: f"B holds here what A calls {GATE}"}


@pytest.mark.parametrize("names", [(GATE, UP), (GATE_BIAS, UP_BIAS)], ids=["weights", "biases"])
def test_gate_and_up_taken_out_of_the_fused_matrix_in_the_other_way(names):
    a = opened("gpt_oss/hf")
    gate, up = (a.tensors[name].decode() for name in names)
    woven, stacked = np.stack((gate, up), 2).reshape(4, 192, *gate.shape[2:]), np.concatenate((gate, up), 1)

    def explained(new_gate: np.ndarray, new_up: np.ndarray) -> dict[str, str | None]:
        return differences(a, with_weight(with_weight(a, names[0], lambda _: new_gate), names[1], lambda _: new_up))

    for pair, words in (
        ((woven[:, :96], woven[:, 96:]), "not de-interleaved"),
        ((stacked[:, ::2], stacked[:, 1::2]), "de-interleaved without need"),
    ):
        found = explained(*pair)
        assert set(found) == set(names)
        assert all(text is not None and words in text for text in found.values())


def test_layers_swapped():
    a = opened("llama/hf")
    other = O_PROJ.replace("1", "0")
    b = replace(a, tensors={**a.tensors, O_PROJ: a.tensors[other]})
    assert differences(a, b) == {O_PROJ: f"B holds here what A calls {other}"}


def test_quantised_again_is_not_explained_away():
    found = compare(
        opened("phi3/hf"), with_weight(opened("phi3/hf"), EMBED, lambda w: np.round(w * 50) / np.float32(50))
    )
    (difference,) = found.differences
    assert difference.explanation is None
    assert 0 < difference.relative_error < 1


def test_tensors_that_only_one_has_and_other_shapes():
    a, b = opened("llama/hf"), opened("mistral/hf")
    (difference,) = [d for d in compare(a, b).differences if d.name == "lm_head.weight"]
    assert difference.what == "only B has it"
    assert {d.what for d in compare(b, a).differences if d.name == "lm_head.weight"} == {"only A has it"}
    shorter = with_weight(a, EMBED, lambda w: w[:-1])
    (difference,) = compare(a, shorter).differences
    assert difference.what == "shape [384, 64] in A, [383, 64] in B"
    assert difference.first is None


def test_config_fields_are_compared_and_rope_by_its_frequencies():
    a = opened("llama/hf")
    assert compare(a, opened("llama/gguf")).config == {}
    assert type(opened("llama/gguf").config.rope_scaling) is FrequencyFactors  # another record than A's
    for field, value in (("rms_norm_eps", 1e-6), ("rope_scaling", None), ("max_position_embeddings", 513)):
        b = replace(a, config=replace(a.config, **{field: value}))
        result = compare(a, b)
        assert list(result.config) == [field]
        assert not result.is_same
    assert compare(a, opened("gpt_oss/hf")).config == {"architecture": ("LlamaConfig", "GptOssConfig")}


def test_progress_names_every_tensor_once():
    seen: list[str] = []
    compare(opened("llama/hf"), opened("llama/gguf"), seen.append)
    assert sorted(seen) == sorted(opened("llama/hf").tensors)
