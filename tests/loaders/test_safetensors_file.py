"""safetensors_file against the safetensors library; then files and indexes that are wrong in one place each."""

import json
import random
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from assay.loaders.errors import CheckpointError
from assay.loaders.safetensors_file import DTYPES, SafetensorsFile, open_safetensors_set, read_safetensors

NATIVE = ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"]
CODES = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}


# --- values, against the library ---


@pytest.mark.parametrize("code", NATIVE)
def test_native_dtypes(tmp_path, code):
    dtype = np.dtype(code)
    top = 2 if code == "bool" else 120
    array = (
        np.random.default_rng(0).integers(0, top, (3, 5, dtype.itemsize)).astype(np.uint8).view(dtype)[..., 0].copy()
    )
    path = tmp_path / "a.safetensors"
    save_file({"a": array, "scalar": np.array(array[0, 0]), "empty": array[:0]}, path)
    file = read_safetensors(path)
    with safe_open(path, "np") as theirs:
        slices = {name: theirs.get_slice(name) for name in theirs.keys()}  # noqa: SIM118
        expected = {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in file.tensors.items()} == expected
        for name, tensor in file.tensors.items():
            np.testing.assert_array_equal(file.array(tensor), theirs.get_tensor(name), strict=True)
    np.testing.assert_array_equal(file.array(file.tensors["a"]), array, strict=True)
    assert not file.array(file.tensors["a"]).flags.writeable


@pytest.mark.parametrize("name", CODES)
def test_dtypes_that_numpy_lacks_are_codes(tmp_path, name):
    values = np.array([[0.5, 1, 2], [4, 8, 16]], CODES[name])
    save_file({"a": values}, tmp_path / "a.safetensors")
    file = read_safetensors(tmp_path / "a.safetensors")
    codes = file.array(file.tensors["a"])
    assert file.tensors["a"].dtype == name
    assert codes.dtype == (np.uint16 if name == "BF16" else np.uint8)
    np.testing.assert_array_equal(codes.view(CODES[name]), values, strict=True)


def test_every_dtype_is_tested():
    assert len(DTYPES) == len(NATIVE) + len(CODES)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
arrays = st.builds(
    lambda code, shape, seed: np.random.default_rng(seed).integers(0, 2, shape).astype(code),
    st.sampled_from(NATIVE),
    st.lists(st.integers(0, 5), max_size=5),
    st.integers(0, 2**32),
)
texts = st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"])), max_size=3)


