"""GGUF written as a stream: gguf-py writes metadata and tensor infos, then the data follows a piece at a time.

gguf-py's own writer wants each tensor whole; an expert tensor of gpt-oss-120b alone has 564 MB.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.loaders.delegated import DelegatedBlocks
from assay.loaders.gguf_file import GGML_TYPES
from assay.loaders.layout import ROPE_ROWS_K, ROPE_ROWS_Q
from assay.loaders.names import gguf_targets
from assay.loaders.weight import WHOLE, Weight, Written
from assay.loaders.write_config import gguf_arch, gguf_config, rope_tensors
from assay.reference.config import Config
from assay.reference.formats import F32
from assay.reference.formats.floats import FloatFormat
from assay.reference.weights import Encoding

if TYPE_CHECKING:
    from gguf import GGUFWriter

ALIGNMENT = 32  # what a file without general.alignment has
TYPE_NUMBERS = {block.name: number for number, block in GGML_TYPES.items()}
# llama.cpp's enum llama_ftype, which only its listings show
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32, "MXFP4": 38}
# fmt: off
_STEMS = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_sinks", "ffn_norm", "post_attention_norm",
    "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
)
# fmt: on


_FUSED_NAMES = {
    "model.layers.0.self_attn.qkv_proj.weight": "blk.0.attn_qkv.weight",
    "model.layers.0.mlp.gate_up_proj.weight": "blk.0.ffn_up.weight",
}


@cache
def _names(arch: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """GGUF name and layout changes by canonical name, of layer 0 and of what is no layer: `gguf_targets` inverted."""
    whole = ["token_embd.weight", "output_norm.weight", "output.weight"]
    stored = whole + [f"blk.0.{stem}.{kind}" for stem in _STEMS for kind in ("weight", "bias")]
    return {
        canonical: (name, tuple(change.name for change in changes))
        for name in stored
        for canonical, changes in gguf_targets(arch, name)
    }


def gguf_name(arch: str, canonical: str) -> str:
    """llama.cpp's name of a tensor."""
    layer = re.search(r"\.layers\.(\d+)\.", canonical)
    general = canonical if layer is None else canonical.replace(layer[0], ".layers.0.", 1)
    name = _FUSED_NAMES[general] if arch == "phi3" and general in _FUSED_NAMES else _names(arch)[general][0]
    return name if layer is None else name.replace("blk.0.", f"blk.{layer[1]}.", 1)


def rope_heads(arch: str, canonical: str, config: Config) -> int | None:
    """Heads of a tensor whose rows GGUF keeps in RoPE's neighbour pairs; None for any other."""
    general = re.sub(r"\.layers\.\d+\.", ".layers.0.", canonical)
    _, changes = _names(arch).get(general, ("", ()))
    name = general.rsplit(".", 2)[-2]
    if not {ROPE_ROWS_Q.name, ROPE_ROWS_K.name} & set(changes):
        return None
    return config.num_attention_heads if name == "q_proj" else config.num_key_value_heads


def is_gguf_vector(name: str) -> bool:
    """Whether llama.cpp wants this tensor in F32 whatever the rest is: norms, biases, sinks, routers."""
    return not name.endswith(".weight") or name.endswith(("norm.weight", "router.weight"))


def write_gguf(
    path: Path,
    config: Config,
    model_type: str,
    weights: Sequence[Weight],
    metadata: Mapping[str, Any],
    written: Written,
) -> None:
    """Write a GGUF file; every weight must have an encoding of GGUF's, and vectors F32.

    `metadata` is what the config does not say: general.*, tokenizer.*.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    arch = gguf_arch(model_type)
    writer = GGUFWriter(None, arch)
    common = {"general.type": "model", "general.quantization_version": 2, **_file_type(weights)}  # GGML_QNT_VERSION
    for key, value in {**metadata, **common, **gguf_config(config, model_type)}.items():
        if key != "general.architecture":
            _add(writer, key, value)
    rope = rope_tensors(config)
    ordered = [*(_float32(name, values) for name, values in rope.items()), *weights]
    for weight in ordered:
        name = weight.name if weight.name in rope else gguf_name(arch, weight.name)
        number = TYPE_NUMBERS[type_name(weight.encoding)]
        # a float dtype says that the shape counts elements, not bytes
        writer.add_tensor_info(name, weight.shape, np.dtype(np.float32), weight.nbytes, GGMLQuantizationType(number))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        for weight in ordered:
            file.write(bytes(-file.tell() % ALIGNMENT))
            for piece in _data(weight, arch, config):
                file.write(np.ascontiguousarray(piece).data.cast("B"))
                written(piece.nbytes)
        file.write(bytes(-file.tell() % ALIGNMENT))


def _file_type(weights: Sequence[Weight]) -> dict[str, int]:
    """llama.cpp's number for the type that most matrices have, if it has one; MXFP4 if any has it."""
    found = Counter(type_name(weight.encoding) for weight in weights if weight.is_matrix)
    name = "MXFP4" if "MXFP4" in found else found.most_common(1)[0][0]
    return {"general.file_type": FILE_TYPES[name]} if name in FILE_TYPES else {}


def type_name(encoding: Encoding) -> str:
    """ggml's name of an encoding that a GGUF can hold."""
    name = GGML_TYPES[encoding.number].name if isinstance(encoding, DelegatedBlocks) else encoding.name
    assert name in TYPE_NUMBERS, name
    return name


def _data(weight: Weight, arch: str, config: Config) -> Iterator[np.ndarray]:
    """The stored bytes of a weight, a piece at a time; one whose rows move, in one piece."""
    part = "values" if isinstance(weight.encoding, FloatFormat) else "blocks"
    heads = rope_heads(arch, weight.name, config)
    if heads is None:
        yield from (parts[part] for parts in weight.pieces(weight.rows_at_a_time))
        return
    (parts,) = weight.pieces(WHOLE)
    halves = parts[part].reshape(heads, 2, config.head_dim // 2, *parts[part].shape[1:])
    yield np.swapaxes(halves, 1, 2)


def _float32(name: str, values: np.ndarray) -> Weight:
    return Weight(name, values.shape, F32, lambda rows: iter([{"values": values}]))


def _add(writer: "GGUFWriter", key: str, value: Any) -> None:
    """Add metadata with the type that llama.cpp expects of a value of that kind, wider ones only where it must be."""
    from gguf import GGUFValueType

    match value:
        case bool():
            writer.add_bool(key, value)
        case int() if 0 <= value < 2**32:
            writer.add_uint32(key, value)
        case int():
            (writer.add_int64 if value < 2**63 else writer.add_uint64)(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case np.ndarray():
            writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, GGUFValueType[_array_type(value)])
        case _:
            writer.add_array(key, value)


def _array_type(values: np.ndarray) -> str:
    """gguf-py's name of the type of an array's elements."""
    if values.dtype.kind == "b":
        return "BOOL"
    if values.dtype.kind == "f":
        return "FLOAT32" if values.dtype.itemsize <= 4 else "FLOAT64"
    limits = np.iinfo(np.int32)
    if not values.size or (values.min() >= limits.min and values.max() <= limits.max):
        return "INT32"
    return "UINT64" if values.dtype.kind == "u" else "INT64"
