"""Which canonical tensors each stored tensor holds, container by container, with the layout changes on the way."""

import re

from assay.loaders import layout
from assay.loaders.layout import Layout

Target = tuple[str, tuple[Layout, ...]]  # canonical name, layout changes in order

_GGUF_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_GGUF_LLAMA_LAYER = _GGUF_LAYER | {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_GPT_OSS_LAYER = _GGUF_LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
# phi-3's fused tensors, after the name of their layer; GGUF calls the fused gate and up ffn_up
_QKV = {
    "self_attn.q_proj": layout.Q_ROWS,
    "self_attn.k_proj": layout.K_ROWS,
    "self_attn.v_proj": layout.V_ROWS,
}
_GATE_UP = {"mlp.gate_proj": layout.GATE_FIRST, "mlp.up_proj": layout.UP_LAST}
_GGUF_PHI3_FUSED = {"attn_qkv": _QKV, "ffn_up": _GATE_UP}
_SAFETENSORS_FUSED = {"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATE_UP}
_ROPE_ROWS = {"attn_q": layout.ROPE_ROWS_Q, "attn_k": layout.ROPE_ROWS_K}


def gguf_targets(arch: str, stored: str) -> list[Target]:
    """The canonical tensors that a GGUF tensor holds; none if the name is unknown."""
    if stored in _GGUF_WHOLE:
        return [(_GGUF_WHOLE[stored], ())]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
    if not match:
        return []
    i, name, kind = match.groups()
    prefix = f"model.layers.{i}"
    if arch == "llama" and name in _GGUF_LLAMA_LAYER:
        changes = (_ROPE_ROWS[name],) if name in _ROPE_ROWS else ()
        return [(f"{prefix}.{_GGUF_LLAMA_LAYER[name]}.{kind}", changes)]
    if arch == "phi3":
        return _gguf_phi3_targets(prefix, name, kind)
    if arch != "gpt-oss":
        return []
    if name == "attn_sinks" and kind == "weight":
        return [(f"{prefix}.self_attn.sinks", ())]
    if name == "ffn_gate_up_exps":
        return [
            (f"{prefix}.mlp.experts.gate_proj.{kind}", (layout.GATE_HALF,)),
            (f"{prefix}.mlp.experts.up_proj.{kind}", (layout.UP_HALF,)),
        ]
    return [(f"{prefix}.{_GGUF_GPT_OSS_LAYER[name]}.{kind}", ())] if name in _GGUF_GPT_OSS_LAYER else []


def _gguf_phi3_targets(prefix: str, name: str, kind: str) -> list[Target]:
    """phi-3: q, k and v fused or not, gate and up always; llama.cpp turns halves here, so rows are not permuted."""
    if name in _GGUF_PHI3_FUSED:
        return [(f"{prefix}.{module}.{kind}", (rows,)) for module, rows in _GGUF_PHI3_FUSED[name].items()]
    known = name in _GGUF_LLAMA_LAYER and name != "ffn_gate"
    return [(f"{prefix}.{_GGUF_LLAMA_LAYER[name]}.{kind}", ())] if known else []


def safetensors_targets(stored: str) -> list[Target]:
    """The canonical tensors that a tensor of a Hugging Face or MLX directory holds.

    `stored` is the tensor's name without the suffix that tells the parts of a quantised one apart
    (`_blocks`, `_scales`, `.scales`, `.biases`). Only gpt-oss's experts and phi-3's fused matrices have
    names of their own there.
    """
    fused = re.fullmatch(r"(model\.layers\.\d+)\.(self_attn\.qkv_proj|mlp\.gate_up_proj)\.(weight|bias)", stored)
    if fused:
        prefix, module, kind = fused.groups()
        return [(f"{prefix}.{name}.{kind}", (rows,)) for name, rows in _SAFETENSORS_FUSED[module].items()]
    match = re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(_bias|_mx|)", stored)
    if not match:
        return [(stored, ())]
    experts, matrix, kind = match.groups()
    suffix = "bias" if kind == "_bias" else "weight"
    before = (layout.TRANSPOSED,) if kind == "" else ()
    if matrix == "down_proj":
        return [(f"{experts}.down_proj.{suffix}", before)]
    return [
        (f"{experts}.gate_proj.{suffix}", (*before, layout.GATE_ROWS)),
        (f"{experts}.up_proj.{suffix}", (*before, layout.UP_ROWS)),
    ]
