"""Weights first: a wrong weight is found and named before any activation, and equal ones are not."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from assay.golden.backends import open_backend
from assay.golden.check import Report, check
from assay.golden.errors import GoldenError
from assay.golden.noise import profile_named
from assay.golden.record import record
from assay.golden.store import WEIGHTS
from assay.golden.tiny_model import TINY
from assay.golden.weights import LazyWeights, with_weights
from assay.loaders import open_checkpoint
from assay.loaders.checkpoint import Checkpoint
from tests.checkpoint_files import opened
from tests.golden.faults import GPT_OSS, golden_of

Array = np.ndarray
TINY_GPT_OSS = open_checkpoint(TINY)  # experts are square and MXFP4 as in the released file
NAME = "model.layers.{}.{}"


def decoded(checkpoint: Checkpoint) -> dict[str, Array]:
    """What a backend without a fault hands over."""
    return {name: tensor.decode() for name, tensor in checkpoint.tensors.items()}


def checked(checkpoint: Checkpoint, weights: Mapping[str, Array], profile: str = "float32") -> Report:
    golden = record(checkpoint, open_backend("reference", checkpoint), [5, 9, 3], taps="embed")
    return check(golden, checkpoint, {WEIGHTS + n: w for n, w in weights.items()}, "x", profile_named(profile))


def changed(change: Callable[[Array], Array], *ends: str, layers: tuple[int, ...] = (0, 1, 2, 3)) -> dict[str, Array]:
    """The tiny gpt-oss's weights with those that end so changed."""
    weights = decoded(TINY_GPT_OSS)
    for i in layers:
        for end in ends:
            weights[NAME.format(i, end)] = change(weights[NAME.format(i, end)])
    return weights


EXPERTS = tuple(f"mlp.experts.{name}_proj.weight" for name in ("gate", "up", "down"))
DOWN = EXPERTS[2]
Q, K, O = (f"self_attn.{name}_proj.weight" for name in "qko")  # noqa: E741


def by_head(order: Array) -> Callable[[Array], Array]:
    return lambda w: w.reshape(-1, 64, w.shape[1])[:, order].reshape(w.shape)


def by_group(order: Array) -> Callable[[Array], Array]:
    return lambda w: w.reshape(*w.shape[:-1], -1, 32)[..., order].reshape(w.shape)


C, G = np.arange(64), np.arange(32)
NAMED: dict[str, dict[str, Array]] = {
    "expert-down-transposed": changed(lambda w: w.swapaxes(1, 2), DOWN),
    "q-rows-to-neighbours": changed(by_head(C.reshape(2, -1).T.ravel()), Q),
    "qk-rows-to-neighbours": changed(by_head(C.reshape(2, -1).T.ravel()), Q, K),
    "qk-rows-to-halves": changed(by_head(C.reshape(-1, 2).T.ravel()), Q, K),
    "mxfp4-nibbles-swapped": changed(by_group(G ^ 1), *EXPERTS),
    "mxfp4-read-as-halves": changed(by_group(G.reshape(-1, 2).T.ravel()), *EXPERTS),
    "mxfp4-read-as-neighbours": changed(by_group(G.reshape(2, -1).T.ravel()), *EXPERTS),
    "mxfp4-halves-swapped": changed(by_group(G ^ 16), *EXPERTS),
    "mxfp4-exponent-high": changed(lambda w: 2 * w, *EXPERTS),
    "mxfp4-exponent-two-low": changed(lambda w: w / 4, *EXPERTS),
    "mxfp4-down-exponent-low": changed(lambda w: w / 2, DOWN),
    "mxfp4-sign-ignored": changed(np.abs, *EXPERTS),
    "down-bias-per-rank": changed(lambda b: 2 * b, "mlp.experts.down_proj.bias"),
    "o-bias-missing": changed(np.zeros_like, "self_attn.o_proj.bias"),
    "sinks-of-the-next-head": changed(lambda s: np.roll(s, 1), "self_attn.sinks"),
}


def swapped(weights: dict[str, Array], a: str, b: str) -> dict[str, Array]:
    for name in [name for name in weights if a in name]:
        other = name.replace(a, b)
        weights[name], weights[other] = weights[other], weights[name]
    return weights


