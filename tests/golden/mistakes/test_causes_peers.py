"""Mistakes made in transformers get the right name; faults that the catalogue does not know get none."""

from typing import Any

import pytest

from tests.golden import injected_attention as attention
from tests.golden import injected_layers as layers
from tests.golden import injected_more as more
from tests.golden.injected_kernels import KERNELS
from tests.golden.injected_outside import OUTSIDE
from tests.golden.injection import check, inject
from tests.golden.test_injected_mistakes_peers import CASES, Goldens, Mistake, checked, goldens

pytestmark = pytest.mark.peers
__all__ = ["goldens"]

# what our catalogue calls what tests/golden/injected_*.py do to transformers
TWINS: dict[Any, str | None] = {
    attention.yarn_ramp_rounded: "yarn-ramp-rounded",
    attention.yarn_attention_factor_missing: "yarn-factor-missing",
    attention.yarn_attention_factor_squared: "yarn-factor-twice",
    attention.rope_base_10000: "rope-base-10000",
    attention.yarn_scales_positions: "yarn-scales-positions",
    attention.yarn_from_the_new_context: "yarn-new-context",
    attention.rope_turns_neighbours: "rope-neighbours",
    attention.rope_angles_in_bfloat16: "rope-angles-bfloat16",
    attention.window_one_more: "window-one-more",
    attention.window_one_less: "window-one-less",
    attention.window_missing: "window-missing",
    attention.mistral_window_missing: "window-missing",
    attention.window_on_all_layers: "window-on-all-layers",
    attention.window_on_the_other_layers: "window-on-other-layers",
    attention.sinks_missing: "sinks-missing",
    attention.sinks_counted_twice: "sinks-twice",
    attention.sinks_of_the_next_head: "sinks-of-the-next-head",
    attention.scores_scaled_by_hidden_size: "scale-by-hidden-size",
    attention.query_heads_share_keys_by_turns: "heads-share-by-turns",
    attention.cached_values_rolled: "cache-ring-rolled",  # layer 0 is windowed: transformers keeps window - 1 positions
    attention.positions_restart_in_each_chunk: "positions-restart",
    attention.positions_one_late_after_the_first_chunk: "positions-one-late",
    attention.cached_keys_skipped: "cached-keys-skipped",
    attention.queries_and_keys_permuted: "qk-rows-to-neighbours",
    attention.keys_permuted: "k-rows-to-neighbours",
    attention.query_bias_missing: "q-bias-missing",
    attention.output_projection_transposed: "o-transposed",
    layers.clamp_missing: "clamp-missing",
    layers.activation_is_plain_silu: "silu-plain",
    layers.plus_one_missing: "plus-one-missing",
    layers.gate_and_up_swapped: "gate-up-swapped",
    layers.gate_and_up_not_interleaved: "gate-up-not-interleaved",
    layers.gate_and_up_swapped_in_the_weights: "gate-up-matrices-swapped",
    layers.down_projection_transposed: "expert-down-transposed",
    layers.gate_bias_missing: "gate-up-bias-missing",
    layers.down_bias_missing: "down-bias-missing",
    layers.down_bias_once_per_rank: "down-bias-per-rank",
    layers.reduced_twice: "reduced-twice",
    layers.softmax_over_all_experts: "softmax-over-all-experts",
    layers.router_in_bfloat16: "router-bfloat16",
    layers.router_bias_missing: "router-bias-missing",
    layers.experts_chosen_without_bias: "experts-chosen-without-bias",
    layers.expert_weights_in_the_wrong_slot: "expert-weights-wrong-slot",
    layers.mxfp4_nibbles_swapped: "mxfp4-nibbles-swapped",
    layers.mxfp4_nibbles_from_block_halves: "mxfp4-read-as-halves",
    layers.scale_exponents_one_too_large: "mxfp4-down-exponent-high",
    layers.one_scale_one_too_large: None,
    layers.norm_epsilon_ten_times_smaller: "norm-epsilon-smaller",
    layers.norm_weight_plus_one: "norm-plus-one",
    layers.head_tied: "head-tied",
    layers.head_not_tied: None,  # random numbers
    layers.residual_in_bfloat16: "block-output-bfloat16",
    layers.gelu_for_silu: "gelu",
    layers.mlp_bias_missing: "mlp-down-bias-missing",
    layers.final_norm_missing: "final-norm-missing",
    layers.embedding_scaled: "embedding-scaled",
}


