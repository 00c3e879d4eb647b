"""Conversion between containers: every value kept and said so, whole or not at all, other tools' bytes reproduced."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.loaders import convert as convert_module
from assay.loaders.checkpoint import Checkpoint, open_checkpoint
from assay.loaders.convert import convert, gguf_model_name
from assay.loaders.errors import CheckpointError
from assay.loaders.gguf_file import read_gguf
from assay.loaders.quantise import accuracy, encoder_of
from assay.loaders.safetensors_file import open_safetensors_set
from assay.loaders.write_config import said_in_gguf, said_in_hf
from assay.reference.config import FrequencyFactors
from tests.checkpoint_files import CHECKPOINTS, copied, opened

SOURCES = [
    *("gpt_oss/hf", "gpt_oss/gguf", "gpt_oss/mlx", "gpt_oss/mlx-q8"),
    *("llama/hf", "llama/gguf", "llama/gguf-q8_0", "llama/gguf-q4_0", "llama/gguf-q4_1", "llama/mlx-4bit"),
    *("mistral/hf", "phi3/hf", "phi3/gguf"),
]
TARGETS = ["gguf", "safetensors", "mlx"]


def target_in(folder: Path, to: str) -> Path:
    return folder / ("model.gguf" if to == "gguf" else to)


def stored_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = open_safetensors_set(directory)
    return {name: (t.dtype, t.shape, file.view(t).tobytes()) for name, (file, t) in found.items()}


def gguf_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    file = read_gguf(path)
    return {name: (t.type_name, t.shape, file.view(t).tobytes()) for name, t in file.tensors.items()}


# Every value kept


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", SOURCES)
def test_weights_and_config_stay(name: str, to: str, tmp_path: Path) -> None:
    source = opened(name)
    done = convert(source, target_in(tmp_path, to), to)
    result = open_checkpoint(done.path)
    assert result.format == to
    expected = said_in_gguf(source.config) if to == "gguf" else said_in_hf(source.config)
    assert result.config == expected
    kept = {change.kept for change in done.changes}
    if (name, to) == ("llama/gguf-q4_0", "mlx"):  # s q + b cannot give the -0 of a negative scale
        assert kept == {"bits", "values"}
        for weight_name, tensor in source.tensors.items():
            np.testing.assert_array_equal(result.tensors[weight_name].decode(), tensor.decode())
    else:
        assert kept == {"bits"}
        assert result.weights_sha256 == source.weights_sha256
    assert [change.name for change in done.changes] == list(source.tensors)
    assert sum(change.bytes_after for change in done.changes) == sum(t.nbytes for t in result.tensors.values())


@pytest.mark.parametrize(
    ("name", "to", "encodings"),
    [
        ("llama/gguf-q8_0", "mlx", {"affine8/32"}),
        ("llama/gguf-q4_0", "mlx", {"affine4/32"}),
        ("llama/gguf-q4_1", "mlx", {"affine4/32"}),
        ("llama/mlx-4bit", "gguf", {"Q4_1"}),
        ("gpt_oss/mlx-q8", "gguf", {"F32", "MXFP4"}),
        ("gpt_oss/gguf", "safetensors", {"BF16", "MXFP4"}),
        ("llama/gguf-q8_0", "safetensors", {"F32"}),
    ],
)
def test_encodings_of_matrices(name: str, to: str, encodings: set[str], tmp_path: Path) -> None:
    done = convert(opened(name), target_in(tmp_path, to), to)
    matrices = [c for c in done.changes if c.name.endswith("proj.weight") or "embed" in c.name]
    assert {change.after for change in matrices} == encodings


@pytest.mark.parametrize("family", ["gpt_oss", "llama", "mistral", "phi3"])
def test_round_trip_through_all_containers_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    source = opened(f"{family}/hf")
    convert(source, tmp_path / "a.gguf", "gguf")
    convert(open_checkpoint(tmp_path / "a.gguf"), tmp_path / "b", "mlx")
    convert(open_checkpoint(tmp_path / "b"), tmp_path / "c", "safetensors")
    assert stored_tensors(tmp_path / "c") == stored_tensors(CHECKPOINTS / family / "hf")
    assert open_checkpoint(tmp_path / "c").config == source.config


# Other tools' bytes


@pytest.mark.parametrize("family", ["gpt_oss", "llama", "phi3"])
def test_gguf_is_llama_cpps_own(family: str, tmp_path: Path) -> None:
    convert(opened(f"{family}/hf"), tmp_path / "ours.gguf", "gguf")
    own = CHECKPOINTS / family / "gguf" / "model.gguf"
    assert gguf_tensors(tmp_path / "ours.gguf") == gguf_tensors(own)
    ours, theirs = read_gguf(tmp_path / "ours.gguf").metadata, read_gguf(own).metadata
    only_theirs = {"general.size_label", "tokenizer.ggml.add_sep_token"}
    for key in set(theirs) - only_theirs - {"general.name"}:
        np.testing.assert_array_equal(ours[key], theirs[key], key)  # type: ignore[call-overload]


PHI3_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "a")


@pytest.mark.parametrize(
    ("called", "model_type", "tokens", "name"),
    [
        ("mini", "phi3", PHI3_TOKENS, "phi-3 mini"),
        ("Phi-3-mini", "phi3", PHI3_TOKENS, "Phi-3-mini"),
        ("phi3", "phi3", PHI3_TOKENS, "phi3"),
        ("mini", "phi3", PHI3_TOKENS[1:], "mini"),
        ("Phi-4-mini", "phi3", ("<|endoftext|>",), "Phi-4-mini"),
        ("my-Phi-3", "phi3", (), "my-Phi 3"),
        ("phi3-tuned", "llama", ("<s>",), "phi 3-tuned"),
        ("mini", "llama", PHI3_TOKENS, "mini"),
    ],
)
def test_a_gguf_is_named_phi_3_where_llama_cpp_can_load_it_so(
    called: str, model_type: str, tokens: tuple[str, ...], name: str
) -> None:
    assert gguf_model_name(called, model_type, tokens) == name


def test_mlx_is_mlx_lms_own(tmp_path: Path) -> None:
    convert(opened("gpt_oss/hf"), tmp_path / "ours", "mlx")
    assert stored_tensors(tmp_path / "ours") == stored_tensors(CHECKPOINTS / "gpt_oss" / "mlx")


@pytest.mark.parametrize("name", ["gpt_oss/mlx", "gpt_oss/mlx-q8", "llama/mlx-4bit"])
def test_mlx_quantization_entry_means_what_mlx_lms_does(name: str, tmp_path: Path) -> None:
    convert(opened(name), tmp_path / "ours", "mlx")
    ours, theirs = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "ours", CHECKPOINTS / name))
    assert ours["quantization"] == ours["quantization_config"]
    assert resolved(ours["quantization"], tmp_path / "ours") == resolved(theirs["quantization"], CHECKPOINTS / name)


def resolved(quantization: dict[str, Any], directory: Path) -> dict[str, tuple[int, int, str]]:
    """Group size, bits and mode of each quantised module."""
    modules = [name.removesuffix(".scales") for name in stored_tensors(directory) if name.endswith(".scales")]
    found = {module: quantization.get(module, quantization) for module in modules}
    return {module: (s["group_size"], s["bits"], s.get("mode", "affine")) for module, s in found.items()}


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_gguf_is_llama_cpps_own(type_name: str, tmp_path: Path) -> None:
    done = convert(opened("llama/hf"), tmp_path / "ours.gguf", "gguf", quant=encoder_of(type_name))
    own = CHECKPOINTS / "llama" / f"gguf-{type_name.lower()}" / "model.gguf"
    assert gguf_tensors(tmp_path / "ours.gguf") == gguf_tensors(own)
    rounded = [change for change in done.changes if change.kept == "rounded"]
    assert {change.after for change in rounded} == {type_name}
    assert all(change.sqnr_db is not None for change in rounded)


def test_quantised_mlx_is_mlx_lms_own(tmp_path: Path) -> None:
    convert(opened("llama/hf"), tmp_path / "ours", "mlx", quant=encoder_of("affine4/32"))
    ours, own = stored_tensors(tmp_path / "ours"), stored_tensors(CHECKPOINTS / "llama" / "mlx-4bit")
    assert ours.keys() == own.keys()
    assert {name: (dtype, shape) for name, (dtype, shape, _) in ours.items()} == {
        name: (dtype, shape) for name, (dtype, shape, _) in own.items()
    }
    same = [ours[name][2] == own[name][2] for name in ours]
    assert all(same), [name for name in ours if ours[name][2] != own[name][2]]


# What is lost is said


@pytest.mark.parametrize(
    ("name", "to", "quant"),
    [
        ("llama/hf", "gguf", "Q8_0"),
        ("phi3/hf", "gguf", "Q4_0"),
        ("phi3/hf", "mlx", "affine4/64"),
        ("gpt_oss/hf", "mlx", "affine8/64"),
        ("gpt_oss/plain", "safetensors", "MXFP4"),
    ],
)
def test_quantising_says_how_much_is_lost(name: str, to: str, quant: str, tmp_path: Path) -> None:
    source = all_plain(opened("gpt_oss/hf")) if name == "gpt_oss/plain" else opened(name)
    done = convert(source, target_in(tmp_path, to), to, quant=encoder_of(quant))
    result = open_checkpoint(done.path)
    assert "rounded" in {change.kept for change in done.changes}
    for change in done.changes:
        before, after = source.tensors[change.name].decode(), result.tensors[change.name].decode()
        figures = change.sqnr_db, change.median_relative_error, change.worst_relative_error, change.worst_index
        if change.kept == "bits":
            np.testing.assert_array_equal(after, before)
            assert figures == (None, None, None, None)
        else:
            lost = accuracy(before, after)
            worst = lost.worst_relative_error if np.isfinite(lost.worst_relative_error) else None
            assert figures[0] == pytest.approx(lost.sqnr_db, abs=1e-9)
            assert figures[1] == pytest.approx(lost.median_relative_error, rel=1 / 2048)
            assert figures[2:] == (worst, lost.worst_index)


@pytest.mark.parametrize(
    ("name", "to", "quant", "words"),
    [
        ("llama/hf", "mlx", "affine4/64", "2 matrices stayed floats, not affine4/64, because their rows are no whole"),
        ("gpt_oss/plain", "safetensors", "MXFP4", "14 matrices stayed floats, not MXFP4, because Hugging Face has a"),
        ("llama/hf", "mlx", "affine4/32", None),
        ("llama/hf", "mlx", "F16", None),
    ],
)
def test_matrices_that_could_not_be_quantised_are_named(
    name: str, to: str, quant: str, words: str | None, tmp_path: Path
) -> None:
    source = all_plain(opened("gpt_oss/hf")) if name == "gpt_oss/plain" else opened(name)
    notes = convert(source, target_in(tmp_path, to), to, quant=encoder_of(quant)).notes
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]


def test_quantised_weights_are_not_quantised_again(tmp_path: Path) -> None:
    done = convert(opened("llama/gguf-q8_0"), tmp_path / "out.gguf", "gguf", quant=encoder_of("Q4_0"))
    assert {change.kept for change in done.changes} == {"bits"}


def test_weights_without_an_exact_form_are_quantised_if_asked(tmp_path: Path) -> None:
    done = convert(opened("gpt_oss/mlx-q8"), tmp_path / "out.gguf", "gguf", quant=encoder_of("Q8_0"))
    after = {change.name: (change.before, change.after, change.kept) for change in done.changes}
    assert after["lm_head.weight"] == ("affine8/64", "Q8_0", "rounded")
    assert after["model.layers.0.mlp.router.weight"] == ("affine8/64", "F32", "bits")
    assert after["model.layers.0.mlp.experts.up_proj.weight"] == ("MXFP4", "MXFP4", "bits")


def test_float_narrowed_without_loss_is_not_called_rounded(tmp_path: Path) -> None:
    convert(opened("llama/hf"), tmp_path / "wide", "safetensors", quant=encoder_of("F32"))
    done = convert(open_checkpoint(tmp_path / "wide"), tmp_path / "back", "safetensors", quant=encoder_of("BF16"))
    assert {(c.before, c.after, c.kept) for c in done.changes if "proj" in c.name} == {("F32", "BF16", "bits")}


def test_hugging_face_experts_share_one_encoding(tmp_path: Path) -> None:
    done = convert(opened("gpt_oss/hf"), tmp_path / "plain", "mlx")
    assert {c.after for c in done.changes if c.name.endswith("experts.up_proj.weight")} == {"MXFP4"}
    source = with_plain_experts(open_checkpoint(tmp_path / "plain"))
    done = convert(source, tmp_path / "hf", "safetensors")
    assert {c.after for c in done.changes if c.name.endswith("_proj.weight") and "experts" in c.name} == {"F32"}
    assert open_checkpoint(tmp_path / "hf").weights_sha256 == source.weights_sha256
    assert stored_tensors(tmp_path / "hf")["model.layers.0.mlp.experts.gate_up_proj"][1] == (4, 64, 192)


def all_plain(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every expert matrix as float32 that MXFP4 cannot hold exactly."""
    from tests.fast.models import float_tensor

    rng = np.random.default_rng(3)
    experts = {name: t for name, t in checkpoint.tensors.items() if ".experts." in name and name.endswith(".weight")}
    plain = {
        name: float_tensor(name, t.decode() + rng.normal(0, 1e-3, t.shape).astype(np.float32), "F32")
        for name, t in experts.items()
    }
    return replace(checkpoint, tensors={**checkpoint.tensors, **plain})


