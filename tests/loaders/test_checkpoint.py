"""Checkpoints opened whole: right values from every container, one clear error for everything that is not right."""

import mmap
from dataclasses import fields, replace

import gguf
import numpy as np
import pytest

from assay.loaders import CheckpointError, open_checkpoint
from assay.loaders.mapped_file import map_file
from assay.reference.weights import weight_shapes
from tests.checkpoint_files import CHECKPOINTS, copied, edit_json, edit_tensors, opened, with_weight, write_gguf
from tests.loaders.broken_checkpoints import BROKEN, GGUF, ONE, SHARD_2, path_of

ALL = [
    *("gpt_oss/hf", "gpt_oss/gguf", "gpt_oss/mlx", "gpt_oss/mlx-q8", "llama/hf", "llama/gguf", "llama/gguf-q8_0"),
    *("llama/gguf-q4_0", "llama/gguf-q4_1", "llama/mlx-4bit", "mistral/hf", "phi3/hf", "phi3/gguf"),
]


# --- what is there ---


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_is_there_once_and_decodes_to_its_shape(name):
    checkpoint = opened(name)
    shapes = weight_shapes(checkpoint.config)
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == shapes
    assert not checkpoint.unused
    # a stored tensor that holds several canonical ones (gate_up_proj, qkv_proj) gives each by another layout change
    sources = [(file, tensor.layout) for tensor in checkpoint.tensors.values() for file in tensor.stored_as]
    assert len(set(sources)) == len(sources)
    for tensor in checkpoint.tensors.values():
        values = tensor.decode()
        assert values.shape == tensor.shape
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
        assert values.std() > 0


@pytest.mark.parametrize(
    ("name", "format", "stop"),
    [
        ("gpt_oss/hf", "safetensors", (314, 313, 319)),
        ("gpt_oss/gguf", "gguf", (314, 313, 319)),
        ("gpt_oss/mlx-q8", "mlx", (314, 313, 319)),
        ("llama/mlx-4bit", "mlx", (378, 382, 383)),
        ("mistral/hf", "safetensors", (378, 382, 383)),
        ("phi3/gguf", "gguf", (319, 314, 318)),
    ],
)
def test_format_and_stop_tokens(name, format, stop):
    assert opened(name).format == format
    assert opened(name).stop_tokens == stop


def test_paths_that_lead_to_the_same_checkpoint(tmp_path):
    whole = opened("gpt_oss/hf").weights_sha256
    for path in ("gpt_oss/hf", f"gpt_oss/hf/{SHARD_2}", "gpt_oss/gguf", f"gpt_oss/gguf/{GGUF}", "gpt_oss/mlx"):
        assert open_checkpoint(CHECKPOINTS / path).weights_sha256 == whole
    odd = tmp_path / "model.bin"  # the format is found by content, not by name
    odd.write_bytes((CHECKPOINTS / "gpt_oss/gguf" / GGUF).read_bytes())
    assert open_checkpoint(odd).weights_sha256 == whole


def test_nothing_is_copied_before_it_is_decoded():
    for name in ("gpt_oss/hf", "llama/gguf", "llama/mlx-4bit", "phi3/hf", "phi3/gguf"):
        for tensor in opened(name).tensors.values():
            assert not any(part.flags.owndata or part.flags.writeable for part in tensor.parts.values()), tensor.name


# --- values ---