NAMED["gate-up-weights-swapped"] = swapped(decoded(TINY_GPT_OSS), "gate_proj", "up_proj")
NAMED["k-v-swapped"] = swapped(decoded(TINY_GPT_OSS), "k_proj", "v_proj")
NAMED["norms-exchanged"] = swapped(decoded(TINY_GPT_OSS), "input_layernorm", "post_attention_layernorm")


@pytest.mark.parametrize("id", NAMED)
def test_a_mistake_of_the_catalogue_is_named_from_the_weights_alone(id: str) -> None:
    report = checked(TINY_GPT_OSS, NAMED[id])
    assert report.verdict == "diverges"
    assert report.first_divergence is not None
    assert report.first_divergence.tap.startswith(WEIGHTS)
    assert report.cause is not None
    assert (report.cause["id"], report.cause["residual_after"], report.cause["ambiguous_with"]) == (id, 0.0, [])
    assert report.cause["explained"]["taps"] == report.cause["explained"]["of"]


def a_scale_byte_off(weights: dict[str, Array]) -> dict[str, Array]:
    weights[NAME.format(1, DOWN)][3, 7, 32:64] *= 2
    return weights


def one_byte_decoded_as_zero(weights: dict[str, Array]) -> dict[str, Array]:
    tensor = TINY_GPT_OSS.tensors[NAME.format(0, DOWN)]
    scales = tensor.parts["scales"]
    code = int(np.median(scales[0]))
    w = weights[tensor.name].reshape(*scales.shape, 32)
    w[scales == code] = 0
    return weights


def scales_of_the_block_before(weights: dict[str, Array]) -> dict[str, Array]:
    name = NAME.format(0, EXPERTS[0])
    scales = TINY_GPT_OSS.tensors[name].parts["scales"].astype(int)
    w = weights[name].reshape(*scales.shape, 32)
    w *= np.exp2(np.roll(scales, 1, axis=-1) - scales)[..., None].astype(np.float32)
    return weights


