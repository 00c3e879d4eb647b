"""Operands: the step itself, redone by hand from the elements that are shown, gives the element that is looked at."""

import numpy as np
import pytest

from assay.golden.operands import READS, operands_of
from assay.reference.taps import ATTENTION, DENSE, EXPERTS, OUTPUT, tap_table
from tests.checkpoint_files import opened, tokens_of
from tests.golden.faults import golden_of

LAST = opened("gpt_oss/hf").config.num_hidden_layers - 1


def shown(name, at, without=(), model="gpt_oss/hf"):
    """The operands among the golden's taps, by label."""
    golden = golden_of(model)
    given = {"tokens": np.array(tokens_of(model.split("/")[0])), **golden.taps}
    given = {tap: array for tap, array in given.items() if tap not in without}
    layers = opened(model).config.num_hidden_layers
    return {operand.tap + operand.index: operand.values for operand in operands_of(name, at, given, layers)}


def value(name, at, model="gpt_oss/hf"):
    return golden_of(model).taps[name][tuple(at)]


def test_a_residual_is_the_sum_of_its_operands():
    for name, at in (("layers.1.attn_residual", [7, 3]), ("layers.0.block_out", [2, 60])):
        operands = shown(name, at)
        assert len(operands) == 2
        assert sum(operands.values()) == pytest.approx(value(name, at), rel=1e-12)
    assert set(shown("layers.1.attn_residual", [7, 3])) == {"layers.0.block_out[7, 3]", "layers.1.attn_out[7, 3]"}
    assert set(shown("layers.0.attn_residual", [7, 3])) == {"embed[7, 3]", "layers.0.attn_out[7, 3]"}


@pytest.mark.parametrize(("at", "label"), [([9, 1, 5], "[9, 1, {5, 21}]"), ([9, 1, 21], "[9, 1, {5, 21}]")])
def test_a_rotation_turns_a_pair(at, label):
    """Both channels of the pair, and so their length but for YaRN's factor on all of them."""
    operands = shown("layers.0.q_rope", at)
    (pair,) = operands.values()
    assert list(operands) == [f"layers.0.q{label}"]
    np.testing.assert_array_equal(pair, value("layers.0.q", [9, 1])[[5, 21]])
    turned = value("layers.0.q_rope", [9, 1])[[5, 21]]
    factors = np.linalg.norm(value("layers.0.q_rope", [9, 1])) / np.linalg.norm(value("layers.0.q", [9, 1]))
    assert np.linalg.norm(turned) == pytest.approx(factors * np.linalg.norm(pair), rel=1e-12)


def test_a_mixture_is_the_weighted_sum_over_experts():
    operands = shown("layers.2.mlp_out", [4, 11])
    weights, outs = operands["layers.2.expert_weights[4, :]"], operands["layers.2.expert_out[4, :, 11]"]
    assert weights @ outs == pytest.approx(value("layers.2.mlp_out", [4, 11]), rel=1e-12)


def test_expert_weights_are_the_softmax_of_the_logits_shown():
    ids = golden_of().taps["layers.1.expert_ids"][6].tolist()
    operands = shown("layers.1.expert_weights", [6, 1])
    logits = operands[f"layers.1.router_logits[6, {{{ids[0]}, {ids[1]}}}]"]
    assert np.exp(logits[1]) / np.exp(logits).sum() == pytest.approx(
        value("layers.1.expert_weights", [6, 1]), rel=1e-12
    )


def test_a_norm_divides_by_the_row_that_is_shown():
    """x / rms(row) is the same multiple of the output, the weight, in every row."""
    eps = opened("gpt_oss/hf").config.rms_norm_eps
    weights = []
    for t in (0, 13):
        operands = shown("final_norm", [t, 8])
        x, row = operands[f"layers.{LAST}.block_out[{t}, 8]"], operands[f"layers.{LAST}.block_out[{t}, :]"]
        weights.append(value("final_norm", [t, 8]) * np.sqrt(np.mean(row**2) + eps) / x)
    assert weights[0] == pytest.approx(weights[1], rel=1e-10)


def test_query_heads_share_a_key_head():
    operands = shown("layers.0.attn_heads", [5, 3, 2])
    assert set(operands) == {"layers.0.q_rope[5, 3, :]", "layers.0.k_rope[:6, 1, :]", "layers.0.v[:6, 1, 2]"}
    assert operands["layers.0.k_rope[:6, 1, :]"].shape == (6, 32)


def test_a_dense_feed_forward():
    assert set(shown("layers.0.mlp_out", [3, 1], model="llama/hf")) == {"layers.0.act[3, :]"}


def test_what_was_not_supplied_says_so():
    assert shown("layers.1.attn_norm", [0, 0], without={"layers.0.block_out"}) == {
        "layers.0.block_out[0, 0]": None,
        "layers.0.block_out[0, :]": None,
    }
    without = {"layers.0.q", "layers.0.expert_ids", "layers.0.k_rope"}
    assert shown("layers.0.q_rope", [0, 0, 3], without)["layers.0.q[0, 0, 3]"] is None
    operands = shown("layers.0.attn_heads", [5, 3, 2], without)
    assert operands["layers.0.k_rope[:6, 1, :]"] is None
    assert operands["layers.0.v[:6, 1, 2]"].shape == (6,)


def test_without_the_number_of_layers_the_final_norm_has_no_operands():
    assert operands_of("final_norm", [0, 0], dict(golden_of().taps), None) == []


@pytest.mark.parametrize("model", ["gpt_oss/hf", "llama/hf"])
def test_every_tap_has_operands(model):
    golden = golden_of(model)
    for name in tap_table(opened(model).config):
        if name in golden.taps:
            at = [0] * (1 if name.endswith("expert_ids") else golden.taps[name].ndim)
            operands = shown(name, at, model=model)
            assert operands, name
            assert all(values is not None for values in operands.values()), name


def test_the_table_knows_every_kind_of_tap():
    kinds = {spec.name for spec in (*ATTENTION, *DENSE, *EXPERTS, *OUTPUT)} | {"embed", "final_norm", "logits"}
    assert set(READS) == kinds - {"mlp_out"}  # which depends on the model
