"""Every way to spoil a small checkpoint that we could think of, each with what its error must say.

A case is the checkpoint to copy, what to do to the copy's folder, and pieces of the message. The last piece of
every message is the place: a file's or the folder's name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoint_files import Entry, edit_json, edit_tensors, read_entries, write_entries, write_gguf

Spoil = Callable[[Path], object]
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, ONE, GGUF = "model.safetensors.index.json", "model.safetensors", "model.gguf"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
EXPERTS = "model.layers.0.mlp.experts"


def config(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return lambda folder: edit_json(folder / "config.json", change)


def key(name: str, value: Any = ...) -> Spoil:
    """Set a key of config.json, or remove it."""
    return config(lambda c: c.pop(name) if value is ... else c.__setitem__(name, value))


def tensors(change: Callable[[dict[str, Entry]], object], file: str = ONE) -> Spoil:
    return lambda folder: edit_tensors(folder / file, change)


def set_tensor(name: str, dtype: str, shape: list[int], file: str = ONE) -> Spoil:
    """A tensor of zeros in place of what was there, or new."""
    size = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U32": 4}[dtype] * int(np.prod(shape))
    return tensors(lambda t: t.__setitem__(name, (dtype, shape, bytes(size))), file)


def cut(file: str, keep: float) -> Spoil:
    """The first part of a file."""
    return lambda folder: (folder / file).write_bytes((raw := (folder / file).read_bytes())[: int(keep * len(raw))])


def text(file: str, content: bytes) -> Spoil:
    return lambda folder: (folder / file).write_bytes(content)


def renamed_in_header(file: str, old: bytes, new: bytes) -> Spoil:
    """Replace bytes by as many others."""
    assert len(old) == len(new)
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes().replace(old, new))


def doubled(folder: Path) -> None:
    """A tensor of the second shard in the first one as well."""
    second, _ = read_entries(folder / SHARD_2)
    entries, metadata = read_entries(folder / SHARD_1)
    name = next(iter(second))
    write_entries(folder / SHARD_1, entries | {name: second[name]}, metadata)


def metadata(name: str, value: Any = None) -> Spoil:
    return rewritten(metadata={name: value})


def rewritten(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        whole = folder / GGUF
        whole.rename(folder / "whole")
        write_gguf(folder / "whole", whole, **changes)
        (folder / "whole").unlink()

    return spoil


def type_number(name: str, number: int) -> Spoil:
    """Another type for a matrix of a GGUF; 4 was once Q4_2, and is no type any more."""

    def spoil(folder: Path) -> None:
        raw = bytearray((folder / GGUF).read_bytes())
        at = raw.index(name.encode()) + len(name) + 4 + 2 * 8  # past the number of axes and two lengths
        raw[at : at + 4] = number.to_bytes(4, "little")
        (folder / GGUF).write_bytes(raw)

    return spoil


def index(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return lambda folder: edit_json(folder / INDEX, change)


def mlx_settings(name: str, value: Any) -> Spoil:
    """Change the quantisation that config.json gives for everything or for one module."""
    return config(lambda c: c["quantization"].__setitem__(name, value))


Q_PROJ = "model.layers.0.self_attn.q_proj"

BROKEN: dict[str, tuple[str, Spoil, tuple[str, ...]]] = {
    # config.json
    "no config": ("llama/hf", lambda f: (f / "config.json").unlink(), ("cannot be read", "config.json")),
    "config empty": ("llama/hf", text("config.json", b""), ("not JSON", "config.json")),
    "config cut": ("llama/hf", cut("config.json", 0.5), ("not JSON", "config.json")),
    "config not UTF-8": ("llama/hf", text("config.json", b'{"a": "\xff"}'), ("not JSON", "config.json")),
    "config a list": ("llama/hf", text("config.json", b"[]"), ("not a JSON object", "config.json")),
    "config deep": ("llama/hf", text("config.json", b"[" * 100_000), ("nested too deeply", "config.json")),
    "config with a key twice": (
        "llama/hf",
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("{", '{"vocab_size": 1,', 1)),
        ("'vocab_size' twice", "config.json"),
    ),
    "unknown architecture": (
        "llama/hf",
        key("model_type", "qwen3"),
        ("unknown architecture", "'qwen3'", "config.json"),
    ),
    "no theta": ("llama/hf", key("rope_theta"), ("'rope_theta' is missing", "config.json")),
    "no eps": ("llama/hf", key("rms_norm_eps"), ("'rms_norm_eps' is missing", "config.json")),
    "no limit": ("gpt_oss/hf", key("swiglu_limit"), ("'swiglu_limit' is missing", "config.json")),
    "no layer types": ("gpt_oss/hf", key("layer_types"), ("'layer_types' is missing", "config.json")),
    "unknown key": ("llama/hf", key("attn_logit_softcapping", 30.0), ("'attn_logit_softcapping'", "config.json")),
    "wrong type": ("llama/hf", key("hidden_size", "64"), ("'hidden_size' has the wrong type", "config.json")),
    "gelu": ("llama/hf", key("hidden_act", "gelu"), ("'hidden_act'", "'gelu'", "config.json")),
    "endless layers": ("llama/hf", key("num_hidden_layers", 2**31 - 1), ("2147483647 layers", "hf")),
    "endless sizes": ("llama/hf", key("vocab_size", 2**31 - 1), ("model.embed_tokens.weight", "2147483647", "hf")),
    "gptq": ("llama/hf", key("quantization_config", {"quant_method": "gptq"}), ("quant_method 'gptq'", "hf")),
    "quantisation a text": ("llama/hf", key("quantization_config", "gptq"), ("quantization_config", "hf")),
    "other MLX quantisation": ("llama/mlx-4bit", mlx_settings("bits", 7), ("bits 7", "mlx-4bit")),
    "MLX quantisation a number": ("llama/mlx-4bit", key("quantization", 4), ("quantization", "mlx-4bit")),
    "MLX group size a text": ("llama/mlx-4bit", mlx_settings("group_size", "32"), ("group_size '32'", "mlx-4bit")),
    "MLX mode": (
        "gpt_oss/mlx-q8",
        mlx_settings(Q_PROJ, {"mode": "int9", "bits": 4, "group_size": 16}),
        (repr(Q_PROJ), "mode 'int9'", "mlx-q8"),
    ),
    "MLX bits of one module": (
        "gpt_oss/mlx-q8",
        mlx_settings(Q_PROJ, {"bits": 4, "group_size": 64}),
        (repr(Q_PROJ), "do not fit together", "mlx-q8"),
    ),
    # files
    "no weights": ("llama/hf", lambda f: (f / ONE).unlink(), ("no weights", "hf")),
    "empty": ("llama/hf", text(ONE, b""), ("empty", ONE)),
    "cut in the header": ("llama/hf", cut(ONE, 0.001), ("ends inside the header", ONE)),
    "cut in the data": ("llama/hf", cut(ONE, 0.9), ("beyond the file", ONE)),
    "missing shard": ("gpt_oss/hf", lambda f: (f / SHARD_2).unlink(), ("missing shard", SHARD_2, "hf")),
    "empty shard": ("gpt_oss/hf", text(SHARD_2, b""), ("empty", SHARD_2)),
    "index names a missing tensor": (
        "gpt_oss/hf",
        index(lambda i: i["weight_map"].__setitem__("model.ghost", SHARD_1)),
        ("'model.ghost'", INDEX),
    ),
    "index lacks a tensor": ("gpt_oss/hf", index(lambda i: i["weight_map"].popitem()), ("does not name", INDEX)),
    "index without a map": ("gpt_oss/hf", text(INDEX, b"{}"), ("weight_map", INDEX)),
    "generation config cut": ("llama/hf", cut("generation_config.json", 0.5), ("not JSON", "generation_config.json")),
    # tensors
    "wrong dtype": ("llama/hf", set_tensor(K_PROJ, "I32", [32, 64]), (K_PROJ, "I32", ONE)),
    "wrong shape": ("llama/hf", set_tensor(K_PROJ, "BF16", [64, 32]), (K_PROJ, "[32, 64]", "[64, 32]", "hf")),
    "wrong axes": (
        "llama/hf",
        set_tensor("model.norm.weight", "BF16", [4, 4, 4]),
        ("model.norm.weight", "[64]", "[4, 4, 4]", "hf"),
    ),
    "no axes": ("llama/hf", set_tensor("model.norm.weight", "BF16", []), ("model.norm.weight", "[64]", "hf")),
    "missing tensor": ("llama/hf", tensors(lambda t: t.pop(K_PROJ)), (K_PROJ, "missing", "hf")),
    "extra tensor": (
        "llama/hf",
        set_tensor("model.extra.weight", "F32", [3]),
        ("no use for", "model.extra.weight", "hf"),
    ),
    "extra layer": (
        "llama/hf",
        set_tensor("model.layers.2.mlp.up_proj.weight", "BF16", [96, 64]),
        ("no use for", "model.layers.2.mlp.up_proj.weight", "hf"),
    ),
    "head beside a tied one": ("llama/hf", set_tensor("lm_head.weight", "BF16", [384, 64]), ("lm_head.weight", "hf")),
    "biases nobody announced": ("llama/hf", set_tensor(K_PROJ[:-6] + "bias", "BF16", [32]), ("k_proj.bias", "hf")),
    "twice in one file": (
        "llama/hf",
        renamed_in_header(ONE, b"layers.1.self_attn.k_proj", b"layers.0.self_attn.k_proj"),
        (K_PROJ, "twice", ONE),
    ),
    "twice in two shards": ("gpt_oss/hf", doubled, ("is also in", SHARD_1, SHARD_2)),
    # MXFP4 and gpt-oss's experts
    "blocks without scales": (
        "gpt_oss/hf",
        lambda f: [
            edit_tensors(f / SHARD_1, lambda t: t.pop(f"{EXPERTS}.down_proj_scales")),
            edit_json(f / INDEX, lambda i: i["weight_map"].pop(f"{EXPERTS}.down_proj_scales")),
        ],
        (f"'{EXPERTS}.down_proj_scales' is missing", "hf"),
    ),
    "scales of another count": (
        "gpt_oss/hf",
        set_tensor(f"{EXPERTS}.down_proj_scales", "U8", [4, 64, 2], SHARD_1),
        (f"{EXPERTS}.down_proj_scales", "do not fit", "hf"),
    ),
    "blocks of another dtype": (
        "gpt_oss/hf",
        set_tensor(f"{EXPERTS}.down_proj_blocks", "I32", [4, 64, 3, 4], SHARD_1),
        (f"{EXPERTS}.down_proj_blocks", "I32", SHARD_1),
    ),
    "fused bias of one axis": (
        "gpt_oss/hf",
        set_tensor(f"{EXPERTS}.gate_up_proj_bias", "BF16", [768], SHARD_1),
        (f"{EXPERTS}.gate_up_proj_bias", "[768]", "hf"),
    ),
    "fused bias of odd width": (
        "gpt_oss/hf",
        set_tensor(f"{EXPERTS}.gate_up_proj_bias", "BF16", [4, 191], SHARD_1),
        (f"{EXPERTS}.gate_up_proj_bias", "[4, 95]", "hf"),
    ),
    # MLX
    "MLX scales without axes": (
        "llama/mlx-4bit",
        set_tensor(K_PROJ[:-6] + "scales", "BF16", []),
        ("k_proj", "mlx-4bit"),
    ),
    "MLX parts without axes": (
        "llama/mlx-4bit",
        tensors(lambda t: t.update({K_PROJ[:-6] + part: ("BF16", [], bytes(2)) for part in ("scales", "biases")})),
        ("k_proj", "mlx-4bit"),
    ),
    "MLX all without axes": (
        "llama/mlx-4bit",
        tensors(
            lambda t: t.update(
                {K_PROJ[:-6] + part: ("BF16", [], bytes(2)) for part in ("scales", "biases")}
                | {K_PROJ: ("U32", [], bytes(4))}
            )
        ),
        ("k_proj", "mlx-4bit"),
    ),
    "MLX weight without axes": ("llama/mlx-4bit", set_tensor(K_PROJ, "U32", []), ("k_proj", "mlx-4bit")),
    "MLX weight of another dtype": ("llama/mlx-4bit", set_tensor(K_PROJ, "I32", [32, 8]), (K_PROJ, "I32", ONE)),
    "MLX biases of another dtype": (
        "llama/mlx-4bit",
        set_tensor(K_PROJ[:-6] + "biases", "F32", [32, 2]),
        ("k_proj.biases", "F32", ONE),
    ),
    # GGUF
    "GGUF empty": ("llama/gguf", text(GGUF, b""), ("empty", GGUF)),
    "GGUF cut in the metadata": ("llama/gguf", cut(GGUF, 0.02), ("more than the file can hold", GGUF)),
    "GGUF cut in the data": ("llama/gguf", cut(GGUF, 0.9), ("beyond the end of the file", GGUF)),
    "GGUF unknown architecture": ("llama/gguf", metadata("general.architecture", "qwen3"), ("qwen3", GGUF)),
    "GGUF no eps": ("llama/gguf", metadata("llama.attention.layer_norm_rms_epsilon"), ("layer_norm_rms_epsilon", GGUF)),
    "GGUF unknown key": ("llama/gguf", metadata("llama.logit_scale", 2.0), ("llama.logit_scale", GGUF)),
    "GGUF endless layers": ("llama/gguf", metadata("llama.block_count", 2**31 - 1), ("2147483647 layers", GGUF)),
    "GGUF endless layers of gpt-oss": (
        "gpt_oss/gguf",
        metadata("gpt-oss.block_count", 2**31 - 1),
        ("2147483647 layers", GGUF),
    ),
    "GGUF wrong shape": (
        "llama/gguf",
        rewritten(tensors={"blk.0.attn_k.weight": np.zeros((64, 32), np.float32)}),
        ("blk.0.attn_k.weight", "[32, 64]", GGUF),
    ),
    "GGUF integer weight": ("llama/gguf", type_number("blk.0.attn_k.weight", 25), ("blk.0.attn_k.weight", "I16", GGUF)),
    "GGUF unknown type": ("llama/gguf", type_number("blk.0.attn_k.weight", 4), ("blk.0.attn_k.weight", "4", GGUF)),
    "GGUF missing tensor": ("llama/gguf", rewritten(tensors={"blk.0.attn_k.weight": None}), (K_PROJ, "missing", GGUF)),
    "GGUF extra tensor": (
        "llama/gguf",
        rewritten(tensors={"blk.0.attn_extra.weight": np.zeros(32, np.float32)}),
        ("no use for", "blk.0.attn_extra.weight", GGUF),
    ),
    "GGUF twice": (
        "llama/gguf",
        renamed_in_header(GGUF, b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"),
        ("blk.0.ffn_up.weight", GGUF),
    ),
    "GGUF no embedding": ("llama/gguf", rewritten(tensors={"token_embd.weight": None}), ("token_embd.weight", GGUF)),
    "GGUF wrong frequencies": (
        "llama/gguf",
        rewritten(tensors={"rope_freqs.weight": np.ones(5, np.float32)}),
        ("rope_freqs.weight", "5 entries", GGUF),
    ),
    "GGUF count beyond the file": (
        "llama/gguf",
        lambda f: (f / GGUF).write_bytes(
            (raw := (f / GGUF).read_bytes())[:8] + (2**60).to_bytes(8, "little") + raw[16:]
        ),
        ("count", GGUF),
    ),
    # what is no checkpoint
    "empty folder": ("llama/hf", lambda f: [p.unlink() for p in f.iterdir()], ("cannot be read", "hf")),
}


def path_of(folder: Path) -> Path:
    """What a user would give on the command line."""
    return folder / GGUF if (folder / GGUF).exists() else folder
