"""The tap table against what the models really compute, and the recorder that keeps it."""

import numpy as np
import pytest

import assay.reference as reference
from assay.reference.taps import Recorder, default_taps, no_tap, tap_shape, tap_table
from tests.checkpoint_files import opened, tokens_of

FAMILIES = ["gpt_oss", "llama", "mistral"]
LAYER = {
    "gpt_oss": "attn_norm q k v q_rope k_rope attn_scores attn_weights attn_heads attn_out attn_residual mlp_norm "
    "router_logits expert_ids expert_weights expert_gate expert_up expert_act expert_out mlp_out block_out",
    "llama": "attn_norm q k v q_rope k_rope attn_scores attn_weights attn_heads attn_out attn_residual mlp_norm "
    "gate up act mlp_out block_out",
}
# T 5, S 5 and the sizes of tests/checkpoints, written out
SHAPES = {
    "gpt_oss": {
        **{
            "embed": (5, 64),
            "layers.1.q": (5, 4, 32),
            "layers.1.k_rope": (5, 2, 32),
            "layers.2.attn_scores": (4, 5, 5),
        },
        **{"layers.0.router_logits": (5, 4), "layers.0.expert_ids": (5, 2), "layers.2.expert_act": (5, 2, 96)},
        **{"layers.2.expert_out": (5, 2, 64), "logits": (5, 320)},
    },
    "llama": {"layers.0.q": (5, 4, 16), "layers.1.v": (5, 2, 16), "layers.1.act": (5, 96), "logits": (5, 384)},
}


def run(family: str, tap, T: int = 5, chunks: list[int] | None = None) -> np.ndarray:
    model, cache, start = opened(f"{family}/hf").model(), reference.KVCache(), 0
    pieces = []
    for length in chunks or [T]:
        tokens = np.array(tokens_of(family)[start : start + length])
        pieces.append(reference.forward(model, tokens, cache=cache, tap=tap))
        start += length
    return np.concatenate(pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tap_passes_once_in_the_order_of_the_table(family):
    config, passed = opened(f"{family}/hf").config, []

    def note(name: str, array: np.ndarray) -> np.ndarray:
        passed.append(name)
        return array

    run(family, note)
    layer = LAYER["gpt_oss" if family == "gpt_oss" else "llama"].split()
    layers = [f"layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in layer]
    assert passed == ["embed", *layers, "final_norm", "logits"] == list(tap_table(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tap_has_the_declared_axes(family):
    config = opened(f"{family}/hf").config
    for chunks, T in (([5], 5), ([3, 2], 5)):
        recorder = Recorder(config, tap_table(config))
        run(family, recorder, chunks=chunks)
        shapes = {name: array.shape for name, array in recorder.values.items()}
        assert shapes == {name: tap_shape(spec, config, T, T) for name, spec in tap_table(config).items()}


@pytest.mark.parametrize("family", SHAPES)
def test_axes_literally(family):
    config = opened(f"{family}/hf").config
    table = tap_table(config)
    assert {name: tap_shape(table[name], config, 5, 5) for name in SHAPES[family]} == SHAPES[family]


def test_heavy_taps_are_left_out_unless_asked_for():
    config = opened("gpt_oss/hf").config
    left_out = set(tap_table(config)) - set(default_taps(config))
    assert left_out == {f"layers.{i}.{name}" for i in range(3) for name in ("attn_scores", "attn_weights")}


def test_only_expert_ids_are_integers():
    config = opened("gpt_oss/hf").config
    recorder = Recorder(config, tap_table(config))
    run("gpt_oss", recorder)
    integers = {name for name, array in recorder.values.items() if array.dtype == np.int64}
    assert integers == {name for name, spec in tap_table(config).items() if spec.integer}
    assert integers == {f"layers.{i}.expert_ids" for i in range(3)}


# --- a tap is an argument ---


def test_no_tap_is_the_identity():
    array = np.array([1.0])
    assert no_tap("embed", array) is array


@pytest.mark.parametrize("name", ["embed", "layers.1.q_rope", "layers.1.expert_weights", "layers.2.mlp_out", "logits"])
def test_what_a_tap_answers_is_what_the_model_goes_on_with(name):
    def doubled(tap: str, array: np.ndarray) -> np.ndarray:
        return 2 * array if tap == name else array

    clean, changed = run("gpt_oss", no_tap), run("gpt_oss", doubled)
    assert np.linalg.norm(changed - clean) > 0.01 * np.linalg.norm(clean)


def test_a_tap_that_puts_the_recorded_values_back_changes_nothing():
    config = opened("gpt_oss/hf").config
    recorder = Recorder(config, tap_table(config))
    clean = run("gpt_oss", recorder)
    values = recorder.values
    np.testing.assert_array_equal(run("gpt_oss", lambda name, array: values[name]), clean)


# --- the recorder ---


def test_recorder_copies_and_keeps_only_the_names_it_was_given():
    config, seen = opened("llama/hf").config, []
    recorder = Recorder(config, ["embed", "logits"], seen.append)
    array = np.ones((2, 64))
    assert recorder("embed", array) is array
    recorder("layers.0.q", np.ones((2, 4, 16)))
    array[:] = 5
    assert recorder.values.keys() == {"embed"}
    assert recorder.values["embed"].tolist() == np.ones((2, 64)).tolist()
    assert seen == ["embed", "layers.0.q"]


def test_recorder_pads_the_keys_that_a_chunk_could_not_see():
    recorder = Recorder(opened("llama/hf").config, ["layers.0.attn_weights"])
    recorder("layers.0.attn_weights", np.ones((1, 2, 2)))
    recorder("layers.0.attn_weights", np.full((1, 1, 3), 2.0))
    assert recorder.values["layers.0.attn_weights"].tolist() == [[[1, 1, 0], [1, 1, 0], [2, 2, 2]]]


def test_recorder_joins_chunks_along_the_positions():
    config = opened("gpt_oss/hf").config
    whole, pieces = Recorder(config, tap_table(config)), Recorder(config, tap_table(config))
    run("gpt_oss", whole, chunks=[40])
    run("gpt_oss", pieces, chunks=[13, 20, 1, 6])
    assert list(pieces.values) == list(whole.values)
    for name, array in pieces.values.items():
        np.testing.assert_allclose(array, whole.values[name], rtol=0, atol=1e-12 * np.abs(array).max(), err_msg=name)
