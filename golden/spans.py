"""What one comparison spans: the steps between a supplied tap and the supplied ones before it."""

from collections.abc import Collection

from assay.reference.config import Config
from assay.reference.taps import tap_table

# the inputs of each step; "stream" is the layer's input, heavy taps are part of the step that uses them
INPUTS = {
    "attn_norm": ("stream",),
    "q": ("attn_norm",),
    "k": ("attn_norm",),
    "v": ("attn_norm",),
    "q_rope": ("q",),
    "k_rope": ("k",),
    "attn_scores": ("q_rope", "k_rope"),
    "attn_weights": ("attn_scores",),
    "attn_heads": ("attn_weights", "v"),
    "attn_out": ("attn_heads",),
    "attn_residual": ("stream", "attn_out"),
    "mlp_norm": ("attn_residual",),
    "router_logits": ("mlp_norm",),
    "expert_ids": ("router_logits",),
    "expert_weights": ("router_logits", "expert_ids"),
    "expert_gate": ("mlp_norm", "expert_ids"),
    "expert_up": ("mlp_norm", "expert_ids"),
    "expert_act": ("expert_gate", "expert_up"),
    "expert_out": ("expert_act", "expert_ids"),
    "gate": ("mlp_norm",),
    "up": ("mlp_norm",),
    "act": ("gate", "up"),
    "mlp_out": ("expert_weights", "expert_out", "act"),  # a model has either
    "block_out": ("attn_residual", "mlp_out"),
    "final_norm": ("stream",),
    "logits": ("final_norm",),
}


def spanned(name: str, config: Config, taps: Collection[str]) -> list[str]:
    """The taps whose steps are judged together with this one's, for want of values between, in order."""
    table, found = tap_table(config), set()
    waiting = _inputs(name, config)
    while waiting:
        tap = waiting.pop()
        if tap in table and tap not in taps and tap not in found:
            found.add(tap)
            waiting += _inputs(tap, config)
    return [tap for tap in table if tap in found and not table[tap].heavy]


def unchecked(config: Config, taps: Collection[str]) -> list[str]:
    """The taps whose steps no comparison covers: they were not supplied, and nothing supplied is computed from them."""
    covered = {*taps, *(step for name in taps for step in spanned(name, config, taps))}
    return [name for name, spec in tap_table(config).items() if name not in covered and not spec.heavy]


def _inputs(name: str, config: Config) -> list[str]:
    prefix, _, kind = name.rpartition(".")
    layer = int(prefix.split(".")[1]) if prefix else config.num_hidden_layers
    stream = f"layers.{layer - 1}.block_out" if layer else "embed"
    names = (stream if x == "stream" else f"{prefix}.{x}" if prefix else x for x in INPUTS.get(kind, ()))
    return list(names)
