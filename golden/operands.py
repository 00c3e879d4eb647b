"""What one element of a tap is computed from: the elements of the backend's own earlier taps that its step reads."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.reference.taps import kind_of

Array = np.ndarray
Index = tuple[Any, ...]

EVERY = slice(None)
_IN_LAYER = re.compile(r"layers\.(\d{1,6})\.[^.]+")


@dataclass(frozen=True)
class Operand:
    """Elements of a tap; `values` is None where the backend did not supply it."""

    tap: str
    index: str
    values: Array | None


def layer_of(name: str) -> int | None:
    """The layer of a tap, None for one of the whole model."""
    match = _IN_LAYER.fullmatch(name)
    return int(match[1]) if match else None


def _same(at: Index, given: Mapping[str, Array]) -> Index:
    return at


def _row(at: Index, given: Mapping[str, Array]) -> Index:
    return (at[0], EVERY)


def _slot(at: Index, given: Mapping[str, Array]) -> Index:
    return (at[0], at[1], EVERY)


def _expert(at: Index, given: Mapping[str, Array]) -> Index:
    return (at[0], at[1])


def _position(at: Index, given: Mapping[str, Array]) -> Index:
    return (at[0],)


def _pair(source: str) -> Callable[[Index, Mapping[str, Array]], Index]:
    """The two channels that turn together: j and j + C/2."""

    def chosen(at: Index, given: Mapping[str, Array]) -> Index:
        if source not in given:
            return at
        half = given[source].shape[-1] // 2
        return (at[0], at[1], [at[2] % half, at[2] % half + half])

    return chosen


def _shared(h: int, H: int, given: Mapping[str, Array]) -> int:
    """The key/value head that a query head attends to; its own number where no keys are at hand to count."""
    keys = next((given[name] for name in ("k_rope", "v") if name in given), None)
    return h if keys is None else h // (H // keys.shape[1])


def _seen(at: Index, given: Mapping[str, Array]) -> Index:
    """Keys up to a position; a window may hide the first of them."""
    return (slice(at[0] + 1), _shared(at[1], given["attn_heads"].shape[1], given), EVERY)


def _chosen(at: Index, given: Mapping[str, Array]) -> Index:
    """The logits of the experts that the backend took."""
    ids = given.get("expert_ids")
    return _row(at, given) if ids is None else (at[0], ids[at[0]].tolist())


# kind of tap -> the taps its step reads, and of each the part that one element depends on; `stream` is what flows
# into the layer. Steps as in reference/llama.py and reference/gpt_oss.py.
READS: dict[str, tuple[tuple[str, Callable[[Index, Mapping[str, Array]], Index]], ...]] = {
    "embed": (("tokens", _position),),
    "attn_norm": (("stream", _same), ("stream", _row)),
    "q": (("attn_norm", _row),),
    "k": (("attn_norm", _row),),
    "v": (("attn_norm", _row),),
    "q_rope": (("q", _pair("q")),),
    "k_rope": (("k", _pair("k")),),
    "attn_scores": (
        ("q_rope", lambda at, given: (at[1], at[0], EVERY)),
        ("k_rope", lambda at, given: (at[2], _shared(at[0], given["attn_scores"].shape[0], given), EVERY)),
    ),
    "attn_weights": (("attn_scores", lambda at, given: (at[0], at[1], slice(at[1] + 1))),),
    "attn_heads": (
        ("q_rope", _slot),
        ("k_rope", _seen),
        ("v", lambda at, given: (*_seen(at, given)[:2], at[2])),
    ),
    "attn_out": (("attn_heads", lambda at, given: (at[0], EVERY, EVERY)),),
    "attn_residual": (("stream", _same), ("attn_out", _same)),
    "mlp_norm": (("attn_residual", _same), ("attn_residual", _row)),
    "gate": (("mlp_norm", _row),),
    "up": (("mlp_norm", _row),),
    "act": (("gate", _same), ("up", _same)),
    "router_logits": (("mlp_norm", _row),),
    "expert_ids": (("router_logits", _chosen),),
    "expert_weights": (("expert_ids", _row), ("router_logits", _chosen)),
    "expert_gate": (("expert_ids", _expert), ("mlp_norm", _row)),
    "expert_up": (("expert_ids", _expert), ("mlp_norm", _row)),
    "expert_act": (("expert_gate", _same), ("expert_up", _same)),
    "expert_out": (("expert_ids", _expert), ("expert_act", _slot)),
    "block_out": (("attn_residual", _same), ("mlp_out", _same)),
    "final_norm": (("stream", _same), ("stream", _row)),
    "logits": (("final_norm", _row),),
}
SPARSE_MLP_OUT = (("expert_weights", _row), ("expert_out", lambda at, given: (at[0], EVERY, at[1])))
DENSE_MLP_OUT = (("act", _row),)


def operands_of(name: str, at: list[int], given: Mapping[str, Array], layers: int | None) -> list[Operand]:
    """The operands of one element, `at` its index.

    `given` are the backend's taps by full name, this one among them, and `tokens`. `layers` is how many the model
    has: without it, what flows into the final norm is not known.
    """
    prefix, _, kind = name.rpartition(".")
    local = {kind_of(n): array for n, array in given.items() if n.rpartition(".")[0] == prefix}
    if "tokens" in given:
        local["tokens"] = given["tokens"]
    stream = _stream(layer_of(name) if prefix else layers)
    if stream in given:
        local["stream"] = given[stream]
    reads = READS.get(kind, SPARSE_MLP_OUT if "expert_ids" in local else DENSE_MLP_OUT)
    operands = []
    for source, part in reads:
        if source == "stream" and not stream:
            continue
        full = stream if source == "stream" else source if source == "tokens" or not prefix else f"{prefix}.{source}"
        index = part(tuple(at), local)
        values = local[source][index] if source in local else None
        operands.append(Operand(full, _written(index), None if values is None else np.asarray(values)))
    return operands


def _stream(layer: int | None) -> str:
    """The tap that flows into a layer, the final norm counted as one; "" if that is not known."""
    if layer is None:
        return ""
    return f"layers.{layer - 1}.block_out" if layer else "embed"


def _written(index: Index) -> str:
    return "[" + ", ".join(_part(part) for part in index) + "]"


def _part(part: Any) -> str:
    if isinstance(part, slice):
        return ":" if part.stop is None else f":{part.stop}"
    return "{" + ", ".join(map(str, part)) + "}" if isinstance(part, list) else str(part)
