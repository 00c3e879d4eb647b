"""gguf_file against gguf-py (writer and reader) and ggml's own sizes; then files that are wrong in one place each."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.loaders.errors import CheckpointError
from assay.loaders.gguf_file import GGML_TYPES, GgufFile, read_gguf

TYPE = gguf.GGMLQuantizationType
UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5


def write(path: Path, writer_steps=lambda writer: None, tensors=()) -> Path:
    """A file by gguf-py; tensors are (name, array) or (name, raw bytes as uint8 [..., bytes of a row], type)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer_steps(writer)
    for name, array, *raw_type in tensors:
        writer.add_tensor(name, array, raw_dtype=raw_type[0] if raw_type else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- values, against gguf-py ---


def test_scalars_of_every_type(tmp_path):
    values = {
        **{"u8": 200, "i8": -100, "u16": 60_000, "i16": -30_000, "u32": 4_000_000_000, "i32": -2_000_000_000},
        **{
            "u64": 2**64 - 1,
            "i64": -(2**63),
            "f32": 0.5,
            "f64": 1e-300,
            "no": False,
            "yes": True,
            "text": "naïve 日本 🙂",
        },
    }
    adders = {"u8": "uint8", "i8": "int8", "u16": "uint16", "i16": "int16", "u32": "uint32", "i32": "int32"}
    adders |= {"u64": "uint64", "i64": "int64", "f32": "float32", "f64": "float64"}
    adders |= {"no": "bool", "yes": "bool", "text": "string"}

    def add(writer):
        for key, value in values.items():
            getattr(writer, f"add_{adders[key]}")(key, value)

    metadata = read_gguf(write(tmp_path / "a.gguf", add)).metadata
    assert dict(metadata) == {"general.architecture": "llama", **values}
    assert [type(metadata[key]) for key in values] == [type(value) for value in values.values()]


@pytest.mark.parametrize("written", [1e-5, 1e-6, 0.1, 1.702, 150000.0, 3.4028235e38, 1e-45, 0.0])
def test_float32_keeps_the_decimal_that_was_written(tmp_path, written):
    file = read_gguf(write(tmp_path / "a.gguf", lambda writer: writer.add_float32("x", written)))
    assert file.metadata["x"] == written
    assert np.float32(file.metadata["x"]) == np.float32(written)


def test_float32_infinities_and_nan(tmp_path):
    def add(writer):
        writer.add_float32("inf", float("inf"))
        writer.add_float32("nan", float("nan"))

    metadata = read_gguf(write(tmp_path / "a.gguf", add)).metadata
    assert metadata["inf"] == float("inf")
    assert np.isnan(metadata["nan"])


def test_arrays(tmp_path):
    def add(writer):
        writer.add_array("ints", [1, -2, 3])
        writer.add_array("floats", [0.5, -1.25])
        writer.add_array("bools", [True, False, True])
        writer.add_array("texts", ["", "a", "Ġthe", "日本"])

    metadata = read_gguf(write(tmp_path / "a.gguf", add)).metadata
    for key, expected in {
        "ints": np.array([1, -2, 3], np.int32),
        "floats": np.array([0.5, -1.25], np.float32),
        "bools": np.array([True, False, True]),
    }.items():
        array = metadata[key]
        np.testing.assert_array_equal(array, expected, strict=True)
        assert not array.flags.writeable
    assert metadata["texts"] == ["", "a", "Ġthe", "日本"]
    assert metadata["texts"] is metadata["texts"]


def test_metadata_is_a_mapping(tmp_path):
    metadata = read_gguf(write(tmp_path / "a.gguf", lambda writer: writer.add_array("texts", ["a"]))).metadata
    assert "texts" in metadata
    assert "absent" not in metadata
    assert metadata.get("absent") is None
    assert list(metadata) == ["general.architecture", "texts"]
    assert len(metadata) == 2
    with pytest.raises(KeyError):
        metadata["absent"]


def test_tensors_of_every_type_are_where_gguf_py_finds_them(tmp_path):
    rng = np.random.default_rng(0)
    rows = {type_: size for type_, (_, size) in gguf.GGML_QUANT_SIZES.items() if type_ != TYPE.Q8_1}
    stored = [
        (type_.name.lower(), rng.integers(0, 256, (2, 3, 2 * size)).astype(np.uint8), type_)
        for type_, size in rows.items()
    ]
    path = write(tmp_path / "a.gguf", tensors=stored)
    file = read_gguf(path)
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(file.tensors) == list(expected)
    for name, raw, type_ in stored:
        ours, theirs = file.tensors[name], expected[name]
        assert ours.shape == tuple(int(n) for n in theirs.shape[::-1])
        assert (ours.ggml_type, ours.type_name) == (int(type_), type_.name)
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
        np.testing.assert_array_equal(file.view(ours), raw.reshape(-1), strict=True)
        assert not file.view(ours).flags.writeable


def test_sizes_are_gguf_pys_except_the_one_it_has_wrong():
    theirs = {int(type_): (type_.name, *sizes) for type_, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {number for number, sizes in theirs.items() if GGML_TYPES.get(number) != sizes} <= {TYPE.Q8_1}


@pytest.mark.peers
def test_sizes_are_ggmls_own():
    import ctypes

    import llama_cpp

    ggml = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base.*"))))
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_name.restype = ctypes.c_char_p
    for number, type_ in GGML_TYPES.items():
        theirs = ggml.ggml_type_name(number).decode().upper(), ggml.ggml_blck_size(number), ggml.ggml_type_size(number)
        assert type_ == theirs


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
arrays = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 100, shape).astype(dtype),
    st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64]),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 2**32),
)


