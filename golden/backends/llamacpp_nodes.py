"""What the nodes of llama.cpp's graph are, by name and operation.

Names alone do not tell them apart: `Qcur-0` is the product, its sum with the bias, the view by heads, and the
rotated view; the operation does. From llama.cpp's src/llama-graph.cpp and src/models.

phi-3 computes q, k and v in one product (`wqkv`), gate and up in another (`ffn_up`), and scales the queries before
their product with the keys, so that the last `Qcur-0` is q_rope / sqrt(C), and `kq` is scaled.
"""

import re

from assay.reference.config import Config

# (node, operation) -> tap; of a node without an operation here every operation is meant
NODES: dict[tuple[str, str | None], str] = {
    ("embd", None): "embed",
    ("attn_norm", "MUL"): "attn_norm",
    **{(f"{letter.upper()}cur", op): letter for letter in "qkv" for op in ("RESHAPE", "VIEW")},
    ("Qcur", "ROPE"): "q_rope",
    ("Kcur", "ROPE"): "k_rope",
    ("kq", None): "attn_scores",
    ("kq_soft_max", None): "attn_weights",
    ("kqv_out", None): "attn_heads",
    ("attn_out", None): "attn_out",
    ("ffn_inp", None): "attn_residual",
    ("ffn_norm", "MUL"): "mlp_norm",
    ("attn_post_norm", "MUL"): "mlp_norm",
    ("ffn_gate", None): "gate",
    ("ffn_up", None): "up",
    ("ffn_swiglu", None): "act",
    ("ffn_moe_probs", None): "router_logits",  # logits with bias, despite the name
    ("ffn_moe_topk", None): "expert_ids",
    ("ffn_moe_weights_softmax", None): "expert_weights",
    ("ffn_moe_gate_biased", None): "expert_gate",
    ("ffn_moe_up_biased", None): "expert_up",
    ("ffn_moe_swiglu_oai", None): "expert_act",
    ("ffn_moe_down_biased", None): "expert_out",
    ("ffn_moe_out", None): "mlp_out",
    ("ffn_out", None): "mlp_out",
    ("l_out", None): "block_out",
    ("result_norm", "MUL"): "final_norm",
    ("result_output", None): "logits",
}


# nodes of phi-3 that hold several taps side by side
FUSED: dict[str, tuple[str, ...]] = {"wqkv": ("q", "k", "v"), "ffn_up": ("gate", "up")}


def columns_of(config: Config, kind: str) -> slice:
    """Where a tap's columns lie in a fused product; ValueError for a tap that is in none."""
    group = next((group for group in FUSED.values() if kind in group), ())
    C, dims = config.head_dim, config.dims
    widths = {"q": dims["H"] * C, "k": dims["K"] * C, "v": dims["K"] * C, "gate": dims["F"], "up": dims["F"]}
    start = sum(widths[before] for before in group[: group.index(kind)])
    return slice(start, start + widths[kind])


def taps_of_node(name: str, operation: str, is_phi3: bool) -> tuple[str, ...]:
    """The taps that a node holds; in phi-3's fused products they lie side by side, and are taken from there alone."""
    kind, _, layer = name.rpartition("-")
    if is_phi3 and kind in FUSED and operation == "MUL_MAT":
        return tuple(f"layers.{layer}.{tap}" for tap in FUSED[kind])
    tap = tap_of_node(name, operation)
    fused = is_phi3 and any(tap.endswith(f".{part}") for parts in FUSED.values() for part in parts)
    return (tap,) if tap and not fused else ()


def tap_of_node(name: str, operation: str) -> str:
    """The tap that a node holds, "" for none."""
    match = re.fullmatch(r"(.+?)(?:-(\d+))?", name)
    if match is None:
        return ""
    kind = NODES.get((match[1], operation)) or NODES.get((match[1], None), "")
    return f"layers.{match[2]}.{kind}" if kind and match[2] else kind
