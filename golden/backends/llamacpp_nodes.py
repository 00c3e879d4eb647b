"""What the nodes of llama.cpp's graph are, by name and operation.

Names alone do not tell them apart: `Qcur-0` is the product, its sum with the bias, the view by heads, and the
rotated view; the operation does. From llama.cpp's src/llama-graph.cpp and src/models.
"""

import re

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


def tap_of_node(name: str, operation: str) -> str:
    """The tap that a node holds, "" for none."""
    match = re.fullmatch(r"(.+?)(?:-(\d+))?", name)
    if match is None:
        return ""
    kind = NODES.get((match[1], operation)) or NODES.get((match[1], None), "")
    return f"layers.{match[2]}.{kind}" if kind and match[2] else kind
