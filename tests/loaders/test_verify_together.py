"""verify: several faults planted at once are all named, each at its place, and nothing else is."""

import itertools
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from assay.loaders.findings import MOST
from assay.loaders.verify import verify
from tests.checkpoint_files import CHECKPOINTS, copied, edit_json, edit_tensors
from tests.loaders.broken_checkpoints import path_of
from tests.loaders.planters import (
    EMBED,
    GGUF,
    INDEX,
    K_PROJ,
    NORM,
    ONE,
    SHARD_1,
    SHARD_2,
    Place,
    begin,
    block,
    code,
    entry,
    hole,
    info,
    lengthened,
    poke,
    quoted,
    replaced,
    shifted,
    without,
)

Q_PROJ, V_PROJ, O_PROJ = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qvo")
EXPERTS = "model.layers.0.mlp.experts"
TENSORS = [t.name for t in gguf.GGUFReader(CHECKPOINTS / "llama/gguf" / GGUF).tensors]  # in the order of their data
Said = list[tuple[str, str | None, str, int | None]]  # words, tensor, file, byte


def said(folder: Path) -> Said:
    return [(f.what, f.tensor, Path(f.file or "").name, f.byte) for f in verify(path_of(folder)).findings]


def assert_says_exactly(folder: Path, expected: Said) -> None:
    """Every finding has the words, tensor, file and byte of one row, and every row its finding."""
    found = said(folder)
    assert len(found) == len(expected), found
    for words, *place in expected:
        assert any(words in what and place == list(where) for what, *where in found), (words, place, found)


