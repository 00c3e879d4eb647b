"""How much work a step of the oracle is, counted and not timed: what ends by it ends alike on every machine."""

from math import prod

from assay.reference.config import Config, GptOssConfig
from assay.reference.taps import kind_of, tap_table

DECODED = 50  # multiplications that take as long as decoding one weight: MXFP4, on two cores
LEAST = 1_000_000  # multiplications that take as long as the smallest step: what Python and NumPy need for it

MATRICES = {
    "q": "DHC",
    "k": "DKC",
    "v": "DKC",
    "attn_out": "HCD",
    "router_logits": "DN",
    "gate": "DF",
    "up": "DF",
    "mlp_out": "FD",
    "logits": "DV",
}
OF_EXPERTS = {"expert_gate": "DF", "expert_up": "DF", "expert_out": "FD", "mlp_out": ""}
OF_ATTENTION = ("attn_scores", "attn_heads")  # each query with each key


def work_by_kind(config: Config, T: int) -> dict[str, int]:
    """The work of each kind of step on T positions, in multiplications; decoding its weights included."""
    return {kind: LEAST + _work(kind, config, T) for kind in {kind_of(name): None for name in tap_table(config)}}


def _work(kind: str, config: Config, T: int) -> int:
    def size(letters: str) -> int:
        return prod(config.dims[letter] for letter in letters)

    if kind in OF_ATTENTION:
        return T * T * size("HC")
    if isinstance(config, GptOssConfig) and kind in OF_EXPERTS:
        A, N = config.num_experts_per_tok, config.num_local_experts
        return (T * A + DECODED * min(N, T * A)) * size(OF_EXPERTS[kind])
    return (T + DECODED) * size(MATRICES[kind]) if kind in MATRICES else 0
