"""Files in every new encoding open, and decode to what was put in."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from assay.loaders.checkpoint import Checkpoint, open_checkpoint
from assay.loaders.delegated import DELEGATED
from assay.loaders.errors import CheckpointError, refuse
from assay.loaders.gguf_checkpoint import _join_nvfp4_scales
from assay.loaders.quantise import encode
from assay.reference.formats import F32, GGML_BLOCKS, GGML_PLAIN, MLX_BITS, NVFP4_BLOCKS
from tests.checkpoint_files import CHECKPOINTS, copied, edit_json, edit_tensors, write_gguf

UP, UP_GGUF = "model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"
GGUF_TYPES = [*GGML_PLAIN, *GGML_BLOCKS, *DELEGATED]
IN_GGUF_PY = {kind.value for kind in gguf.GGMLQuantizationType} - {9}  # its Q8_1 has another size


def wide_gguf(tmp_path: Path, up: object, extra: dict[str, np.ndarray] | None = None) -> Checkpoint:
    """The tests' llama with a feed-forward input of 256, for super-blocks, and a given up projection [96, 256]."""
    source = next((CHECKPOINTS / "llama/gguf").glob("*.gguf"))
    wider = {64: 256, 32: 128}  # hidden size and query rows; key and value rows
    tensors: dict[str, object] = {}
    for tensor in gguf.GGUFReader(source).tensors:
        shape = [wider.get(int(n), int(n)) for n in reversed(tensor.shape)]
        tensors[tensor.name] = np.zeros(shape, np.float32)
    tensors["rope_freqs.weight"] = np.ones(32, np.float32)
    lengths = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    metadata = {"llama.embedding_length": 256, **{f"llama.{key}": 64 for key in lengths}}
    reader = gguf.GGUFReader(source)
    metadata |= {
        f"llama.attention.{key}_length": 64
        for key in ("key", "value")
        if f"llama.attention.{key}_length" in reader.fields
    }
    return open_checkpoint(write_gguf(source, tmp_path / "m.gguf", metadata, {**tensors, UP_GGUF: up, **(extra or {})}))