@given(
    st.dictionaries(names, st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), max_size=4),
    st.dictionaries(names, arrays, max_size=5),
    st.sampled_from([1, 8, 32, 4096]),
)
@settings(max_examples=50, derandomize=True, deadline=None)
def test_round_trip(tmp_path_factory, texts, tensors, alignment):
    def add(writer):
        writer.add_custom_alignment(alignment)
        for key, strings in texts.items():
            writer.add_array(f"texts.{key}", strings)

    file = read_gguf(write(tmp_path_factory.mktemp("gguf") / "a.gguf", add, list(tensors.items())))
    assert {key: file.metadata[f"texts.{key}"] for key in texts} == texts
    assert list(file.tensors) == list(tensors)
    for name, array in tensors.items():
        tensor = file.tensors[name]
        np.testing.assert_array_equal(file.view(tensor).view(array.dtype).reshape(tensor.shape), array, strict=True)
        assert tensor.offset % alignment == 0


# --- files that are wrong in one place ---


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, ne: list[int], kind: int = 0, offset: int = 0, axes: int | None = None) -> bytes:
    n_axes = len(ne) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", n_axes, *ne, kind, offset)


def build(entries=(), infos=(), data=b"", version=3, counts=None, alignment=32) -> bytes:
    n_tensors, n_entries = counts or (len(infos), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_entries) + b"".join((*entries, *infos))
    return head + (bytes(-len(head) % alignment) + data if infos else b"")


def read_bytes(tmp_path: Path, raw: bytes) -> GgufFile:
    path = tmp_path / "wrong.gguf"
    path.write_bytes(raw)
    return read_gguf(path)


def uint32(value: int) -> bytes:
    return struct.pack("<I", value)


def test_built_by_hand_is_read(tmp_path):
    """The builder of the wrong files makes right ones, in both versions, a scalar and an empty tensor too."""
    entries = [entry("n", UINT32, uint32(7)), entry("general.alignment", UINT32, uint32(8))]
    infos = [info("a", [3, 2], 0, 0), info("scalar", [], 0, 24), info("empty", [32, 0], 2, 8)]
    for version in (2, 3):
        raw = build(entries, infos, np.arange(8, dtype=np.float32).tobytes(), version, alignment=8)
        file = read_bytes(tmp_path, raw)
        assert file.version == version
        assert {name: (t.shape, t.nbytes) for name, t in file.tensors.items()} == {
            **{"a": ((2, 3), 24), "scalar": ((), 4), "empty": ((0, 32), 0)}
        }
        assert file.view(file.tensors["a"]).view(np.float32).tolist() == [0, 1, 2, 3, 4, 5]
        assert file.view(file.tensors["scalar"]).view(np.float32).tolist() == [6]


