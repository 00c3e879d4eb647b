"""Details: what is drawn of a tap, against arrays whose errors are where we put them."""

import math

import numpy as np
import pytest

from assay.golden.detail import BINS, BINS_PER_DECADE, CELLS_PER_DECADE, LEVELS, LOST, LOWEST_BIN, LOWEST_CELL, Details

U = 2.0**-24
RNG = np.random.default_rng(0)


def looked_at(name, expected, got, noisy):
    details = Details([3, 1, 4], U, 2)
    details(name, expected, got, noisy)
    return details.taps[name]


def with_noise(shape):
    """Expected, and a noisy copy whose every element is off by exactly 1e-3."""
    expected = RNG.standard_normal(shape)
    return expected, expected + 1e-3 * RNG.choice([-1, 1], shape)


def levels_of(drawn):
    """The map's cells as decades of the noise; None where lost."""
    decades = [None if c == LOST else LOWEST_CELL + LEVELS.index(c) / CELLS_PER_DECADE for c in drawn["cells"]]
    R, C = drawn["shape"]
    return [decades[r * C : (r + 1) * C] for r in range(R)]


def test_the_histogram_counts_elements_by_multiples_of_the_noise():
    expected, noisy = with_noise((4, 10))
    got = expected.copy()
    got[0, :3] += [2e-3, 5e-3, 0.2]  # 2, 5 and 200 times the noise
    detail = looked_at("embed", expected, got, noisy)
    counts = dict(enumerate(detail["histogram"]))

    def bin_of(multiple):
        return math.floor((math.log10(multiple) - LOWEST_BIN) * BINS_PER_DECADE)

    assert detail["scale"] == pytest.approx(1e-3, rel=1e-9)
    assert {i: n for i, n in counts.items() if n} == {0: 37, bin_of(2): 1, bin_of(5): 1, bin_of(200): 1}
    assert sum(detail["noise_histogram"]) == 40
    # 1 is the edge of two bins: rounding decides
    assert sum(detail["noise_histogram"][bin_of(1) - 1 : bin_of(1) + 1]) == 40


def test_what_is_off_the_scale_is_counted_at_its_ends():
    expected, noisy = with_noise((2, 3))
    got = expected + np.array([[1e300, 1e-9, 0], [0, 0, np.nan]])
    detail = looked_at("embed", expected, got, noisy)
    assert (detail["histogram"][0], detail["histogram"][BINS - 1], sum(detail["histogram"])) == (4, 1, 5)


def test_a_map_shows_where_the_error_is():
    expected, noisy = with_noise((8, 16))
    got = noisy.copy()
    got[5, 7] = expected[5, 7] + 1.0  # a thousand times the noise
    (drawn,) = looked_at("layers.0.attn_out", expected, got, noisy)["maps"]
    assert (drawn["axes"], drawn["of"], drawn["shape"]) == (["T", "D"], [8, 16], [8, 16])
    cells = levels_of(drawn)
    assert cells[5][7] == pytest.approx(3, abs=0.11)
    assert all(cells[r][c] == pytest.approx(0, abs=0.11) for r in range(8) for c in range(16) if (r, c) != (5, 7))


def test_a_large_map_is_pooled_and_says_what_it_is_of():
    expected, noisy = with_noise((100, 1000))
    got = noisy.copy()
    got[99, 999] = np.inf
    (drawn,) = looked_at("logits", expected, got, noisy)["maps"]
    assert (drawn["of"], drawn["shape"], len(drawn["cells"])) == ([100, 1000], [32, 64], 32 * 64)
    assert drawn["cells"].index(LOST) == 32 * 64 - 1
    # the root mean square of a cell of equal errors is that error
    assert {round(cell, 6) for row in levels_of(drawn) for cell in row if cell is not None} == {0}


def test_three_axes_are_two_maps():
    expected, noisy = with_noise((5, 4, 32))
    got = noisy.copy()
    got[:, 2, :] += 0.1
    by_head, by_channel = looked_at("layers.0.q", expected, got, noisy)["maps"]
    assert (by_head["axes"], by_head["shape"]) == (["T", "H"], [5, 4])
    assert (by_channel["axes"], by_channel["shape"]) == (["T", "C"], [5, 32])
    for row in levels_of(by_head):
        assert [round(cell, 1) for cell in row] == [0, 0, 2, 0]
    # of four heads one is 100 times off: the root mean square over them is half of it
    assert all(cell == pytest.approx(math.log10(50), abs=0.11) for row in levels_of(by_channel) for cell in row)


def test_attention_matrices_have_positions_down():
    expected, noisy = with_noise((2, 5, 7))
    drawn = looked_at("layers.0.attn_scores", expected, noisy, noisy)["maps"]
    assert [(map["axes"], map["of"]) for map in drawn] == [(["T", "H"], [5, 2]), (["T", "S"], [5, 7])]


def test_a_step_without_noise_is_measured_by_the_roundoff():
    expected = np.full((3, 4), 2.0)
    got = expected + 2 * U  # one roundoff
    assert looked_at("embed", expected, got, expected)["scale"] == pytest.approx(2 * U / 4)
    assert looked_at("embed", expected, got, None)["scale"] == pytest.approx(2 * U)
    assert looked_at("embed", expected, got, None)["noise_histogram"] is None
    nothing = looked_at("embed", np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4)))
    assert set(nothing["maps"][0]["cells"]) == {LEVELS[0]}


def test_the_worst_element_and_its_operands():
    expected, noisy = with_noise((3, 4))
    got = noisy.copy()
    got[2, 1] = -9.5
    worst = looked_at("embed", expected, got, noisy)
    assert worst["worst"] == {"at": [2, 1], "expected": f"{expected[2, 1]:.9g}", "got": "-9.5"}
    assert worst["operands"] == [{"what": "tokens[2]", "is": "4"}]
    got[0, 0] = np.nan
    assert looked_at("embed", expected, got, noisy)["worst"]["got"] == "nan"


def test_many_operands_are_summarised():
    details = Details([0, 1], U, 1)
    row = np.array([[3.0, -4.0, 0, 0, 0, 0, 0, 0, np.nan], np.zeros(9)])
    details("embed", row, row, row)
    details("layers.0.attn_norm", np.ones((2, 9)), np.ones((2, 9)) * 2, np.ones((2, 9)))
    operands = {operand["what"]: operand["is"] for operand in details.taps["layers.0.attn_norm"]["operands"]}
    assert operands["embed[0, 0]"] == "3"
    assert operands["embed[0, :]"] == f"9 values, rms {math.sqrt(25 / 8):.6g}, -4 to 3, 1 not finite"


def test_expert_ids_are_sets():
    expected, got = np.array([[0, 1], [2, 3], [1, 0]]), np.array([[1, 0], [2, 1], [1, 0]])
    detail = looked_at("layers.0.expert_ids", expected, got, expected)
    assert (detail["scale"], detail["histogram"]) == (None, None)
    assert detail["maps"][0]["cells"] == "000!00".replace("!", LOST)
    assert detail["worst"] == {"at": [1], "expected": "2, 3", "got": "2, 1"}


def test_a_tap_of_no_table_or_of_other_axes_is_passed_over():
    details = Details([0], U, None)
    details("layers.0.<script>", np.ones((1, 2)), np.ones((1, 2)), None)
    details("embed", np.ones((1, 1, 2)), np.ones((1, 1, 2)), None)
    assert details.taps == {}


def test_only_two_layers_are_held():
    details = Details([0], U, 30)
    for i in range(30):
        details(f"layers.{i}.block_out", np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2)))
    assert list(details._given) == ["layers.28.block_out", "layers.29.block_out"]