@pytest.mark.parametrize(
    "name", ["llama/gguf-q8_0", "llama/gguf-q4_0", "llama/gguf-q4_1", "llama/gguf", "gpt_oss/gguf"]
)
def test_gguf_values_are_those_of_gguf_py(name):
    """Bit for bit, in the file's own order; rows of q and k put into halves by an explicit index."""
    checkpoint = opened(name)
    C = checkpoint.config.head_dim
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(CHECKPOINTS / name / GGUF).tensors}
    for tensor in checkpoint.tensors.values():
        (stored_as,) = tensor.stored_as
        wanted = gguf.quants.dequantize(theirs[stored_as].data, theirs[stored_as].tensor_type)
        if stored_as.endswith(("attn_q.weight", "attn_k.weight")) and name.startswith("llama"):
            rows = [h * C + 2 * j + half for h in range(len(wanted) // C) for half in (0, 1) for j in range(C // 2)]
            wanted = wanted[rows]
            assert tensor.layout
        np.testing.assert_array_equal(tensor.decode(), wanted, err_msg=tensor.name, strict=True)


def test_gguf_encodings():
    names = {t.encoding.name for t in opened("llama/gguf-q4_1").tensors.values()}
    assert names == {"Q4_1", "F32"}
    assert {t.encoding.name for t in opened("gpt_oss/gguf").tensors.values()} == {"MXFP4", "BF16", "F32"}


def test_mlx_settings_of_each_module_are_honoured():
    """As mlx-lm writes gpt-oss at 8 bits: experts mxfp4 by default, everything else affine with settings of its own."""
    tensors = opened("gpt_oss/mlx-q8").tensors
    assert tensors["model.layers.0.mlp.experts.up_proj.weight"].encoding.name == "MXFP4"
    for name in ("model.embed_tokens", "lm_head", "model.layers.1.self_attn.o_proj", "model.layers.2.mlp.router"):
        assert tensors[f"{name}.weight"].encoding.name == "affine8/64"
    assert tensors["model.norm.weight"].encoding.name == "BF16"


def test_mlx_group_size_of_one_module_alone(tmp_path):
    """Groups of 64 re-stated as groups of 32 with every scale twice: the same values, by the module's own settings."""
    folder, module = copied("gpt_oss/mlx-q8", tmp_path / "mlx"), "model.layers.1.mlp.router"

    def repeat(entries):
        for part in ("scales", "biases"):
            dtype, (rows, n), data = entries[f"{module}.{part}"]
            doubled = np.repeat(np.frombuffer(data, np.uint16).reshape(rows, n), 2, axis=1)
            entries[f"{module}.{part}"] = dtype, [rows, 2 * n], doubled.tobytes()

    edit_tensors(folder / ONE, repeat)
    edit_json(folder / "config.json", lambda c: c["quantization"].__setitem__(module, {"group_size": 32, "bits": 8}))
    router = open_checkpoint(folder).tensors[f"{module}.weight"]
    assert router.encoding.name == "affine8/32"
    np.testing.assert_array_equal(router.decode(), opened("gpt_oss/mlx-q8").tensors[f"{module}.weight"].decode())


def test_unquantised_experts_of_hugging_face_are_transposed_back(tmp_path):
    """transformers keeps unquantised experts [N, in, out]: the same model, saved so, is the same weights."""
    folder, whole = copied("gpt_oss/hf", tmp_path / "hf"), opened("gpt_oss/hf")
    edit_json(folder / "config.json", lambda c: c.pop("quantization_config"))

    def dequantise(entries):
        for name in [n for n in entries if n.endswith("_blocks")]:
            layer = name.split(".")[2]
            experts = f"model.layers.{layer}.mlp.experts"
            stem = name.removesuffix("_blocks")
            del entries[name], entries[f"{stem}_scales"]
            if stem.endswith("gate_up_proj"):
                gate, up = (whole.tensors[f"{experts}.{m}_proj.weight"].decode() for m in ("gate", "up"))
                matrix = np.stack((gate, up), axis=2).reshape(4, 192, 64)
            else:
                matrix = whole.tensors[f"{experts}.down_proj.weight"].decode()
            in_out = np.ascontiguousarray(matrix.transpose(0, 2, 1))
            entries[stem] = "F32", list(in_out.shape), in_out.tobytes()

    from tests.checkpoint_files import read_entries, write_entries

    entries: dict = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        entries |= read_entries(shard)[0]
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    dequantise(entries)
    write_entries(folder / ONE, entries)
    assert open_checkpoint(folder).weights_sha256 == whole.weights_sha256


def test_fused_gate_and_up_of_gguf(tmp_path):
    """Newer GGUFs hold all gate rows, then all up rows, in one tensor."""
    whole = opened("gpt_oss/gguf")
    changes: dict = {}
    for i in range(3):
        for kind in ("weight", "bias"):
            gate, up = (whole.tensors[f"model.layers.{i}.mlp.experts.{m}_proj.{kind}"].decode() for m in ("gate", "up"))
            changes |= {f"blk.{i}.ffn_{m}_exps.{kind}": None for m in ("gate", "up")}
            changes[f"blk.{i}.ffn_gate_up_exps.{kind}"] = np.concatenate((gate, up), axis=1)
    fused = write_gguf(CHECKPOINTS / "gpt_oss/gguf" / GGUF, tmp_path / "fused.gguf", tensors=changes)
    assert open_checkpoint(fused).weights_sha256 == whole.weights_sha256


def test_float32_metadata_keeps_the_decimal_that_was_meant():
    """GGUF stores eps as float32, whose value is 9.99999974e-06; the config says 1e-05 as Hugging Face's does."""
    stored = gguf.GGUFReader(CHECKPOINTS / "gpt_oss/gguf" / GGUF).fields["gpt-oss.attention.layer_norm_rms_epsilon"]
    assert float(stored.parts[stored.data[0]][0]) != 1e-05
    assert opened("gpt_oss/gguf").config.rms_norm_eps == 1e-05
    assert opened("llama/gguf").config.rms_norm_eps == 1e-05


def test_a_table_that_follows_from_the_config_is_left_out_and_said_so(tmp_path):
    folder, name = copied("llama/hf", tmp_path / "hf"), "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder / ONE, lambda t: t.__setitem__(name, ("F32", [8], bytes(32))))
    assert open_checkpoint(folder).unused == {name: "derived from the config"}


def test_tokenizers_of_every_container_agree():
    text = "The miller didn't know: 1953, caf\u00e9."
    for family, names in (("gpt_oss", ("hf", "gguf", "mlx")), ("llama", ("hf", "gguf", "mlx-4bit"))):
        first, *others = (opened(f"{family}/{name}").tokenizer.encode(text).ids for name in names)
        assert len(first) > 5
        assert all(other == first for other in others)


# --- digests ---


def test_weights_digest_sees_one_bit():
    checkpoint = opened("gpt_oss/hf")
    for name in ("model.norm.weight", "model.layers.2.mlp.experts.down_proj.weight"):

        def flip(values):
            values.view(np.uint32).flat[-1] ^= 1
            return values

        assert with_weight(checkpoint, name, lambda values: values).weights_sha256 == checkpoint.weights_sha256
        assert with_weight(checkpoint, name, flip).weights_sha256 != checkpoint.weights_sha256


def test_weights_digest_sees_names():
    checkpoint = opened("llama/hf")
    renamed = {f"{name}x" if name == "model.norm.weight" else name: t for name, t in checkpoint.tensors.items()}
    assert replace(checkpoint, tensors=renamed).weights_sha256 != checkpoint.weights_sha256
    a, b = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    swapped = {**checkpoint.tensors, a: checkpoint.tensors[b], b: checkpoint.tensors[a]}
    assert replace(checkpoint, tensors=swapped).weights_sha256 != checkpoint.weights_sha256


def test_config_digest_sees_every_field():
    checkpoint = opened("gpt_oss/hf")
    digests = {checkpoint.config_sha256}
    for field in fields(checkpoint.config):
        other = replace(checkpoint.config, **{field.name: "other"})
        digests.add(replace(checkpoint, config=other).config_sha256)
    assert len(digests) == 1 + len(fields(checkpoint.config))


# --- what is wrong ---


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_one_clear_error(case, tmp_path):
    name, spoil, parts = BROKEN[case]
    folder = copied(name, tmp_path / name.split("/")[1])
    spoil(folder)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path_of(folder))
    message = str(error.value)
    for part in (*parts, str(folder)):
        assert part in message, message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot be read"),
        (b"", "the file is empty"),
        (b"PK\3\4 pickle?", "not a checkpoint"),
        (b"GG", "not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint(content, part, tmp_path):
    path = tmp_path / "model.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=part) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_no_tokenizer_is_said_when_it_is_asked_for(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json[\s\S]*token ids") as error:
        _ = checkpoint.tokenizer
    assert str(folder) in str(error.value)


def test_a_system_without_large_pages_reads_files_too(monkeypatch):
    """There the advice is an error of its own."""

    class Mapping(mmap.mmap):
        def madvise(self, *advice):
            raise OSError(22, "Invalid argument")

    path = CHECKPOINTS / "llama/hf/model.safetensors"
    monkeypatch.setattr("assay.loaders.mapped_file.mmap.mmap", Mapping)
    assert bytes(map_file(path)) == path.read_bytes()