def with_plain_experts(checkpoint: Checkpoint) -> Checkpoint:
    """One expert tensor of the checkpoint as float32."""
    from tests.fast.models import float_tensor

    name = "model.layers.1.mlp.experts.gate_proj.weight"
    plain = float_tensor(name, checkpoint.tensors[name].decode(), "F32")
    return replace(checkpoint, tensors={**checkpoint.tensors, name: plain})


@pytest.mark.parametrize(
    "value",
    [
        *(2**40, 2**64 - 1, -5, 7, True, 0.5, "text", ["a", "b"]),
        *(np.array([True, False]), np.array([1, -2], np.int32), np.array([0.1, 1], np.float64)),
        *(np.array([2**40, -1]), np.array([2**64 - 1], np.uint64), np.array([1.5], np.float32)),
    ],
    ids=str,
)
def test_metadata_of_a_gguf_are_carried_along(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = convert_module._carried
    monkeypatch.setattr(convert_module, "_carried", lambda file: {**own(file), "general.anything": value})
    convert(opened("llama/gguf"), tmp_path / "a.gguf", "gguf")
    got = read_gguf(tmp_path / "a.gguf").metadata["general.anything"]
    np.testing.assert_array_equal(got, value)  # type: ignore[call-overload]


# Whole or not at all


def stop(_what: str, done: int, _total: int) -> None:
    if _what == "writing" and done:
        raise KeyboardInterrupt


def fail(_what: str, done: int, _total: int) -> None:
    if _what == "writing" and done:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(("interrupt", "error"), [(stop, KeyboardInterrupt), (fail, CheckpointError)])
def test_interrupted_leaves_nothing(
    to: str, interrupt: Callable[[str, int, int], None], error: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(error):
        convert(opened("llama/hf"), target_in(tmp_path, to), to, progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", TARGETS)
def test_an_existing_checkpoint_is_replaced_only_with_force_and_only_when_done(to: str, tmp_path: Path) -> None:
    target = target_in(tmp_path, to)
    convert(opened("llama/hf"), target, to)
    digest = open_checkpoint(target).weights_sha256
    with pytest.raises(CheckpointError, match="exists already"):
        convert(opened("mistral/hf"), target, to)
    with pytest.raises(KeyboardInterrupt):
        convert(opened("mistral/hf"), target, to, force=True, progress=stop)
    assert open_checkpoint(target).weights_sha256 == digest
    convert(opened("mistral/hf"), target, to, force=True)
    assert open_checkpoint(target).weights_sha256 == opened("mistral/hf").weights_sha256
    assert list(tmp_path.iterdir()) == [target]


def test_refuses_to_replace_the_source_and_what_is_no_checkpoint(tmp_path: Path) -> None:
    source = open_checkpoint(copied("llama/hf", tmp_path / "hf"))
    with pytest.raises(CheckpointError, match="the target is the source, or holds it"):
        convert(source, tmp_path / "hf", "mlx", force=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for _ in range(2):  # also a folder with some other program's config.json
        with pytest.raises(CheckpointError, match="no checkpoint, which --force does not replace"):
            convert(source, tmp_path / "notes", "mlx", force=True)
        (tmp_path / "notes" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no such folder"):
        convert(source, tmp_path / "missing" / "out", "mlx")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_force_does_not_replace_what_is_neither_file_nor_folder(to: str, kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if kind == "fifo":
        os.mkfifo(target)
    else:
        target.symlink_to("/dev/null")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        convert(opened("llama/hf"), target, to, force=True)
    assert not target.is_file()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("linked", ["folder", "file", "nothing"])
def test_force_replaces_a_link_and_not_what_it_points_to(to: str, linked: str, tmp_path: Path) -> None:
    target, other = tmp_path / "target", tmp_path / "other"
    if linked == "folder":
        copied("mistral/hf", other)
    elif linked == "file":
        other.write_text("years of work")
    target.symlink_to(other)
    before = other.read_text() if linked == "file" else linked == "folder" and open_checkpoint(other).weights_sha256
    convert(opened("llama/hf"), target, to, force=True)
    assert not target.is_symlink()
    assert open_checkpoint(target).weights_sha256 == opened("llama/hf").weights_sha256
    after = other.read_text() if linked == "file" else linked == "folder" and open_checkpoint(other).weights_sha256
    assert after == before
    assert sorted(tmp_path.iterdir()) == sorted({target, *([other] if linked != "nothing" else [])})


@pytest.mark.parametrize("to", TARGETS)
def test_a_checkpoint_folder_comes_back_if_the_renaming_fails(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = copied("mistral/hf", tmp_path / "target"), os.replace

    def fails_once(source: Path, to: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, to)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(CheckpointError, match="Input/output error"):
        convert(opened("llama/hf"), target, to, force=True)
    assert open_checkpoint(target).weights_sha256 == opened("mistral/hf").weights_sha256
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("length", [250, 300])  # the temporary file's name is longer
def test_a_name_that_is_too_long(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: File name too long"):
        convert(opened("llama/hf"), tmp_path / ("x" * length), "gguf")
    assert not list(tmp_path.iterdir())


def test_shards(tmp_path: Path) -> None:
    convert(opened("gpt_oss/hf"), tmp_path / "out", "mlx", shard_bytes=100_000)
    shards = sorted(tmp_path.glob("out/model-*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = stored_tensors(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in stored.values())
    assert open_checkpoint(tmp_path / "out").weights_sha256 == opened("gpt_oss/hf").weights_sha256


# What a container cannot say


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit"),
        ({"layer_types": ("full_attention",) * 3}, "layer_types"),
    ],
)
def test_config_that_gguf_cannot_say_is_an_error(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    source = opened("gpt_oss/hf")
    source = replace(source, config=replace(source.config, **change))
    with pytest.raises(CheckpointError, match=f"GGUF cannot say this model's {field}"):
        convert(source, tmp_path / "out.gguf", "gguf")
    assert not list(tmp_path.iterdir())


def test_rounded_ramp_of_gpt_oss_cannot_be_said_in_gguf(tmp_path: Path) -> None:
    source = opened("gpt_oss/hf")
    scaling = replace(source.config.rope_scaling, truncate=True)  # type: ignore[type-var]
    source = replace(source, config=replace(source.config, rope_scaling=scaling))
    with pytest.raises(CheckpointError, match="GGUF cannot say this model's rope_scaling"):
        convert(source, tmp_path / "out.gguf", "gguf")


def test_divisors_of_no_known_scaling_cannot_be_said_in_config_json(tmp_path: Path) -> None:
    source = opened("llama/gguf")
    scaling = FrequencyFactors(tuple(np.linspace(1, 8, 8).tolist()))
    source = replace(source, config=replace(source.config, rope_scaling=scaling))
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is no Llama-3 scaling"):
        convert(source, tmp_path / "out", "safetensors")