@given(st.dictionaries(names, arrays, max_size=5), texts)
@settings(max_examples=50, derandomize=True, deadline=None)
def test_round_trip(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("safetensors") / "a.safetensors"
    save_file(tensors, path, metadata or None)  # an empty one without tensors makes safetensors 0.8 write no JSON
    file = read_safetensors(path)
    assert file.metadata == metadata
    assert set(file.tensors) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(file.array(file.tensors[name]), array, strict=True)
        assert file.view(file.tensors[name]).tobytes() == array.tobytes()


# --- files that are wrong in one place ---


def build(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(data: bytes = bytes(8), **changes: object) -> bytes:
    """A file of one tensor, float32 [2], with changed fields."""
    return build({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}, data)


def two(*offsets: list[int], data: bytes) -> bytes:
    """A file of the tensors a and b, uint8 each, at these offsets."""
    spans = zip("ab", offsets, strict=True)
    return build({name: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for name, (b, e) in spans}, data)


def read_bytes(tmp_path: Path, raw: bytes) -> SafetensorsFile:
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(raw)
    return read_safetensors(path)


def test_built_by_hand_is_read(tmp_path):
    """The builders of the wrong files make right ones."""
    file = read_bytes(tmp_path, one(np.array([1, 2], np.float32).tobytes()))
    assert file.array(file.tensors["x"]).tolist() == [1, 2]
    file = read_bytes(tmp_path, two([2, 5], [0, 2], data=b"bbaaa"))
    assert {name: file.view(tensor).tobytes() for name, tensor in file.tensors.items()} == {"a": b"aaa", "b": b"bb"}
    assert read_bytes(tmp_path, build({})).tensors == {}


ENTRY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
WRONG = {
    "empty": (b"", "the file is empty (0 bytes)"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", "git lfs pull"),
    "length cut": (b"\1\0\0", "byte 0: the file ends inside the length of the header"),
    "header cut": (build({}, length=3), "byte 8: the file ends inside the header", "3 bytes", "got: 2"),
    "header too long": (build({}, length=100_000_001), "byte 0: the header is too long", "at most 100000000 bytes"),
    "header endless": (build({}, length=2**64 - 1), "the header is too long", str(2**64 - 1)),
    "not JSON": (build(b"{'x': 1}"), "byte 8: the header is not JSON", "{'x': 1}"),
    "not UTF-8": (build(b'{"\xff": 1}'), "the header is not JSON", "utf-8"),
    "not an object": (build([1, 2]), "the header is not a JSON object", "got: list"),
    "no header": (build(b""), "the header is not JSON"),
    "endless integer": (build(b'{"x":' + b"9" * 5000 + b"}"), "the header is not JSON"),
    "deep": (build(b"[" * 100_000), "the header is nested too deeply"),
    "deep in a tensor": (build(b'{"x":' + b'{"x":' * 100_000), "the header is nested too deeply"),
    "twice": (build(b'{"x":' + ENTRY + b',"x":' + ENTRY + b"}"), "the header holds 'x' twice"),
    "field twice": (build(b'{"x":{"dtype":"U8","dtype":"I8"}}'), "the header holds 'dtype' twice"),
    "metadata list": (build({"__metadata__": []}), "__metadata__ must map text to text"),
    "metadata number": (build({"__metadata__": {"a": 1}}), "__metadata__ must map text to text", "{'a': 1}"),
    "entry list": (build({"x": [1]}), "tensor 'x' is described wrongly", "dtype, shape and data_offsets", "[1]"),
    "entry number": (build({"x": 1}), "tensor 'x' is described wrongly", "got: 1"),
    "field missing": (build({"x": {"dtype": "U8", "shape": [0]}}), "tensor 'x' is described wrongly"),
    "field unknown": (one(scale=2), "tensor 'x' is described wrongly", "'scale': 2"),
    "dtype unknown": (one(dtype="F4"), "tensor 'x' has an unknown dtype", "BF16", "got: 'F4'"),
    "dtype number": (one(dtype=4), "tensor 'x' has an unknown dtype", "got: 4"),
    "dtype list": (one(dtype=["F32"]), "tensor 'x' has an unknown dtype"),
    "shape text": (one(shape="2"), "tensor 'x' has a wrong shape"),
    "shape negative": (one(shape=[-2]), "tensor 'x' has a wrong shape", "integers from 0", "got: [-2]"),
    "shape float": (one(shape=[2.0]), "tensor 'x' has a wrong shape", "got: [2.0]"),
    "shape bool": (one(shape=[2, True]), "tensor 'x' has a wrong shape", "got: [2, True]"),
    "shape overflows": (one(shape=[2**32, 2**31]), "'x' has an impossible shape", "overflows"),
    "zero hides overflow": (one(shape=[0, 2**63]), "'x' has an impossible shape"),
    "offsets three": (one(data_offsets=[0, 4, 8]), "tensor 'x' has wrong data_offsets", "[0, 4, 8]"),
    "offsets negative": (one(data_offsets=[-8, 0]), "tensor 'x' has wrong data_offsets", "[-8, 0]"),
    "offsets null": (one(data_offsets=None), "tensor 'x' has wrong data_offsets", "None"),
    "offsets swapped": (one(data_offsets=[8, 0]), "the data of tensor 'x' lies beyond", "[8, 0]"),
    "offsets beyond": (one(data_offsets=[0, 12], shape=[3]), "the data of tensor 'x' lies beyond", "[0, 12]"),
    "data cut": (one(bytes(7)), "the data of tensor 'x' lies beyond", "fetch it again"),
    "size": (one(shape=[1]), "'x' has the wrong size for F32 [1]", "expected: 4", "got: 8"),
    "overlap": (two([0, 4], [3, 6], data=bytes(6)), "tensor 'b' overlaps tensor 'a'"),
    "same place": (two([0, 4], [0, 4], data=bytes(4)), "tensor 'b' overlaps tensor 'a'"),
    "hole": (two([0, 4], [5, 6], data=bytes(6)), "a hole of 1 bytes before tensor 'b'"),
    "hole at the start": (two([1, 4], [4, 6], data=bytes(6)), "a hole of 1 bytes before tensor 'a'"),
    "trailing": (two([0, 4], [4, 6], data=bytes(9)), "3 trailing bytes after tensor 'b'"),
    "trailing after no tensor": (build({}, b"x"), "byte 10: 1 trailing bytes after the header"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_with_one_clear_message(tmp_path, case):
    raw, *words = WRONG[case]
    with pytest.raises(CheckpointError) as caught:
        read_bytes(tmp_path, raw)
    for word in ("wrong.safetensors", *words):
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_bool_that_is_neither_0_nor_1_is_refused_when_asked_for(tmp_path):
    file = read_bytes(tmp_path, one(b"\0\1\2", dtype="BOOL", shape=[3], data_offsets=[0, 3]))
    with pytest.raises(CheckpointError, match=r"byte \d+: tensor 'x' holds a bool that is neither 0 nor 1"):
        file.array(file.tensors["x"])


@pytest.mark.parametrize(
    ("name", "words"), [("absent", "no such file"), ("folder", "no such file"), ("n" * 300, "cannot be read")]
)
def test_what_is_no_file_is_refused(tmp_path, name, words):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=words):
        read_safetensors(tmp_path / name)


def test_fuzz_ends_in_success_or_checkpoint_error(tmp_path):
    """And whatever is read is also read by the library."""
    path = tmp_path / "wrong.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.arange(5, dtype=np.int8)}, path, {"k": "v"})
    good, rng = path.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(300):
        try:
            file = read_bytes(tmp_path, mutated(good, rng))
            with safe_open(path, "np") as theirs:
                for name, tensor in file.tensors.items():
                    np.testing.assert_array_equal(file.array(tensor), theirs.get_tensor(name), strict=True)
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def mutated(good: bytes, rng: random.Random) -> bytes:
    """One flipped bit, one cut, one digit replaced, or another header length."""
    raw, at = bytearray(good), rng.randrange(len(good))
    match rng.randrange(4):
        case 0:
            raw[at] ^= 1 << rng.randrange(8)
        case 1:
            del raw[at:]
        case 2:
            at = rng.choice([i for i, byte in enumerate(good) if chr(byte).isdigit()])
            raw[at : at + 1] = str(rng.choice([-1, 0, 7, 2**31, 2**63, 2**64])).encode()
        case 3:
            raw[:8] = struct.pack("<Q", rng.choice([0, 1, len(good) - 8, len(good), 2**32, 2**63, 2**64 - 1]))
    return bytes(raw)


# --- directories ---

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_set(directory: Path, weight_map: object = None) -> Path:
    """Two shards, one with a and b, one with c; and an index, right unless given."""
    save_file({"a": np.float32([1]), "b": np.float32([2])}, directory / FIRST)
    save_file({"c": np.float32([3])}, directory / SECOND)
    write_index(directory, {"a": FIRST, "b": FIRST, "c": SECOND} if weight_map is None else weight_map)
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 12}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def values(directory: Path) -> dict[str, list[float]]:
    return {name: file.array(tensor).tolist() for name, (file, tensor) in open_safetensors_set(directory).items()}


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_safetensors_set(directory)
    return str(caught.value)


def test_a_sharded_set(tmp_path):
    assert values(write_set(tmp_path)) == {"a": [1], "b": [2], "c": [3]}


@pytest.mark.parametrize("indexed", [False, True], ids=["alone", "with an index, as MLX writes it"])
def test_a_single_file(tmp_path, indexed):
    save_file({"a": np.float32([1])}, tmp_path / "model.safetensors")
    save_file({"z": np.float32([0])}, tmp_path / "consolidated.safetensors")
    if indexed:
        write_index(tmp_path, {"a": "model.safetensors"})
    assert values(tmp_path) == {"a": [1]}


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}, f"'{SECOND}' does not hold what the index names: 'd'"),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, f"'{SECOND}' does not hold what the index names: 'b'"),
        ({"a": FIRST, "c": SECOND}, f"'{FIRST}' holds what the index does not name: 'b'"),
        ({"a": FIRST, "b": FIRST}, f"weights that are not part of the model: '{SECOND}'"),
        ({"a": FIRST, "b": FIRST, "c": "gone.safetensors"}, f"not part of the model: '{SECOND}'"),
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": "gone.safetensors"}, "names a missing shard: 'gone.safetensors'"),
        ({"a": FIRST, "c": "../" + SECOND}, f"a shard's name is not a plain file name: '../{SECOND}'"),
        ({"a": "/etc/x.safetensors"}, "not a plain file name: '/etc/x.safetensors'"),
        ({"a": "sub\\x.safetensors"}, "not a plain file name"),
        ({"a": ".."}, "not a plain file name: '..'"),
        ({"a": "n" * 300 + ".safetensors"}, "not part of the model"),
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": "\0.safetensors"}, r"names a missing shard: '\x00.safetensors'"),
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": "\ud800.safetensors"}, "the index is not JSON: 'utf-8'"),
        ({"a": 1}, "weight_map must map tensor names to file names"),
        ({}, "weight_map must map tensor names to file names"),
        ([FIRST], "weight_map must map tensor names to file names"),
    ],
)
def test_an_index_that_does_not_agree_is_refused(tmp_path, weight_map, words):
    assert words in refusal(write_set(tmp_path, weight_map))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "index is not JSON"),
        ("[]", "index is not a JSON object"),
        ("{}", "weight_map must map tensor names to file names"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "index holds 'a' twice"),
        ("[" * 100_000, "index is nested too deeply"),
        ("", "the file is empty"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, text, words):
    (write_set(tmp_path) / "model.safetensors.index.json").write_text(text)
    message = refusal(tmp_path)
    assert words in message
    assert "model.safetensors.index.json" in message


def test_an_endless_index_is_refused(tmp_path):
    with (write_set(tmp_path) / "model.safetensors.index.json").open("r+b") as file:
        file.truncate(100_000_001)  # sparse
    assert "the index is too long" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_file({"c": np.float32([3]), "a": np.float32([9])}, write_set(tmp_path) / SECOND)
    assert f"tensor 'a' is also in {FIRST}" in refusal(tmp_path)


def test_a_missing_shard_is_refused(tmp_path):
    (write_set(tmp_path) / SECOND).unlink()
    assert f"names a missing shard: '{SECOND}'" in refusal(tmp_path)


def test_shards_without_an_index_are_refused(tmp_path):
    (write_set(tmp_path) / "model.safetensors.index.json").unlink()
    assert f"the index is missing: '{FIRST}', '{SECOND}'" in refusal(tmp_path)


def test_a_single_file_beside_shards_is_refused(tmp_path):
    save_file({"a": np.float32([1])}, write_set(tmp_path) / "model.safetensors")
    assert "not part of the model: 'model.safetensors'" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert f"not part of the model: '{FIRST}', '{SECOND}'" in refusal(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    assert "no weights" in refusal(tmp_path)
    assert "no such directory" in refusal(tmp_path / "absent")
