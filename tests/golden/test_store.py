"""The golden file: what goes in comes out, whole or not at all, and nothing else is taken for one."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from assay.golden import store
from assay.golden.errors import GoldenError
from assay.golden.store import Golden, load_golden, read_taps, save_golden
from assay.loaders.errors import CheckpointError
from tests.golden.faults import golden_of

SMALL = Golden(
    replace(golden_of().provenance, tokens=[5, 6], chunks=[1, 1], taps=["embed", "layers.0.expert_ids", "logits"]),
    {
        "embed": np.array([[1.5, -0.0], [np.inf, 1e-300]]),
        "layers.0.expert_ids": np.array([[3, 1], [0, 2]]),
        "logits": np.arange(10, dtype=np.float32).reshape(2, 5),
    },
)


def assert_equal(one: Golden, other: Golden) -> None:
    assert one.provenance == other.provenance
    assert set(one.taps) == set(other.taps)
    for name, array in one.taps.items():
        np.testing.assert_array_equal(other.taps[name], array, strict=True)


# --- round trips ---


def test_round_trip(tmp_path):
    path = save_golden(SMALL, tmp_path / "g.safetensors")
    loaded = load_golden(path)
    assert path == loaded.path == tmp_path / "g.safetensors"
    assert_equal(SMALL, loaded)
    assert os.listdir(tmp_path) == ["g.safetensors"]


def test_round_trip_of_a_real_one(tmp_path):
    assert_equal(golden_of(), load_golden(save_golden(golden_of(), tmp_path / "g.safetensors")))


def test_any_safetensors_reader_reads_it(tmp_path):
    path = save_golden(SMALL, tmp_path / "g.safetensors")
    with safe_open(path, "np") as file:
        assert json.loads(file.metadata()["assay"]) == asdict(SMALL.provenance)
        np.testing.assert_array_equal(file.get_tensor("embed"), SMALL.taps["embed"])


def test_arrays_that_are_not_contiguous(tmp_path):
    provenance = replace(SMALL.provenance, taps=["embed"])
    golden = Golden(provenance, {"embed": np.arange(12.0).reshape(3, 4).T})
    np.testing.assert_array_equal(
        load_golden(save_golden(golden, tmp_path / "g.safetensors")).taps["embed"], golden.taps["embed"]
    )


def test_sixteen_bit_floats_are_widened(tmp_path):
    values = np.array([[1.5, -2.0]])
    path = tmp_path / "dump.safetensors"
    safetensors.numpy.save_file({"b": values.astype(ml_dtypes.bfloat16), "h": values.astype(np.float16)}, path)
    taps, _ = read_taps(path)
    assert taps.dtypes == {"BF16", "F16"}
    for name in taps:
        np.testing.assert_array_equal(taps[name], values.astype(np.float32), strict=True)


def test_shards(tmp_path):
    golden = golden_of()
    path = save_golden(golden, tmp_path / "g.safetensors", shard_bytes=200_000)
    shards = sorted(tmp_path.glob("g-*-of-*.safetensors"))
    assert path == tmp_path / "g.safetensors.index.json"
    assert [shard.name for shard in shards] == [
        f"g-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 5
    assert max(sum(array.nbytes for array in read_taps(shard)[0].values()) for shard in shards) <= 200_000
    assert len(os.listdir(tmp_path)) == len(shards) + 1
    assert_equal(golden, load_golden(path))
    assert json.loads(path.read_text())["metadata"]["total_size"] == sum(array.nbytes for array in golden.taps.values())


def test_a_tap_larger_than_a_shard_has_one_of_its_own(tmp_path):
    path = save_golden(SMALL, tmp_path / "g.safetensors", shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert_equal(SMALL, load_golden(path))


# --- whole or not at all ---


class Interrupted(KeyboardInterrupt):
    """Ctrl-C at a moment of our choosing."""


FAILURES = {
    "disk full": OSError(28, "No space left on device"),
    "Ctrl-C": Interrupted(),
    "out of memory": MemoryError(),
}


def failing(monkeypatch, where: str, error: BaseException, after: int = 0) -> None:
    """Make os.replace, os.fsync or save_file fail once it was called so many times."""
    module = {"save_file": safetensors.numpy, "replace": os, "fsync": os}[where]
    real, calls = getattr(module, where), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            if where == "save_file":
                Path(args[1]).write_bytes(b"half of it")
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, where, fail)


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, where, what):
    path = tmp_path / "g.safetensors"
    path.write_bytes(b"the old one")
    failing(monkeypatch, where, FAILURES[what])
    with pytest.raises((GoldenError, Interrupted, MemoryError)):
        save_golden(SMALL, path)
    assert os.listdir(tmp_path) == ["g.safetensors"]
    assert path.read_bytes() == b"the old one"


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_failure_between_shards_leaves_nothing(tmp_path, monkeypatch, after, what):
    failing(monkeypatch, "replace", FAILURES[what], after)
    with pytest.raises((GoldenError, Interrupted, MemoryError)):
        save_golden(SMALL, tmp_path / "g.safetensors", shard_bytes=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["missing/g.safetensors", "/proc/g.safetensors", f"{'x' * 250}.safetensors"])
def test_a_place_that_cannot_be_written_is_said(tmp_path, path):
    with pytest.raises(GoldenError, match="cannot be written") as error:
        save_golden(SMALL, tmp_path / path)
    assert str(tmp_path / path) in str(error.value)


def test_a_full_disk_as_the_library_reports_it(tmp_path, monkeypatch):
    failing(monkeypatch, "save_file", safetensors.SafetensorError("Error while serializing: I/O error"))
    with pytest.raises(GoldenError, match="cannot be written"):
        save_golden(SMALL, tmp_path / "g.safetensors")


# --- what is no golden ---


def saved_with(tmp_path: Path, **provenance: object) -> Path:
    path = tmp_path / "g.safetensors"
    fields = asdict(SMALL.provenance) | provenance
    fields = {key: value for key, value in fields.items() if value is not ...}
    safetensors.numpy.save_file(dict(SMALL.taps), path, {"assay": json.dumps(fields)})
    return path


DAMAGED = {
    "another schema": ({"schema": 2}, "golden of another schema\n  expected: 1\n  got: 2"),
    "no schema": ({"schema": ...}, "golden of another schema"),
    "no tokens": ({"tokens": ...}, "damaged provenance"),
    "tokens a text": ({"tokens": "5,6"}, "damaged provenance"),
    "tokens a number": ({"tokens": 5}, "damaged provenance"),
    "tokens of text": ({"tokens": ["5", "6"]}, "damaged provenance"),
    "tokens of bools": ({"tokens": [True, False]}, "damaged provenance"),
    "no token": ({"tokens": [], "chunks": []}, "damaged provenance"),
    "a token below zero": ({"tokens": [-1, 6]}, "damaged provenance"),
    "chunks do not add up": ({"chunks": [1]}, "chunks do not add up"),
    "a chunk below one": ({"chunks": [3, -1]}, "damaged provenance"),
    "a chunk of none": ({"chunks": [2, 0]}, "damaged provenance"),
    "digest a number": ({"weights_sha256": 5}, "damaged provenance"),
    "checkpoint a number": ({"checkpoint": 5}, "damaged provenance"),
    "backend a list": ({"backend": []}, "damaged provenance"),
    "taps a text": ({"taps": "embed"}, "damaged provenance"),
    "taps of lists": ({"taps": [["embed"]]}, "damaged provenance"),
    "a tap that is not there": ({"taps": ["embed", "layers.0.q"]}, "'layers.0.q'"),
    "unknown field": ({"extra": 1}, "damaged provenance"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_provenance_is_refused(tmp_path, case):
    change, part = DAMAGED[case]
    path = saved_with(tmp_path, **change)
    with pytest.raises(GoldenError) as error:
        load_golden(path)
    assert part in str(error.value)
    assert str(path) in str(error.value)


def test_undamaged_is_taken(tmp_path):
    assert load_golden(saved_with(tmp_path)).provenance == SMALL.provenance


@pytest.mark.parametrize("entry", ["[]", "5", "null", "{", "", "[" * 100_000])
def test_an_entry_that_is_no_object(tmp_path, entry):
    safetensors.numpy.save_file(dict(SMALL.taps), tmp_path / "g.safetensors", {"assay": entry})
    with pytest.raises(GoldenError, match="damaged provenance"):
        load_golden(tmp_path / "g.safetensors")


def test_a_file_of_tensors_is_not_a_golden(tmp_path):
    safetensors.numpy.save_file(dict(SMALL.taps), tmp_path / "g.safetensors")
    with pytest.raises(GoldenError, match=r"not a golden[\s\S]*assay record[\s\S]*--dump"):
        load_golden(tmp_path / "g.safetensors")


@pytest.mark.parametrize("raw", [b"", b"PK\3\4", b"x" * 100])
def test_a_file_of_something_else(tmp_path, raw):
    path = tmp_path / "g.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as error:
        load_golden(path)
    assert str(path) in str(error.value)


def test_a_cut_golden(tmp_path):
    path = save_golden(SMALL, tmp_path / "g.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="beyond the file"):
        load_golden(path)


def test_no_file(tmp_path):
    for name in ("g.safetensors", "g.safetensors.index.json"):
        with pytest.raises(CheckpointError, match=name):
            load_golden(tmp_path / name)


INDEXES = {
    "not JSON": b"{",
    "a list": b"[]",
    "no map": b"{}",
    "map a list": b'{"weight_map": []}',
    "map of numbers": b'{"weight_map": {"embed": 5}}',
    "empty map": b'{"weight_map": {}}',
    "another folder": b'{"weight_map": {"embed": "../g.safetensors"}}',
    "a missing shard": b'{"weight_map": {"embed": "h.safetensors"}}',
    "a missing tensor": b'{"weight_map": {"q": "g.safetensors"}}',
    "not UTF-8": b'{"weight_map": "\xff"}',
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_wrong_index(tmp_path, case):
    save_golden(SMALL, tmp_path / "g.safetensors")
    index = tmp_path / "g.safetensors.index.json"
    index.write_bytes(INDEXES[case])
    with pytest.raises(CheckpointError) as error:
        load_golden(index)
    assert str(tmp_path) in str(error.value)


def test_shards_of_two_goldens_are_not_mixed(tmp_path):
    """An index whose shards were recorded from different tokens."""
    path = save_golden(SMALL, tmp_path / "g.safetensors", shard_bytes=1)
    other = replace(SMALL, provenance=replace(SMALL.provenance, tokens=[7, 8]))
    (tmp_path / "other").mkdir()
    save_golden(other, tmp_path / "other" / "g.safetensors", shard_bytes=1)
    shard = "g-00002-of-00003.safetensors"
    (tmp_path / "other" / shard).replace(tmp_path / shard)
    with pytest.raises(GoldenError, match="shards"):
        load_golden(path)


def test_limits_are_as_documented():
    assert (store.SCHEMA, store.SHARD_BYTES) == (1, 4 << 30)