def twin(family: str, mistake: Mistake) -> str | None:
    """The catalogue's id."""
    if mistake.apply is attention.rope_scaling_missing:
        return "yarn-missing" if family.startswith("gpt-oss") else "llama3-missing"
    return TWINS[mistake.apply]


@pytest.mark.parametrize(("family", "mistake", "mode"), CASES)
def test_the_mistake_is_named(
    goldens: Goldens,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    mistake: Mistake,
    mode: str,
) -> None:
    _, report = checked(goldens, monkeypatch, family, mistake, mode)
    cause = report["cause"]
    assert report["first_divergence"]["tap"] == mistake.tap
    assert (cause and cause["id"]) == twin(family, mistake), cause


MORE = [pytest.param(family, id, id=f"{family} {id}") for family, table in more.TABLE.items() for id in table]


@pytest.mark.parametrize(("family", "id"), MORE)
def test_more_of_the_catalogue_is_found_and_named(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch, family: str, id: str
) -> None:
    golden, mistake = goldens(family), more.TABLE[family][id]
    inject(mistake.apply, monkeypatch)
    _, report = check(golden, "float32")
    first, cause = report["first_divergence"], report["cause"]
    assert (first and first["tap"], cause and cause["id"]) == (mistake.tap, id)


FAULTS = OUTSIDE | KERNELS


@pytest.mark.parametrize(("what", "mode"), [(what, mode) for what, fault in FAULTS.items() for mode in fault.modes])
def test_a_fault_outside_the_catalogue_is_found_and_not_misnamed(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch, what: str, mode: str
) -> None:
    golden, fault = goldens("gpt-oss"), FAULTS[what]
    inject(fault.apply, monkeypatch)
    _, report = check(golden, mode)
    assert (report["first_divergence"]["tap"], report["cause"]) == (fault.tap, None)
    assert report["structure"]["sentence"]


# mistakes that are made in the parameters, and the weight that is found wrong first
IN_THE_WEIGHTS = {
    attention.output_projection_transposed: "self_attn.o_proj.weight",
    attention.queries_and_keys_permuted: "self_attn.q_proj.weight",
    attention.keys_permuted: "self_attn.k_proj.weight",
    attention.sinks_of_the_next_head: "self_attn.sinks",
    layers.gate_and_up_swapped_in_the_weights: "mlp.experts.gate_proj.weight",
    layers.down_projection_transposed: "mlp.experts.down_proj.weight",
    layers.mxfp4_nibbles_swapped: "mlp.experts.gate_proj.weight",
    layers.scale_exponents_one_too_large: "mlp.experts.down_proj.weight",
}


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", IN_THE_WEIGHTS)
def test_wrong_weights_are_named_before_any_activation(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch, mistake: Any, mode: str
) -> None:
    family = "llama" if mistake in (attention.output_projection_transposed, attention.queries_and_keys_permuted) else ""
    family = "llama" if mistake is attention.keys_permuted else family or "gpt-oss"
    golden = goldens(family)
    inject(mistake, monkeypatch, with_weights=True)
    _, report = check(golden, mode)
    assert report["first_divergence"]["tap"] == f"weights.model.layers.0.{IN_THE_WEIGHTS[mistake]}"
    assert report["cause"]["id"] == TWINS[mistake]


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt-oss", "llama", "mistral"])
def test_the_weights_of_transformers_are_the_checkpoints(goldens: Goldens, family: str, mode: str) -> None:
    status, report = check(goldens(family), mode)
    assert (status, report["weights"]["differing"]) == (0, [])
    assert report["weights"]["compared"] >= 20
