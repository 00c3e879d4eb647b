"""Encoders by name, the error for what has none, and the accuracy record by hand."""

import json
from dataclasses import asdict

import gguf
import numpy as np
import pytest

from assay.loaders.delegated import DELEGATED
from assay.loaders.errors import CheckpointError
from assay.loaders.gguf_file import GGML_TYPES
from assay.loaders.quantise import ENCODERS, Accuracy, AccuracySums, accuracy, encode, encoder_of
from assay.reference.formats import (
    BF16,
    F16,
    F32,
    GGML_BLOCKS,
    GGML_PLAIN,
    MXFP4,
    MXFP4_BLOCKS,
    Q4_K,
    Q8_0,
    AffineGroups,
)

VALUES = np.random.default_rng(7).normal(size=(3, 2, 256)).astype(np.float32)


def least_sqnr(name: str) -> float:
    """What any working encoder of normal values reaches, in dB."""
    if name.startswith(("TQ", "affine2", "affine3")):
        return 3 if name.startswith("affine") else -3
    if "FP4" in name.upper() or name[:2] in ("Q4", "Q5") or "nearest" in name or name.startswith("affine4"):
        return 15
    return 22


@pytest.mark.parametrize("name", ENCODERS)
def test_parts_fit_their_encoding(name):
    """Shapes, and an error that an encoding of its bits may have."""
    encoding = ENCODERS[name].encoding
    parts = encode(VALUES, name)
    assert encoding.shape(parts) == VALUES.shape
    decoded = encoding.decode(parts)
    assert decoded.dtype == np.float32
    assert accuracy(VALUES, decoded).sqnr_db > least_sqnr(name)


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4", "MLX nvfp4", "affine3/64"])
def test_leading_axes_are_rows(name):
    parts, alone = encode(VALUES, name), encode(VALUES[2, 1], name)
    for key, part in parts.items():
        np.testing.assert_array_equal(part[2, 1], alone[key])


@pytest.mark.parametrize(
    ("encoding", "name"),
    [(Q8_0, "Q8_0"), (MXFP4_BLOCKS, "GGUF MXFP4"), (MXFP4, "MXFP4:floor"), (BF16, "BF16"), (F16, "F16")],
)
def test_a_record_has_its_own_rules(encoding, name):
    by_record, by_name = encode(VALUES, encoding), encode(VALUES, name)
    for key, part in by_record.items():
        np.testing.assert_array_equal(part, by_name[key])


def test_affine_of_any_settings():
    encoding = AffineGroups(5, 16, F32)
    assert encoding.shape(encode(VALUES, encoding)) == VALUES.shape


def test_names_that_share_a_rule():
    for part in ("blocks", "scales"):
        np.testing.assert_array_equal(encode(VALUES, "MXFP4")[part], encode(VALUES, "MXFP4:floor")[part])
    assert (encode(VALUES, "MXFP4:rceil")["scales"] != encode(VALUES, "MXFP4")["scales"]).any()


@pytest.mark.parametrize("target", ["Q4_K", Q4_K, "IQ4_NL", DELEGATED[20]])
def test_k_quants_have_no_encoder(target):
    with pytest.raises(CheckpointError, match=r"no encoder for '(Q4_K|IQ4_NL).*\n(.*\n)*.*llama-quantize"):
        encode(VALUES, target)


def test_unknown_name():
    with pytest.raises(CheckpointError, match="no encoder for 'Q9_X'\n  expected: one of F32, F16"):
        encoder_of("Q9_X")


@pytest.mark.parametrize("number", [34, 35])
def test_ternary_by_gguf_py(number):
    encoding = DELEGATED[number]
    assert encoding.name == f"{GGML_TYPES[number].name} (by gguf-py)"
    parts = encode(VALUES, encoding.name)
    kind = gguf.GGMLQuantizationType(number)
    np.testing.assert_array_equal(parts["blocks"].reshape(3, 2, -1), gguf.quants.quantize(VALUES, kind))
    with pytest.raises(CheckpointError, match="do not divide into blocks of 256"):
        encode(VALUES[..., :200], encoding.name)


def test_every_gguf_type_has_one_decoder():
    numbers = [*GGML_PLAIN, *GGML_BLOCKS, *DELEGATED]
    assert sorted(numbers) == sorted(GGML_TYPES)


