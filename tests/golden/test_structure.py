"""The structure of an error: each pattern, planted, is the one named; noise, planted, is not."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.golden.measure import ALLOWANCE
from assay.golden.structure import describe, describe_ids

Array = np.ndarray
NOISE = 1e-5  # of values of size 1
AXES = {2: ("TD", "TV"), 3: ("THC", "TAF")}


def draw(seed: int, shape: tuple[int, ...]) -> tuple[Array, Array, np.random.Generator]:
    """Expected values of size 1, and those with noise."""
    rng = np.random.default_rng(seed)
    expected = rng.standard_normal(shape)
    return expected, expected + NOISE * rng.standard_normal(shape), rng


def described(seed: int, shape: tuple[int, ...], change: Callable[[Array], Array], axes: str = "", **more) -> dict:
    """The structure of what a change leaves of a tensor, the backend having noise of its own."""
    expected, noisy, rng = draw(seed, shape)
    got = change(expected) + NOISE * rng.standard_normal(shape)
    return describe(expected, got, noisy, axes or AXES[len(shape)][0], **more)


def first(structure: dict) -> tuple[str, dict]:
    """The pattern named, which must fit, and its parameters."""
    assert structure["patterns"], structure
    best = structure["patterns"][0]
    assert best["fits"], structure
    assert best["residual"] <= ALLOWANCE
    assert structure["sentence"] == best["sentence"]
    return best["pattern"], best["parameters"]


few = settings(max_examples=30)  # a search each
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(8, 20), st.integers(3, 5), st.sampled_from([16, 24]))
factors = st.floats(0.01, 30).filter(lambda a: abs(a - 1) > 0.05).map(lambda a: round(a, 3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lost", [np.s_[:], np.s_[:, :, 3], np.s_[1:]])
def test_exact_zeros_are_described_without_a_warning(lost) -> None:
    """As a buffer that nobody wrote: no phase can be told of it."""
    expected, noisy, _ = draw(0, (12, 3, 16))
    got = expected.copy()
    got[lost] = 0
    assert describe(expected, got, noisy, "THC")["sentence"].startswith("zero")


@few
@given(seeds, shapes, factors)
def test_a_factor(seed: int, shape: tuple[int, ...], factor: float) -> None:
    name, parameters = first(described(seed, shape, lambda x: factor * x))
    assert name == "factor"
    assert parameters["factor"] == pytest.approx(factor, rel=1e-3)


@few
@given(seeds, shapes, st.data())
def test_a_factor_of_one_head(seed: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    head = data.draw(st.integers(0, shape[1] - 1))
    factor = data.draw(factors)

    def change(x: Array) -> Array:
        x = x.copy()
        x[:, head] *= factor
        return x

    structure = described(seed, shape, change)
    assert first(structure)[0] == "factor"
    assert structure["places"]["H"] == {"affected": 1, "of": shape[1], "first": head, "which": str(head)}
    assert f"query head {head}" in structure["sentence"]


@few
@given(seeds, shapes, st.sampled_from("THC"))
def test_a_factor_for_each_entry_of_an_axis(seed: int, shape: tuple[int, ...], letter: str) -> None:
    axis = "THC".index(letter)
    factor = np.random.default_rng(seed + 1).uniform(1.2, 3, shape[axis])
    wide = factor.reshape([-1 if i == axis else 1 for i in range(3)])
    name, parameters = first(described(seed, shape, lambda x: wide * x))
    assert name == f"factor along {letter}"
    np.testing.assert_allclose(parameters["factors"], factor, rtol=1e-3)


@few
@given(seeds, shapes)
def test_a_sign(seed: int, shape: tuple[int, ...]) -> None:
    assert first(described(seed, shape, np.negative))[0] == "sign"
    turned = np.where(np.arange(shape[2]) % 3, 1, -1)
    name, parameters = first(described(seed, shape, lambda x: x * turned))
    # only channels 0, 3, 6, ... differ: within those it is one sign for all
    assert (name, parameters) == ("sign", {"factor": -1.0})


@few
@given(seeds, shapes)
def test_zeros(seed: int, shape: tuple[int, ...]) -> None:
    expected, noisy, _ = draw(seed, shape)
    got = expected.copy()
    got[-2:] = 0
    structure = describe(expected, got, noisy, "THC")
    assert first(structure)[0] == "zero"
    assert structure["places"]["T"]["first"] == shape[0] - 2


@few
@given(seeds, shapes, st.floats(-3, 3).filter(lambda c: abs(c) > 0.01))
def test_an_offset(seed: int, shape: tuple[int, ...], offset: float) -> None:
    name, parameters = first(described(seed, shape, lambda x: x + offset))
    assert name == "offset"
    assert parameters["offset"] == pytest.approx(offset, abs=1e-4)


@few
@given(seeds, shapes)
def test_a_vector_added_at_every_position(seed: int, shape: tuple[int, ...]) -> None:
    vector = np.random.default_rng(seed + 1).uniform(0.1, 1, shape[1:])
    assert first(described(seed, shape, lambda x: x + vector))[0] == "vector"


@few
@given(seeds, st.integers(8, 20))
def test_a_number_added_to_all_channels_of_a_position(seed: int, T: int) -> None:
    offsets = np.random.default_rng(seed + 1).uniform(0.1, 1, (T, 1))
    name, parameters = first(described(seed, (T, 48), lambda x: x - offsets))
    assert name == "offset along T"
    np.testing.assert_allclose(parameters["offsets"], -offsets.ravel(), atol=1e-4)


@few
@given(seeds, shapes, st.sampled_from("THC"), st.data())
def test_an_order(seed: int, shape: tuple[int, ...], letter: str, data: st.DataObject) -> None:
    axis = "THC".index(letter)
    source = np.array(data.draw(st.permutations(range(shape[axis]))))
    if np.array_equal(source, np.arange(shape[axis])):
        return
    name, parameters = first(described(seed, shape, lambda x: x.take(source, axis)))
    assert name.endswith(f" along {letter}")
    assert parameters["source"] == source[parameters["places"]].tolist()


ORDERS: dict[str, tuple[Callable[[Array], Array], str, str]] = {
    "rolled heads": (lambda x: np.roll(x, 1, 1), "rotation along H", "query heads moved on by 1, the end going round"),
    "two heads": (lambda x: x[:, [2, 1, 0, 3]], "exchange along H", "query heads 0 and 2 exchanged"),
    "reversed": (lambda x: x[..., ::-1], "reversal along C", "head channels in reverse"),
    "nibbles": (lambda x: x[..., np.arange(16) ^ 1], "order along C", "neighbours exchanged within each 2"),
    "halves": (lambda x: np.roll(x, 8, 2), "rotation along C", "moved on by 8"),
    "to turns": (
        lambda x: x[..., np.arange(16).reshape(2, -1).T.ravel()],
        "order along C",
        "laid out in turn where halves are expected",
    ),
    "to halves": (
        lambda x: x[..., np.arange(16).reshape(-1, 2).T.ravel()],
        "order along C",
        "laid out as halves where they should be in turn",
    ),
    "one row late": (
        lambda x: x[np.maximum(np.arange(12) - 1, 0)],
        "shift along T",
        "from 1 on hold what belongs 1 before",
    ),
    "a late second chunk": (
        lambda x: x[[0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]],
        "shift along T",
        "from 6 on hold what belongs 1 before",
    ),
    "one head for all": (lambda x: x[:, [0, 0, 0, 0]], "repetition along H", "from 1 on all hold what belongs to 0"),
    "heads by turns": (lambda x: x[:, [0, 1, 0, 1]], "turns along H", "hold the first 2 by turns"),
}


@pytest.mark.parametrize("case", ORDERS)
def test_an_order_has_a_name(case: str) -> None:
    change, pattern, words = ORDERS[case]
    structure = described(3, (12, 4, 16), change)
    assert first(structure)[0] == pattern
    assert words in structure["sentence"].replace("all 12", "from 1 on")


@few
@given(seeds, st.integers(8, 14), st.sampled_from([5, 7]), st.sampled_from([9, 11]))
def test_axes_read_in_another_order(seed: int, T: int, H: int, C: int) -> None:
    name, parameters = first(described(seed, (T, H, C), lambda x: x.transpose(0, 2, 1).reshape(x.shape)))
    assert (name, parameters) == ("transpose", {"axes": "THC", "as": "TCH"})
    name, parameters = first(described(seed, (T, H), lambda x: x.T.reshape(x.shape)))
    assert (name, parameters) == ("transpose", {"axes": "TD", "as": "DT"})


@few
@given(seeds, st.integers(8, 30), st.floats(0.001, 1), st.integers(-3, 3))
def test_a_rotation_of_pairs(seed: int, T: int, rate: float, shift: int) -> None:
    """Another frequency for some pairs, or another first position for all of them."""
    J = 8
    rates = np.where(np.arange(J) >= 3, rate, 0.0)
    angle = np.outer(np.arange(T), rates) + shift * 0.2 * (np.arange(J) + 1)

    def turned(x: Array) -> Array:
        z = (x[..., :J] + 1j * x[..., J:]) * np.exp(1j * angle)[:, None]
        return np.concatenate((z.real, z.imag), -1)

    structure = described(seed, (T, 4, 2 * J), turned)
    name, parameters = first(structure)
    assert name == "rotation"
    found = dict(zip(parameters["pairs"], parameters["rates"], strict=True))
    for j in range(J):
        assert found.get(j, 0.0) == pytest.approx(rates[j], abs=2e-3)


@few
@given(seeds, shapes)
def test_rounding(seed: int, shape: tuple[int, ...]) -> None:
    expected, noisy, _ = draw(seed, shape)
    bits = expected.astype(np.float32).view(np.uint32)
    got = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    name, parameters = first(describe(expected, got, noisy, "THC"))
    assert (name, parameters) == ("rounding", {"format": "bfloat16"})


@few
@given(seeds, shapes, st.floats(0.5, 1.5))
def test_a_clamp(seed: int, shape: tuple[int, ...], limit: float) -> None:
    expected, noisy, _ = draw(seed, shape)
    name, parameters = first(describe(expected, np.clip(expected, -limit, limit), noisy, "THC"))
    assert (name, parameters["limit"]) == ("clamp", pytest.approx(limit))
    name, parameters = first(describe(expected, np.minimum(expected, limit), noisy, "THC"))
    assert (name, parameters["limit"]) == ("clamp", pytest.approx(limit))


@few
@given(seeds, st.integers(8, 20), st.sampled_from([-1.0, 1.0, 0.25]))
def test_another_tensor(seed: int, T: int, share: float) -> None:
    other = np.random.default_rng(seed + 1).standard_normal((T, 48))
    others = {"layers.0.attn_norm": other[:, ::-1], "layers.0.v": other}
    name, parameters = first(described(seed, (T, 48), lambda x: other, others=others))
    assert (name, parameters) == ("another tensor", {"tap": "layers.0.v"})
    name, parameters = first(described(seed, (T, 48), lambda x: x + share * other, others=others))
    assert (name, parameters["tap"]) == ("sum with another tensor", "layers.0.v")
    assert parameters["factor"] == pytest.approx(share, abs=1e-3)


@few
@given(seeds, st.integers(20, 40))
def test_a_vector_of_an_expert(seed: int, T: int) -> None:
    rng = np.random.default_rng(seed + 1)
    ids = np.argsort(rng.random((T, 4)), axis=1)[:, :2]
    biases = rng.uniform(0.2, 1, (4, 24))
    biases[2] = 0
    structure = described(seed, (T, 2, 24), lambda x: x + biases[ids], "TAF", ids_TA=ids)
    assert first(structure)[0] == "vector by expert"
    assert structure["places"]["expert"]["affected"] == len(set(np.unique(ids)) - {2})


# --- what is no pattern


@few
@given(seeds, st.tuples(st.integers(1, 20), st.integers(1, 5), st.sampled_from([8, 24])), st.floats(30, 1e5))
def test_noise_is_not_named(seed: int, shape: tuple[int, ...], size: float) -> None:
    noise = NOISE * size * np.random.default_rng(seed + 1).standard_normal(shape)
    structure = described(seed, shape, lambda x: x + noise)
    assert [p for p in structure["patterns"] if p["fits"]] == []
    assert structure["sentence"].startswith("no pattern")


@few
@given(seeds, st.integers(2, 20), st.integers(0, 10**6))
def test_noise_in_one_row_is_placed(seed: int, T: int, which: int) -> None:
    row = which % T

    def change(x: Array) -> Array:
        x = x.copy()
        x[row] += 0.3 * np.random.default_rng(seed + 1).standard_normal(48)
        return x

    structure = described(seed, (T, 48), change)
    assert structure["places"]["T"] == {"affected": 1, "of": T, "first": row, "which": str(row)}
    assert f"position {row}" in structure["sentence"]
    assert not any(p["fits"] for p in structure["patterns"])


def test_positions_of_one_chunk_or_of_its_edges() -> None:
    def noisy_at(*rows: int) -> Callable[[Array], Array]:
        def change(x: Array) -> Array:
            x = x.copy()
            x[list(rows)] += np.random.default_rng(5).standard_normal((len(rows), 48))
            return x

        return change

    where = lambda *rows: described(4, (16, 48), noisy_at(*rows), chunks=(6, 1, 9))["places"]["T"]  # noqa: E731
    assert where(6)["chunks"] == "only in chunk 2 of 3"
    assert where(8, 12)["chunks"] == "only in chunk 3 of 3"
    assert where(5, 6, 15)["chunks"] == "only the last position of each chunk"
    assert "chunks" not in where(3, 6, 9)
    assert where(13, 14, 15)["which"] == "from 13 on"


def test_values_that_are_no_numbers() -> None:
    expected, noisy, _ = draw(1, (10, 4, 16))
    got = expected.copy()
    got[3, 1, 5] = np.inf
    got[7:] = np.nan
    lost = describe(expected, got, noisy, "THC")["nonfinite"]
    assert lost["kinds"] == {"NaN": 192, "inf": 1}
    assert lost["places"]["T"]["which"] == "3, 7, 8 and 1 more"
    got[3] = expected[3]
    structure = describe(expected, got, noisy, "THC")
    assert structure["sentence"] == "192 NaN of 640 values, at positions from 7 on: whole positions"
    assert structure["patterns"] == []


def test_a_large_tensor_is_searched_around_its_first_wrong_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.golden.structure.LARGEST", 48 * 10)

    def change(x: Array) -> Array:
        x = x.copy()
        x[37:] *= 1.5
        return x

    structure = described(2, (60, 48), change)
    assert first(structure)[0] == "factor"
    assert structure["places"]["T"]["which"] == "from 37 on"


def test_rows_one_late_among_equal_rows() -> None:
    """A token that comes twice has the same row twice: which of the two moved cannot be seen, the order can."""
    tokens = [0, 1, 2, 1, 3, 0, 4, 4, 5, 1, 6, 7]
    rows = np.random.default_rng(3).standard_normal((8, 48))[tokens]
    name, _ = first(describe(rows, np.roll(rows, 1, 0), rows + NOISE, "TD"))
    assert name == "rotation along T"


def test_one_head_from_one_position_on() -> None:
    def change(x: Array) -> Array:
        x = x.copy()
        x[6:, 2] = x[6:, 1]
        return x

    structure = described(9, (10, 4, 16), change)
    assert (structure["places"]["T"]["which"], structure["places"]["H"]["which"]) == ("from 6 on", "2")


def test_zeros_are_described_too() -> None:
    zeros = np.zeros((9, 3))
    assert first(describe(zeros, zeros + 1, zeros, "TD")) == ("offset", {"offset": 1.0})
    assert describe(zeros, zeros, zeros, "TD")["patterns"] == []


def test_ids_that_stand_for_others() -> None:
    ids = np.argsort(np.random.default_rng(1).random((20, 8)), axis=1)[:, :2]
    structure = describe_ids(ids, (ids + 1) % 8)
    assert "each id is 1 too large (mod 8)" in structure["sentence"]
    other = ids.copy()
    other[4, 1] = next(n for n in range(8) if n not in ids[4])
    structure = describe_ids(ids, other)
    assert (structure["sentence"], structure["patterns"]) == ("other experts at position 4", [])