X = info("x", [8])
EIGHT = bytes(32)
WRONG = {
    "magic": (b"PK\x03\x04" + build()[4:], "byte 0: not a GGUF file", "PK"),
    "header cut": (build()[:20], "file ends inside the header"),
    "version 1": (build(version=1), "byte 4: GGUF version 1 is not supported", "2 or 3"),
    "version 4": (build(version=4), "version 4 is not supported"),
    "big-endian": (build(version=3 << 24), "byte 4: a big-endian GGUF file"),
    "tensor count": (build([], [X], EIGHT, counts=(2**60, 0)), "byte 8: the tensor count is more than", str(2**60)),
    "metadata count": (build([], [X], EIGHT, counts=(1, 10**6)), "byte 16: the metadata count is more than", "10"),
    "key cut": (build([text("key" * 10)])[:-6], "byte 32: the file ends inside metadata key 0", "30 bytes", "got: 24"),
    "key empty": (build([entry("", UINT32, uint32(1))]), "byte 24: metadata key 0 has an impossible length", "0"),
    "key endless": (
        build([struct.pack("<Q", 2**63) + bytes(30)]),
        *("byte 24: metadata key 0 has an impossible length", str(2**63)),
    ),
    "key not UTF-8": (build([entry(b"k\xff", UINT32, uint32(1))]), "byte 33: metadata key 0 is not valid UTF-8"),
    "key twice": (build([entry("k", UINT32, uint32(1))] * 2), "byte 41: metadata key 'k' occurs twice"),
    "value cut": (build([entry("key", UINT32, b"\0")]), "byte 39: the file ends inside the value of metadata 'key'"),
    "value type": (build([entry("key", 13, uint32(1))]), "the value of metadata 'key' has the unknown type 13"),
    "bool": (build([entry("key", BOOL, b"\2")]), "metadata 'key' holds a bool that is neither 0 nor 1", "got: 2"),
    "text length": (
        build([entry("key", STRING, struct.pack("<Q", 2**64 - 1) + b"abc")]),
        *("byte 47: the file ends inside the value of metadata 'key'", "got: 3 bytes"),
    ),
    "text not UTF-8": (build([entry("key", STRING, text(b"\xc3("))]), "value of metadata 'key' is not valid UTF-8"),
    "array type": (build([entry("key", ARRAY, struct.pack("<IQ", 99, 0))]), "'key' has the unknown type 99"),
    "array count": (
        build([entry("key", ARRAY, struct.pack("<IQ", INT32, 2**62) + bytes(64))]),
        *("file ends inside the array of metadata 'key'", "got: 64 bytes"),
    ),
    "array of bools": (build([entry("key", ARRAY, struct.pack("<IQ", BOOL, 3) + b"\0\1\7")]), "byte 53: ", "got: 7"),
    "array of arrays": (
        build([entry("key", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", INT32, 0))]),
        "byte 39: metadata 'key' is an array of arrays",
    ),
    "string count": (
        build([entry("key", ARRAY, struct.pack("<IQ", STRING, 2**61) + text("abc"))]),
        *("byte 43: the number of strings of metadata 'key' is more than the file can hold", "at most 1"),
    ),
    "string length": (
        build([entry("key", ARRAY, struct.pack("<IQ", STRING, 2) + text("abc") + struct.pack("<Q", 2**64 - 1))]),
        "byte 62: the file ends inside string 1 of metadata 'key'",
    ),
    "string cut": (
        build([entry("key", ARRAY, struct.pack("<IQ", STRING, 2) + text("abc") + text("def")[:-1])]),
        "byte 62: the file ends inside string 1 of metadata 'key'",
    ),
    "alignment 0": (build([entry("general.alignment", UINT32, uint32(0))]), "must be a power of two", "got: 0"),
    "alignment 48": (build([entry("general.alignment", UINT32, uint32(48))]), "'general.alignment' must be", "got: 48"),
    "alignment float": (build([entry("general.alignment", FLOAT32, struct.pack("<f", 32))]), "must be a power of two"),
    "alignment bool": (build([entry("general.alignment", BOOL, b"\1")]), "must be a power of two", "got: True"),
    "shard": (build([entry("split.count", 2, b"\3\0")]), "one shard of a model", "3 files", "llama-gguf-split --merge"),
    "info cut": (build([], [info("long name", [8])])[:50], "byte 45: the file ends inside the description of tensor"),
    "infos missing": (build([], [X], EIGHT, counts=(2, 0)), "the name of tensor 1 has an impossible length"),
    "name not UTF-8": (build([], [info(b"\xfe", [8])], EIGHT), "byte 32: the name of tensor 0 is not valid UTF-8"),
    "name twice": (build([], [X, info("x", [8], 0, 32)], bytes(64)), "byte 57: tensor 'x' occurs twice"),
    "axes": (build([], [info("x", [1] * 5)], EIGHT), "tensor 'x' has too many axes", "at most 4", "got: 5"),
    "axes endless": (build([], [info("x", [8], axes=2**32 - 1)], EIGHT), "'x' has too many axes", str(2**32 - 1)),
    "shape overflows": (build([], [info("x", [2**32, 2**31])], EIGHT), "'x' has an impossible shape", "overflows"),
    "zero hides overflow": (build([], [info("x", [0, 2**63])], EIGHT), "'x' has an impossible shape"),
    "row length": (build([], [info("x", [48], 2)], bytes(64)), "'x' has rows of broken Q4_0", "multiple of 32", "48"),
    "removed type": (build([], [info("x", [32], 31)], bytes(64)), "byte 24: tensor 'x' has the unknown ggml type 31"),
    "Ollama's MXFP4": (build([], [info("x", [32], 4)], bytes(64)), "unknown ggml type 4", "Ollama"),
    "data cut": (build([], [X], EIGHT[:-1]), "byte 64: the data of tensor 'x' ends beyond", "at least 96 bytes", "95"),
    "offset beyond": (build([], [info("x", [8], 0, 2**63)], EIGHT), "the data of tensor 'x' ends beyond"),
    "misaligned": (build([], [info("x", [1], 0, 4)], EIGHT), "'x' has a misaligned offset", "multiple of 32", "got: 4"),
    "overlap": (
        build([], [info("x", [16]), info("y", [8], 0, 32)], bytes(96)),
        *("byte 128: tensor 'y' overlaps tensor 'x'", "apart from bytes 96 to 160"),
    ),
    "same place": (build([], [X, info("y", [8])], bytes(64)), "tensor 'y' overlaps tensor 'x'"),
    "empty": (b"", "the file is empty (0 bytes)"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer", "git lfs pull"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_with_one_clear_message(tmp_path, case):
    raw, *words = WRONG[case]
    with pytest.raises(CheckpointError) as caught:
        read_bytes(tmp_path, raw)
    for word in ("wrong.gguf", *words):
        assert word in str(caught.value)


def test_strings_that_are_not_utf8_are_refused_when_asked_for(tmp_path):
    strings = struct.pack("<IQ", STRING, 2) + text("ok") + text(b"a\x80")
    metadata = read_bytes(tmp_path, build([entry("key", ARRAY, strings)])).metadata
    with pytest.raises(CheckpointError, match=r"byte 70: string 1 of metadata 'key' is not valid UTF-8"):
        metadata["key"]


def test_a_shard_by_gguf_py_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=1)
    for name in ("a", "b"):
        writer.add_tensor(name, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"one shard of a model that is split into 2 files"):
        read_gguf(tmp_path / "model-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("name", "words"), [("absent", "no such file"), ("folder", "no such file"), ("n" * 300, "cannot be read")]
)
def test_what_is_no_file_is_refused(tmp_path, name, words):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=words):
        read_gguf(tmp_path / name)


def test_fuzz_ends_in_success_or_checkpoint_error(tmp_path):
    def add(writer):
        writer.add_float32("eps", 1e-5)
        writer.add_array("tokens", ["a", "b", "Ġc"])
        writer.add_array("types", [1, 2, 3])

    stored = [("a", np.ones((2, 8), np.float32)), ("b", np.ones((3, 34), np.uint8), TYPE.Q8_0)]
    good = write(tmp_path / "good.gguf", add, stored).read_bytes()
    rng = random.Random(0)
    outcomes = set()
    for _ in range(300):
        try:
            file = read_bytes(tmp_path, mutated(good, rng))
            assert list(file.metadata.values())
            assert all(file.view(tensor).size == tensor.nbytes for tensor in file.tensors.values())
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def mutated(good: bytes, rng: random.Random) -> bytes:
    """One flipped bit, one cut, or one 8-byte number replaced."""
    raw, at = bytearray(good), rng.randrange(len(good) - 8)
    match rng.randrange(3):
        case 0:
            raw[at] ^= 1 << rng.randrange(8)
        case 1:
            del raw[at:]
        case 2:
            raw[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(good)]))
    return bytes(raw)