def test_tensors_described_wrongly_in_three_ways(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    entry(Q_PROJ, lambda e: e.update(dtype="F4"), "entry")(folder)
    entry(V_PROJ, lambda e: e.update(dtype="F32"), "data")(folder)
    entry(O_PROJ, lambda e: e.update(shape=[-64, -64]), "entry")(folder)
    one = folder / ONE
    assert_says_exactly(
        folder,
        [
            ("unknown dtype", Q_PROJ, ONE, quoted(one, Q_PROJ)),
            ("wrong size", V_PROJ, ONE, begin(one, V_PROJ)),
            ("wrong shape", O_PROJ, ONE, quoted(one, O_PROJ)),
        ],
    )


def test_misplaced_tensors_bytes_left_over_and_a_bad_value(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    entry(Q_PROJ, shifted(-2), "data")(folder)
    place = hole(folder)
    end = lengthened(ONE, 3)(folder).byte
    bad = code(ONE, EMBED, 4, b"\xc0\x7f")(folder)
    assert_says_exactly(
        folder,
        [
            ("overlaps", Q_PROJ, ONE, begin(folder / ONE, Q_PROJ)),
            ("a hole of 2 bytes", K_PROJ, ONE, place.byte),
            ("3 trailing bytes", None, ONE, end),
            ("not finite", EMBED, ONE, bad.byte),
        ],
    )


def test_tensors_that_do_not_fit_the_config(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    for plant in (
        replaced(Q_PROJ, "I32", [64, 64]),
        replaced(V_PROJ, "BF16", [64, 32]),
        without(O_PROJ),
        without(K_PROJ),
        replaced("model.extra.weight", "F32", [3]),
    ):
        plant(folder)
    one = folder / ONE
    assert_says_exactly(
        folder,
        [
            ("wrong dtype", Q_PROJ, ONE, begin(one, Q_PROJ)),
            ("wrong shape for", V_PROJ, ONE, begin(one, V_PROJ)),
            ("2 tensors missing", O_PROJ, "hf", None),
            ("2 tensors missing", K_PROJ, "hf", None),
            ("no use for", "model.extra.weight", ONE, begin(one, "model.extra.weight")),
        ],
    )


def test_shards_and_their_index(tmp_path):
    """An index that is wrong about one tensor, a shard cut short, a tensor misdescribed in the other."""
    folder = copied("gpt_oss/hf", tmp_path / "hf")
    edit_json(folder / INDEX, lambda i: i["weight_map"].__setitem__(NORM, SHARD_1))
    entry(f"{EXPERTS}.down_proj_blocks", lambda e: e.update(dtype="U4"), "entry", SHARD_1)(folder)
    edit_tensors(folder / SHARD_2, lambda t: t.pop(NORM))
    blocks = f"{EXPERTS}.down_proj_blocks"
    assert_says_exactly(
        folder,
        [
            ("unknown dtype", blocks, SHARD_1, quoted(folder / SHARD_1, blocks)),
            ("does not hold what the index names", NORM, INDEX, None),
        ],
    )


def test_a_shard_that_cannot_be_read_hides_only_its_own_tensors(tmp_path):
    folder = copied("gpt_oss/hf", tmp_path / "hf")
    edit_tensors(folder / SHARD_1, lambda t: t.__setitem__(EMBED, ("BF16", [1, 64], bytes(128))))
    (folder / SHARD_2).write_bytes(b"")
    assert_says_exactly(
        folder,
        [
            ("wrong shape for", EMBED, SHARD_1, begin(folder / SHARD_1, EMBED)),
            ("the file is empty", None, SHARD_2, None),
        ],
    )


def test_parts_of_quantised_tensors(tmp_path):
    """A part that is misdescribed is named, the other parts beside it are not."""
    folder, module = copied("llama/mlx-4bit", tmp_path / "mlx-4bit"), K_PROJ.removesuffix(".weight")
    entry(f"{module}.scales", lambda e: e.update(dtype="U4"), "entry")(folder)
    other = Q_PROJ.removesuffix(".weight")
    edit_tensors(folder / ONE, lambda t: t.__setitem__(f"{other}.biases", ("F32", [64, 2], bytes(512))))
    one = folder / ONE
    assert_says_exactly(
        folder,
        [
            ("unknown dtype", f"{module}.scales", ONE, quoted(one, f"{module}.scales")),
            ("wrong dtype", f"{other}.biases", ONE, begin(one, f"{other}.biases")),
        ],
    )


# --- GGUF: each fault is planted in a copy of its own, and the bytes it changes are gathered in one file ---

OF_A_TENSOR: dict[str, tuple[Callable[[str], Callable[[Path], Place]], str]] = {
    "misaligned": (lambda name: info(name, -1, lambda offset: offset + 1, "info"), "misaligned offset"),
    "unknown type": (lambda name: info(name, -2, lambda _: 99, "info"), "unknown ggml type 99"),
    "beyond": (lambda name: info(name, -1, lambda _: 2**40, "data"), "beyond the end of the file"),
    "too early": (lambda name: info(name, -1, lambda offset: offset - 32, "data"), "overlaps tensor"),
    "too late": (lambda name: info(name, -1, lambda offset: offset + 32, "data"), "overlaps tensor"),
    "too long": (lambda name: too_long(name), "beyond the end of the file"),
    "NaN": (lambda name: block(name, 0, b"\xc0\x7f\xc0\x7f"), "not finite"),  # as float32 and as bfloat16
}
APART = TENSORS[4], TENSORS[9], TENSORS[14]  # not side by side


def too_long(name: str) -> Callable[[Path], Place]:
    """A row of 2^40 elements; the place is where the data is."""

    def plant(folder: Path) -> Place:
        byte = block(name, 0, b"")(folder).byte
        return info(name, -3, lambda _: 2**40, "info")(folder)._replace(byte=byte)

    return plant


def together(tmp_path: Path, plants: list[Callable[[Path], Place]]) -> tuple[Path, list[Place]]:
    """A copy of llama/gguf with all the faults, and where they are."""
    good = (CHECKPOINTS / "llama/gguf" / GGUF).read_bytes()
    raw, places = bytearray(good), []
    for number, plant in enumerate(plants):
        folder = copied("llama/gguf", tmp_path / f"alone-{number}")
        places.append(plant(folder))
        spoilt = (folder / GGUF).read_bytes()
        for at, (before, after) in enumerate(zip(good, spoilt, strict=True)):
            if before != after:
                raw[at] = after
    folder = copied("llama/gguf", tmp_path / "together")
    (folder / GGUF).write_bytes(raw)
    return folder, places


@pytest.mark.parametrize(
    "faults", [*itertools.combinations(OF_A_TENSOR, 2), *itertools.combinations(OF_A_TENSOR, 3)], ids=" and ".join
)
def test_faults_of_a_gguf(faults, tmp_path):
    plants = [OF_A_TENSOR[fault][0](name) for fault, name in zip(faults, APART, strict=False)]
    folder, places = together(tmp_path, plants)
    assert_says_exactly(folder, [(OF_A_TENSOR[fault][1], *place) for fault, place in zip(faults, places, strict=True)])


@pytest.mark.parametrize("kind", OF_A_TENSOR)
def test_the_same_fault_of_every_fourth_tensor(kind, tmp_path):
    make, words = OF_A_TENSOR[kind]
    folder, places = together(tmp_path, [make(name) for name in TENSORS[1:-1:4]])
    assert len(places) >= 4
    assert_says_exactly(folder, [(words, *place) for place in places])


def test_a_name_of_a_gguf(tmp_path):
    """A name that is not UTF-8, so that the tensor is missing under its name, and an unknown type."""
    folder = copied("llama/gguf", tmp_path / "gguf")
    file = folder / GGUF
    place = info(TENSORS[3], -2, lambda _: 99, "info")(folder)
    raw = file.read_bytes()
    name = raw.index(b"blk.1.ffn_up.weight")
    poke(file, name + 6, b"\xff")
    found = said(folder)
    assert any("not valid UTF-8" in what and byte == name + 6 for what, _, _, byte in found)
    assert any("ggml type 99" in what and (tensor, at, byte) == place for what, tensor, at, byte in found)
    assert sum("missing" in what for what, *_ in found) == 1
    assert len(found) == 3


def test_the_number_of_faults_is_bounded(tmp_path):
    """Ten thousand tensors that nobody can use, each misplaced: the search ends, and says that it does."""
    folder = copied("llama/hf", tmp_path / "hf")
    edit_tensors(folder / ONE, lambda t: t.update({f"extra.{i}": ("F32", [3], bytes(12)) for i in range(10_000)}))
    found = said(folder)
    assert len(found) == MOST + 1
    assert found[-1][0] == f"{MOST} faults are listed, and there may be more: the search for them ended here"