@pytest.mark.parametrize("number", DELEGATED)
def test_delegated_types_decode_as_gguf_py(number):
    encoding, rng = DELEGATED[number], np.random.default_rng(number)
    blocks = rng.integers(0, 256, (2, 3, encoding.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(blocks.reshape(2, -1), gguf.GGMLQuantizationType(number))
    got = encoding.decode({"blocks": blocks})
    np.testing.assert_array_equal(got, wanted)
    assert got.shape == encoding.shape({"blocks": blocks}) == (2, 3 * encoding.elements)


@pytest.mark.peers
@pytest.mark.parametrize("number", DELEGATED)
def test_delegated_types_decode_as_ggml(number):
    """Equal where gguf-py multiplies in ggml's order, else off by a rounding."""
    from tests.reference.formats import libggml

    encoding, rng = DELEGATED[number], np.random.default_rng(number)
    blocks = rng.integers(0, 256, (500, encoding.nbytes), dtype=np.uint8)
    if encoding.name.startswith("TQ1_0"):
        blocks[:, :52] = np.minimum(blocks[:, :52], 242)  # a byte is five digits to base 3
    with np.errstate(all="ignore"):
        ours = encoding.decode({"blocks": blocks[:, None]})
    theirs = libggml.dequantize(GGML_TYPES[number].name, blocks)
    np.testing.assert_allclose(ours, theirs, rtol=3e-7)


# --- accuracy ---


def test_accuracy_by_hand():
    original = np.array([[1, -2, 0, 4]], np.float32)
    decoded = np.array([[1.5, -2, 0, 3]], np.float32)
    got = accuracy(original, decoded)
    assert got == Accuracy(
        elements=4,
        median_relative_error=0.125,
        worst_relative_error=0.5,
        worst_index=(0, 0),
        sqnr_db=pytest.approx(10 * np.log10(21 / 1.25)),
    )
    assert str(got) == "relative error 1.25e-01 median, 5.00e-01 worst (at [0, 0]); SQNR 12.3 dB"
    assert json.loads(json.dumps(asdict(got)))["worst_index"] == [0, 0]


def test_accuracy_without_error_and_of_a_lost_zero():
    exact = accuracy(VALUES, VALUES)
    assert (exact.worst_relative_error, exact.sqnr_db) == (0, np.inf)
    lost = accuracy(np.array([1, 0], np.float32), np.array([1, 0.5], np.float32))
    assert lost.worst_relative_error == np.inf
    assert lost.worst_index == (1,)


def test_accuracy_in_several_pieces():
    original = np.linspace(1, 2, 3 << 20, dtype=np.float32)
    got = accuracy(original, original * np.float32(1.25))
    assert got.median_relative_error == pytest.approx(0.25, rel=1e-6)
    assert got.worst_relative_error == pytest.approx(0.25, rel=1e-6)
    assert got.sqnr_db == pytest.approx(20 * np.log10(4), abs=1e-4)


@pytest.mark.parametrize("elements", [1, 2, 7, 100_000])
def test_accuracy_of_a_tensor_that_passes_in_pieces(elements):
    rng = np.random.default_rng(elements)
    original = rng.normal(size=(elements, 3)).astype(np.float32)
    decoded = (original + rng.normal(0, 0.01, original.shape)).astype(np.float32)
    decoded[rng.random(original.shape) < 0.3] = 0
    sums = AccuracySums()
    for piece in range(0, elements, 999):
        sums.add(original[piece : piece + 999], decoded[piece : piece + 999])
    got, whole = sums.result(original.shape), accuracy(original, decoded)
    assert (got.elements, got.worst_relative_error, got.worst_index) == (
        whole.elements,
        whole.worst_relative_error,
        whole.worst_index,
    )
    assert got.sqnr_db == pytest.approx(whole.sqnr_db, abs=1e-9)
    exact = np.median(np.abs(decoded.astype(np.float64) - original) / np.abs(original))
    assert exact * (1 - 1 / 2048) <= got.median_relative_error <= exact


def test_accuracy_of_other_shapes():
    with pytest.raises(ValueError, match="cannot compare shapes"):
        accuracy(VALUES, VALUES[0])
