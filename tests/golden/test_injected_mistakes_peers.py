"""Known mistakes made in transformers: `assay check` exits 1, names the tap where each first acts, and no later one.

The numbers beside them are those of the catalogue of known mistakes. Those for float32 only round to bfloat16
what bfloat16 rounds anyway, or what is lost in its rounding on a prompt this short.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden import injected_attention as attention
from tests.golden import injected_layers as layers
from tests.golden.injection import FLOAT32, Mistake, check, diverging, inject, random_tokens, record, shrink_embedding

pytestmark = pytest.mark.peers

WINDOW = 12
FIRST_CHUNK = 30
CHUNKS = f"{FIRST_CHUNK},1,7"
SMALL = 7  # a token whose embedding is so small that RMSNorm's epsilon counts
PROMPT = 100
TOKENS = random_tokens(400)
TOKENS[40] = SMALL

GPT_OSS = (
    Mistake(attention.yarn_ramp_rounded, "layers.0.q_rope", needs=2),  # 1
    Mistake(attention.yarn_attention_factor_missing, "layers.0.q_rope"),  # 2
    Mistake(attention.yarn_attention_factor_squared, "layers.0.q_rope"),  # 2
    Mistake(attention.rope_scaling_missing, "layers.0.q_rope"),  # 3
    Mistake(attention.rope_base_10000, "layers.0.q_rope", needs=2),  # 3
    Mistake(attention.yarn_scales_positions, "layers.0.q_rope", needs=2),  # 4
    Mistake(attention.yarn_from_the_new_context, "layers.0.q_rope", needs=2),
    Mistake(attention.rope_turns_neighbours, "layers.0.q_rope", needs=2),  # 7
    Mistake(attention.rope_angles_in_bfloat16, "layers.0.q_rope", needs=2, modes=FLOAT32),  # 8
    Mistake(attention.window_one_more, "layers.0.attn_heads", needs=WINDOW + 1),  # 9
    Mistake(attention.window_one_less, "layers.0.attn_heads", needs=WINDOW),  # 9
    Mistake(attention.window_missing, "layers.0.attn_heads", needs=WINDOW + 1),  # 10
    Mistake(attention.window_on_all_layers, "layers.1.attn_heads", needs=WINDOW + 1),  # 10
    Mistake(attention.window_on_the_other_layers, "layers.0.attn_heads", needs=WINDOW + 1),  # 10
    Mistake(attention.sinks_missing, "layers.0.attn_heads"),  # 13
    Mistake(attention.sinks_counted_twice, "layers.0.attn_heads"),  # 14
    Mistake(attention.sinks_of_the_next_head, "layers.0.attn_heads"),  # 15
    Mistake(attention.scores_scaled_by_hidden_size, "layers.0.attn_heads"),
    Mistake(attention.query_heads_share_keys_by_turns, "layers.0.attn_heads"),
    Mistake(layers.clamp_missing, "layers.0.expert_act"),  # 16
    Mistake(layers.activation_is_plain_silu, "layers.0.expert_act"),  # 17
    Mistake(layers.plus_one_missing, "layers.0.expert_act"),  # 17
    Mistake(layers.gate_and_up_swapped, "layers.0.expert_act"),  # 18
    Mistake(layers.gate_and_up_not_interleaved, "layers.0.expert_act"),  # 18
    Mistake(layers.gate_and_up_swapped_in_the_weights, "layers.0.expert_gate"),  # 18
    Mistake(layers.down_projection_transposed, "layers.0.mlp_out"),  # 20
    Mistake(layers.gate_bias_missing, "layers.0.expert_gate"),  # 21
    Mistake(layers.down_bias_missing, "layers.0.mlp_out"),  # 21
    Mistake(layers.down_bias_once_per_rank, "layers.0.mlp_out"),  # 21
    Mistake(layers.reduced_twice, "layers.0.mlp_out"),  # 22
    Mistake(layers.softmax_over_all_experts, "layers.0.expert_weights"),  # 23
    Mistake(layers.router_in_bfloat16, "layers.0.router_logits", modes=FLOAT32),  # 24
    Mistake(layers.router_bias_missing, "layers.0.router_logits"),
    Mistake(layers.experts_chosen_without_bias, "layers.0.expert_ids"),
    Mistake(layers.expert_weights_in_the_wrong_slot, "layers.0.mlp_out"),  # 25
    Mistake(layers.mxfp4_nibbles_swapped, "layers.0.expert_gate"),  # 26
    Mistake(layers.mxfp4_nibbles_from_block_halves, "layers.0.expert_gate"),  # 26
    Mistake(layers.scale_exponents_one_too_large, "layers.0.mlp_out"),  # 27
    Mistake(layers.one_scale_one_too_large, "layers.0.expert_gate"),  # 28
    Mistake(layers.norm_epsilon_ten_times_smaller, "layers.0.attn_norm"),  # 34
    Mistake(layers.norm_weight_plus_one, "layers.0.attn_norm"),  # 34
    Mistake(layers.head_tied, "logits"),  # 37
    Mistake(layers.residual_in_bfloat16, "layers.0.block_out", modes=FLOAT32),
)
GPT_OSS_CHUNKED = (
    Mistake(attention.cached_values_rolled, "layers.0.attn_heads", needs=FIRST_CHUNK + 1),  # 11
    Mistake(attention.positions_restart_in_each_chunk, "layers.0.q_rope", needs=FIRST_CHUNK + 1),  # 35
    Mistake(attention.positions_one_late_after_the_first_chunk, "layers.0.q_rope", needs=FIRST_CHUNK + 1),  # 35
    Mistake(attention.cached_keys_skipped, "layers.0.attn_heads", needs=FIRST_CHUNK + 1),  # 36
    Mistake(attention.window_one_more, "layers.0.attn_heads", needs=WINDOW + 1),  # 9
)
LLAMA = (
    Mistake(attention.rope_scaling_missing, "layers.0.q_rope", needs=2),  # 6
    Mistake(attention.rope_turns_neighbours, "layers.0.q_rope", needs=2),  # 7
    Mistake(attention.queries_and_keys_permuted, "layers.0.q"),  # 7
    Mistake(attention.keys_permuted, "layers.0.k"),  # 7
    Mistake(attention.rope_angles_in_bfloat16, "layers.0.q_rope", needs=2, modes=FLOAT32),  # 8
    Mistake(attention.query_heads_share_keys_by_turns, "layers.0.attn_heads"),
    Mistake(attention.query_bias_missing, "layers.0.q"),
    Mistake(attention.output_projection_transposed, "layers.0.attn_out"),
    Mistake(layers.gelu_for_silu, "layers.0.act"),  # 19
    Mistake(layers.mlp_bias_missing, "layers.0.mlp_out"),
    Mistake(layers.norm_epsilon_ten_times_smaller, "layers.0.attn_norm"),  # 34
    Mistake(layers.norm_weight_plus_one, "layers.0.attn_norm"),  # 34
    Mistake(layers.final_norm_missing, "final_norm"),
    Mistake(layers.embedding_scaled, "embed"),
    Mistake(layers.head_not_tied, "logits"),  # 37
)
LLAMA_CHUNKED = (
    Mistake(attention.positions_restart_in_each_chunk, "layers.0.q_rope", needs=FIRST_CHUNK + 1),  # 35
    Mistake(attention.cached_keys_skipped, "layers.0.attn_heads", needs=FIRST_CHUNK + 1),  # 36
)
MISTRAL = (
    Mistake(attention.window_one_more, "layers.0.attn_heads", needs=WINDOW + 1),  # 9
    Mistake(attention.window_one_less, "layers.0.attn_heads", needs=WINDOW),  # 9
    Mistake(attention.mistral_window_missing, "layers.0.attn_heads", needs=WINDOW + 1),  # 10
    Mistake(layers.head_tied, "logits"),  # 37
)
TABLE = {
    "gpt-oss": GPT_OSS,
    "gpt-oss chunked": GPT_OSS_CHUNKED,
    "llama": LLAMA,
    "llama chunked": LLAMA_CHUNKED,
    "mistral": MISTRAL,
}
ROWS = [(family, mistake) for family, table in TABLE.items() for mistake in table]
CASES = [
    pytest.param(family, mistake, mode, id=f"{family} {mistake.name} {mode}")
    for family, mistake in ROWS
    for mode in mistake.modes
]
HIDDEN = [pytest.param(family, mistake, id=f"{family} {mistake.name}") for family, mistake in ROWS if mistake.needs > 1]
# taps that are the same step of the same mistake: none other may be out of its allowance
TOGETHER = (
    {"q", "k", "v"},
    {"q_rope", "k_rope"},
    {"attn_norm", "mlp_norm", "final_norm"},
    {"expert_gate", "expert_up"},
)

Goldens = Callable[..., Path]


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> Goldens:
    return goldens_in(tmp_path_factory.mktemp("mistakes"))


def goldens_in(root: Path) -> Goldens:
    """Answers the golden of a family for the first T of TOKENS; each is recorded once."""
    from tests.tiny import make_gpt_oss, make_llama

    # the experts' down projections are square, so that a transposed one still fits
    make_gpt_oss(root / "gpt-oss", seed=3, intermediate_size=64, num_hidden_layers=2, sliding_window=WINDOW)
    make_llama(root / "llama", seed=3, attention_bias=True, mlp_bias=True)
    make_llama(root / "mistral", seed=3, architecture="mistral", sliding_window=WINDOW)
    for name in ("gpt-oss", "llama"):
        shrink_embedding(root / name, SMALL, 1 / 128)

    def golden(family: str, T: int = PROMPT, *options: str) -> Path:
        name, *chunked = family.split()
        path = root / f"{family}-{T}{''.join(options)}.safetensors".replace("*", "all")
        if chunked:
            options = (*options, "--chunks", CHUNKS)
        return path if path.exists() else record(root / name, path, TOKENS[:T], *options)

    return golden


_checked: dict[tuple[str, str, str], tuple[int, dict[str, Any]]] = {}  # the tests of causes look at the same reports


def checked(
    goldens: Goldens, patch: pytest.MonkeyPatch, family: str, mistake: Mistake, mode: str
) -> tuple[int, dict[str, Any]]:
    """Exit status and report of the check of a mistake, made once."""
    key = family, mistake.name, mode
    if key not in _checked:
        inject(mistake.apply, patch)
        _checked[key] = check(goldens(family), mode)
    return _checked[key]


def same_step(tap: str) -> set[str]:
    """The kinds of tap that a mistake which first acts at `tap` may show at."""
    kind = tap.rsplit(".", 1)[-1]
    return next((kinds for kinds in TOGETHER if kind in kinds), {kind})


@pytest.mark.parametrize(("family", "mistake", "mode"), CASES)
def test_mistake_is_found_where_it_first_acts(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch, family: str, mistake: Mistake, mode: str
) -> None:
    status, report = checked(goldens, monkeypatch, family, mistake, mode)
    first = report["first_divergence"]
    assert (status, report["verdict"], first and first["tap"]) == (1, "diverges", mistake.tap)
    assert first["worst_position"] >= mistake.needs - 1
    assert diverging(report) <= same_step(mistake.tap)


@pytest.mark.parametrize(("family", "mistake"), HIDDEN)
def test_mistake_needs_as_many_tokens_as_the_table_says(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch, family: str, mistake: Mistake
) -> None:
    short, enough = goldens(family, mistake.needs - 1), goldens(family, mistake.needs)
    inject(mistake.apply, monkeypatch)
    assert check(short, "float32")[0] == 0
    status, report = check(enough, "float32")
    assert (status, report["first_divergence"]["tap"]) == (1, mistake.tap)
    assert report["first_divergence"]["worst_position"] == mistake.needs - 1


@pytest.mark.parametrize("family", TABLE)
@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
def test_the_same_checkpoint_without_a_mistake_matches(goldens: Goldens, family: str, mode: str) -> None:
    status, report = check(goldens(family), mode)
    assert (status, report["verdict"], report["first_divergence"]) == (0, "match", None)


@pytest.mark.parametrize("family", ["gpt-oss", "llama"])
def test_angles_in_bfloat16_show_in_bfloat16_on_a_long_prompt(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The angle's error grows with the position: within PROMPT it is of the size of bfloat16's own rounding."""
    golden = goldens(family, len(TOKENS))
    inject(attention.rope_angles_in_bfloat16, monkeypatch)
    status, report = check(golden, "bfloat16")
    assert (status, report["first_divergence"]["tap"]) == (1, "layers.0.q_rope")
    assert report["first_divergence"]["worst_position"] > PROMPT