@pytest.mark.parametrize("number", [n for n in GGUF_TYPES if n in IN_GGUF_PY and not 24 <= n <= 27])
def test_gguf_type_opens(number, tmp_path):
    encoding = GGML_PLAIN.get(number) or GGML_BLOCKS.get(number) or DELEGATED[number]
    rng = np.random.default_rng(number)
    if number in GGML_PLAIN:
        raw = np.arange(96 * 256).reshape(96, 256).astype(encoding.stored).view(np.uint8)
        wanted = encoding.decode({"values": raw.view(encoding.stored)})
    else:
        raw = rng.integers(0, 256, (96, 256 // encoding.elements * encoding.nbytes), dtype=np.uint8)
        wanted = encoding.decode({"blocks": raw.reshape(96, -1, encoding.nbytes)})
    checkpoint = wide_gguf(tmp_path, (raw, gguf.GGMLQuantizationType(number)))
    tensor = checkpoint.tensors[UP]
    assert tensor.encoding.name == encoding.name
    np.testing.assert_array_equal(tensor.decode(), wanted)


def nvfp4_rows(rows: int) -> np.ndarray:
    values = np.random.default_rng(3).normal(size=(rows, 256)).astype(np.float32)
    return encode(values, "GGUF NVFP4")["blocks"]


def test_nvfp4_with_a_tensor_scale(tmp_path):
    blocks = nvfp4_rows(96)
    extra = {
        UP_GGUF.replace("weight", "scale"): np.array([0.3], np.float32),
        UP_GGUF.replace("weight", "input_scale"): np.array([2], np.float32),
    }
    checkpoint = wide_gguf(tmp_path, (blocks.reshape(96, -1), gguf.GGMLQuantizationType.NVFP4), extra)
    tensor = checkpoint.tensors[UP]
    assert tensor.stored_as == (UP_GGUF, UP_GGUF.replace("weight", "scale"))
    wanted = GGML_BLOCKS[40].decode({"blocks": blocks}) * np.float32(0.3)
    np.testing.assert_array_equal(tensor.decode(), wanted)
    np.testing.assert_array_equal(tensor[5].decode(), wanted[5])
    assert "activations" in checkpoint.unused[UP_GGUF.replace("weight", "input_scale")]


def test_nvfp4_experts_have_a_scale_each(tmp_path):
    blocks, scales = nvfp4_rows(6).reshape(3, 2, 4, 36), np.array([1, 0.5, 3], np.float32)
    stored = {
        "x.weight": (NVFP4_BLOCKS, {"blocks": blocks}, ("x.weight",)),
        "x.scale": (F32, {"values": scales}, ("x.scale",)),
    }
    assert _join_nvfp4_scales(stored, tmp_path, refuse) == {}
    encoding, parts, _ = stored["x.weight"]
    plain = NVFP4_BLOCKS.decode({"blocks": blocks})
    np.testing.assert_array_equal(encoding.decode(parts), plain * scales[:, None, None])
    assert list(stored) == ["x.weight"]


def test_nvfp4_with_a_misshapen_scale(tmp_path):
    extra = {UP_GGUF.replace("weight", "scale"): np.ones(96, np.float32)}
    with pytest.raises(CheckpointError, match=r"ffn_up.scale does not fit .*\n  expected: \[1\]\n  got: \[96\]"):
        wide_gguf(tmp_path, (nvfp4_rows(96).reshape(96, -1), gguf.GGMLQuantizationType.NVFP4), extra)


def rewritten_mlx(tmp_path: Path, settings: dict[str, object], parts: dict[str, np.ndarray]) -> Checkpoint:
    """The tests' 4-bit MLX llama with one module quantised otherwise."""
    folder, module = copied("llama/mlx-4bit", tmp_path / "mlx"), UP.removesuffix(".weight")
    dtypes = {"uint32": "U32", "uint8": "U8", "uint16": "BF16", "float16": "F16", "float32": "F32"}

    def change(entries: dict) -> None:
        for part in ("weight", "scales", "biases"):
            entries.pop(f"{module}.{part}")
        for part, array in parts.items():
            entries[f"{module}.{part}"] = dtypes[array.dtype.name], list(array.shape), array.tobytes()

    edit_tensors(next(folder.glob("*.safetensors")), change)
    (folder / "model.safetensors.index.json").unlink()  # it would name the biases that are gone
    edit_json(folder / "config.json", lambda config: config["quantization"].__setitem__(module, settings))
    return open_checkpoint(folder)


@pytest.mark.parametrize("bits", MLX_BITS)
@pytest.mark.parametrize("stored", ["", " F16", " F32"])
def test_mlx_affine_opens(bits, stored, tmp_path):
    values = np.random.default_rng(bits).normal(size=(96, 64)).astype(np.float32)
    parts = encode(values, f"affine{bits}/32{stored}")
    checkpoint = rewritten_mlx(tmp_path, {"group_size": 32, "bits": bits}, parts)
    tensor = checkpoint.tensors[UP]
    assert tensor.encoding.name == f"affine{bits}/32"
    np.testing.assert_array_equal(tensor.decode(), tensor.encoding.decode(parts))
    assert np.abs(tensor.decode() - values).max() < 6 / (2**bits - 1) + 0.02


@pytest.mark.parametrize(("mode", "bits", "group"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
@pytest.mark.parametrize("told", [True, False])
def test_mlx_mode_opens(mode, bits, group, told, tmp_path):
    """`bits` and `group_size` follow from the mode and may be left out."""
    values = np.random.default_rng(bits).normal(size=(96, 64)).astype(np.float32)
    parts = encode(values, f"MLX {mode}")
    stored = {"weight": parts["blocks"].reshape(96, -1).view(np.uint32), "scales": parts["scales"]}
    settings = {"mode": mode, **({"bits": bits, "group_size": group} if told else {})}
    tensor = rewritten_mlx(tmp_path, settings, stored).tensors[UP]
    np.testing.assert_array_equal(tensor.decode(), tensor.encoding.decode(parts))
    assert np.abs(tensor.decode() - values).max() < 0.7


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "affine", "bits": 7, "group_size": 32},
        {"mode": "mxfp4", "bits": 8, "group_size": 32},
        {"mode": "nvfp4", "bits": 4, "group_size": 32},
        {"mode": "mxfp2", "bits": 2, "group_size": 32},
        {"mode": ["mxfp4"], "bits": 4, "group_size": 32},
    ],
)
def test_mlx_settings_that_are_not(settings, tmp_path):
    values = np.zeros((96, 64), np.float32)
    with pytest.raises(CheckpointError, match=f"not supported(.*\n)*.*bits {settings['bits']}"):
        rewritten_mlx(tmp_path, settings, encode(values, "affine4/32"))


def test_mlx_parts_of_another_mode(tmp_path):
    parts = encode(np.zeros((96, 64), np.float32), "MLX mxfp8")
    stored = {"weight": parts["blocks"].reshape(96, -1).view(np.uint32), "scales": parts["scales"]}
    with pytest.raises(CheckpointError, match="do not fit together"):
        rewritten_mlx(tmp_path, {"mode": "mxfp4", "bits": 4, "group_size": 32}, stored)