def to_bfloat16(w: Array) -> Array:
    return (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def cut_to_bfloat16(weights: dict[str, Array]) -> dict[str, Array]:
    return {name: to_bfloat16(w) for name, w in weights.items()}


def experts_exchanged(weights: dict[str, Array]) -> dict[str, Array]:
    w = weights[NAME.format(2, DOWN)]
    w[[0, 5]] = w[[5, 0]]
    return weights


def another_layer(weights: dict[str, Array]) -> dict[str, Array]:
    weights[NAME.format(2, O)] = weights[NAME.format(1, O)]
    return weights


def a_row_scaled(weights: dict[str, Array]) -> dict[str, Array]:
    weights[NAME.format(2, O)][5] *= 1.7
    return weights


def gain_plus_one(weights: dict[str, Array]) -> dict[str, Array]:
    weights[NAME.format(2, "input_layernorm.weight")] += 1
    return weights


DESCRIBED = {
    "1 added to every value": gain_plus_one,
    "the scale's exponent is off by 1 in 1 of 288 blocks of 32, the first in row 7, block 1": a_scale_byte_off,
    "zero in ": one_byte_decoded_as_zero,
    "each block has the scale of the block 1 before it": scales_of_the_block_before,
    "experts are in another order: 0 is A's 5, 5 is A's 0": experts_exchanged,
    "it holds model.layers.1.self_attn.o_proj.weight": another_layer,
    "1.7 times what it should be at row 5": a_row_scaled,
}


@pytest.mark.parametrize("words", DESCRIBED)
def test_another_fault_is_described(words: str) -> None:
    report = checked(TINY_GPT_OSS, DESCRIBED[words](decoded(TINY_GPT_OSS)))
    assert (report.verdict, report.cause) == ("diverges", None)
    assert report.structure is not None
    assert words in report.structure["sentence"]


def test_the_scale_byte_that_is_misread_is_named() -> None:
    report = checked(TINY_GPT_OSS, one_byte_decoded_as_zero(decoded(TINY_GPT_OSS)))
    assert report.structure is not None
    assert "those whose scale byte is" in report.structure["sentence"]


def test_weights_cut_to_bfloat16_are_said_to_be() -> None:
    checkpoint = opened("llama/gguf-q4_1")
    report = checked(checkpoint, cut_to_bfloat16(decoded(checkpoint)))
    assert report.structure is not None
    assert "cut to bfloat16" in report.structure["sentence"]


@pytest.mark.parametrize("name", [GPT_OSS, "gpt_oss/gguf", "gpt_oss/mlx-q8", "llama/gguf-q4_1", "llama/mlx-4bit"])
def test_equal_weights_match_rounded_to_the_profile_or_by_a_fused_product(name: str) -> None:
    checkpoint = opened(name)
    weights = decoded(checkpoint)
    report = checked(checkpoint, weights)
    assert (report.verdict, report.weights) == ("match", {"compared": len(weights), "differing": []})
    nudged = {n: np.nextafter(w, np.float32(np.inf)) for n, w in weights.items()}
    assert checked(checkpoint, nudged).verdict == "match"
    rounded = {n: to_bfloat16(w + w * np.float32(2.0**-9)) for n, w in weights.items()}
    assert checked(checkpoint, rounded, "bfloat16").verdict == "match"
    off = {n: w * np.float32(1.03) for n, w in weights.items()}
    assert checked(checkpoint, off, "bfloat16").verdict == "diverges"


def test_wrong_weights_come_before_the_activations_that_they_spoil() -> None:
    checkpoint, golden = opened(GPT_OSS), golden_of()
    weights = decoded(checkpoint)
    weights["model.layers.1.self_attn.v_proj.weight"] = 2 * weights["model.layers.1.self_attn.v_proj.weight"]
    taps = {name: np.asarray(tap) for name, tap in golden.taps.items()}
    taps["embed"] = taps["embed"] * 2
    taps |= {WEIGHTS + n: w for n, w in weights.items()}
    report = check(golden, checkpoint, taps, "x", profile_named("float32"))
    diverging = [tap.tap for tap in report.taps if tap.verdict == "diverges"]
    assert diverging[:2] == ["weights.model.layers.1.self_attn.v_proj.weight", "embed"]
    assert report.as_json()["weights"]["differing"] == ["model.layers.1.self_attn.v_proj.weight"]
    assert report.structure is not None
    assert "2^1" in report.structure["sentence"]


def test_a_weight_that_is_no_number_or_no_weight() -> None:
    weights = decoded(TINY_GPT_OSS)
    weights[NAME.format(0, O)][2, 3] = np.nan
    report = checked(TINY_GPT_OSS, weights)
    assert report.first_divergence is not None
    assert (report.first_divergence.nonfinite, report.first_divergence.worst["index"]) == (1, [2, 3])
    with pytest.raises(GoldenError, match=r"'q\.weight' is no weight of this model"):
        checked(TINY_GPT_OSS, {"q.weight": np.zeros(3)})
    with pytest.raises(GoldenError, match="another shape"):
        checked(TINY_GPT_OSS, {"model.norm.weight": np.zeros(3)})
    with pytest.raises(GoldenError, match="not decoded"):
        checked(TINY_GPT_OSS, {"model.norm.weight": np.zeros(96, np.uint8)})


def test_a_backend_may_hand_over_its_weights() -> None:
    class Engine:
        def weights(self) -> Mapping[str, Array]:
            return LazyWeights({"model.norm.weight": lambda: np.ones(96, np.float32)})

    taps = with_weights({"embed": np.zeros(3)}, Engine())
    assert set(taps) == {"embed", "weights.model.norm.weight"}
    assert taps["weights.model.norm.weight"].shape == (96,)
    assert with_weights({"embed": np.zeros(3)}, object()).keys() == {"embed"}


def test_a_comparison_that_sees_nothing_fails_these_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.golden.weights._allowed", lambda expected, got, profile: np.ones(expected.shape, bool))
    report = checked(TINY_GPT_OSS, NAMED["o-bias-missing"])
    assert report.verdict == "match"