def test_with_attention_weights_recorded_a_window_mistake_is_found_there(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = goldens("gpt-oss", 40, "--taps", "*")
    inject(attention.window_one_more, monkeypatch)
    status, report = check(golden, "float32")
    assert (status, report["first_divergence"]["tap"]) == (1, "layers.0.attn_weights")
    assert report["structure"]["places"]["T"]["first"] == WINDOW


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
def test_a_row_that_is_not_a_number_is_found_and_the_other_rows_still_judged(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Number 12 of the catalogue: here the first position, which may no more look at itself."""
    golden = goldens("llama")
    inject(attention.own_key_masked, monkeypatch)
    status, report = check(golden, mode)
    first = report["first_divergence"]
    assert (status, first["tap"], first["worst_position"]) == (1, "layers.0.attn_heads", 0)
    assert first["worst"]["got"] is None
    taps = {tap["tap"]: tap for tap in report["taps"]}
    assert taps["layers.0.attn_heads"]["nonfinite"] == 4 * 16
    assert taps["layers.0.attn_out"]["nonfinite"] == taps["layers.0.block_out"]["nonfinite"] == 64
    # later steps did nothing wrong with the finite rows that they got
    assert max(tap["ratio"] for name, tap in taps.items() if not name.endswith("attn_heads")) < report["allowance"]


# --- a check that cannot see must not pass the tests above

BLIND_TO = [
    attention.yarn_ramp_rounded,
    attention.window_one_more,
    layers.clamp_missing,
    layers.one_scale_one_too_large,
]


def echo(checkpoint: Any, tokens: Any, chunks: Any, backend: Any, names: Any, *rest: Any, **kwargs: Any) -> Any:
    """A forced pass that takes the backend's word for everything."""
    return {name: backend[name] for name in names if name in backend}


@pytest.mark.parametrize("mistake", BLIND_TO)
def test_with_the_backends_own_values_as_expected_ones_nothing_is_found(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    monkeypatch.setattr("assay.golden.check.forced_pass", echo)
    inject(mistake, monkeypatch)
    status, report = check(goldens("gpt-oss"), "float32")
    assert (status, report["first_divergence"]) == (0, None)


@pytest.mark.parametrize("mistake", BLIND_TO)
def test_with_a_boundless_allowance_nothing_is_found(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    monkeypatch.setattr("assay.golden.measure.ALLOWANCE", math.inf)
    inject(mistake, monkeypatch)
    status, report = check(goldens("gpt-oss"), "float32")
    assert (status, report["first_divergence"]) == (0, None)


def test_with_a_comparison_of_the_backend_to_itself_nothing_is_found(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assay.golden.measure import compare

    blind = lambda expected, got, noisy, *rest: compare(got, got, got, *rest)  # noqa: E731
    monkeypatch.setattr("assay.golden.check.compare", blind)
    inject(attention.window_one_more, monkeypatch)
    assert check(goldens("gpt-oss"), "float32")[0] == 0


def test_without_forcing_the_mistake_is_blamed_on_later_taps_too(
    goldens: Goldens, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assay.golden.forced import forced_pass

    def free_running(checkpoint: Any, tokens: Any, chunks: Any, backend: Any, *rest: Any, **kwargs: Any) -> Any:
        return forced_pass(checkpoint, tokens, chunks, {}, *rest, **kwargs)

    for module in ("check", "forced"):  # the noise is that of the pass that is judged
        monkeypatch.setattr(f"assay.golden.{module}.forced_pass", free_running)
    inject(attention.window_one_more, monkeypatch)
    _, report = check(goldens("gpt-oss"), "float32")
    assert report["first_divergence"]["tap"] == "layers.0.attn_heads"
    assert {"attn_out", "mlp_norm", "router_logits", "mlp_out", "logits"} <= diverging(report)
    assert np.isfinite(report["first_divergence"]["ratio"])
