"""Mistakes of the feed-forward's biases, and of which matrix is which."""

import numpy as np

from assay.golden.mistakes.mistake import Mistake, has_tensor, is_gpt_oss
from assay.golden.mistakes.recipe import weight_changed, weights_renamed

FAMILY = "feed-forward biases and layout"


def _bias_missing(which: str, tap: str, *names: str) -> Mistake:
    ends = tuple(f"mlp.experts.{name}_proj.bias" for name in names)
    return Mistake(
        f"{which}-bias-missing",
        f"Experts' {' and '.join(names)} bias missing",
        "The bias of an expert's projection is not added.",
        tuple(f"expert_{name}" if name != "down" else "expert_out" for name in names),
        weight_changed(np.zeros_like, *ends),
        f"Add {' and '.join(ends)} of each token's own expert.",
        ("vLLM #46641", "vllm-ascend #2436", "torchtitan #2106"),
        has_tensor(ends[0]),
    )


def _dense_bias_missing(name: str, tap: str) -> Mistake:
    return Mistake(
        f"mlp-{name}-bias-missing",
        f"Bias of the {name} projection missing",
        "The feed-forward's bias is not added.",
        (tap,),
        weight_changed(np.zeros_like, f"mlp.{name}_proj.bias"),
        f"Add mlp.{name}_proj.bias.",
        ("TGI #1036", "gpt-neox #962", "nano-vllm #99"),
        has_tensor(f"mlp.{name}_proj.bias"),
    )


SWAPPED = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
MISTAKES = (
    _bias_missing("gate-up", "expert_gate", "gate", "up"),
    _bias_missing("gate", "expert_gate", "gate"),
    _bias_missing("up", "expert_up", "up"),
    _bias_missing("down", "expert_out", "down"),
    Mistake(
        "down-bias-per-rank",
        "Experts' down bias added on each of two ranks",
        "The down projection's bias is doubled by the reduction over ranks.",
        ("expert_out",),
        weight_changed(lambda bias: 2 * bias, "mlp.experts.down_proj.bias"),
        "Add the bias on one rank only.",
        ("vLLM #46641", "vllm-ascend #2436", "torchtitan #2106"),
        is_gpt_oss,
    ),
    _dense_bias_missing("gate", "gate"),
    _dense_bias_missing("up", "up"),
    _dense_bias_missing("down", "mlp_out"),
    Mistake(
        "gate-up-weights-swapped",
        "Gate and up projections swapped",
        "Gates come from the up projection and ups from the gate projection.",
        ("expert_gate", "expert_up", "gate", "up"),
        weights_renamed(SWAPPED),
        "gpt-oss's fused matrix has gates in even rows, ups in odd ones; llama.cpp's and MLX's are split already.",
        ("mlx-lm #767", "vLLM #46645", "SGLang #26884", "ik_llama.cpp #829"),
    ),
    Mistake(
        "gate-up-matrices-swapped",
        "Gate and up matrices swapped, their biases not",
        "The two matrices are exchanged and each bias stays where it was.",
        ("expert_gate", "expert_up"),
        weights_renamed({f"{old}.weight": f"{new}.weight" for old, new in SWAPPED.items()}),
        "De-interleave weights and biases alike.",
        ("mlx-lm #767", "ik_llama.cpp #829"),
        is_gpt_oss,
    ),
)
