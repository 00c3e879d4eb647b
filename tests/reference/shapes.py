"""Checkpoints of odd shapes, between them every choice that the two families leave open."""

from pathlib import Path
from typing import Any

# what each varies is in its name; the rest is the default of tests/tiny.py
GPT_OSS: dict[str, dict[str, Any]] = {
    "1 of 3 experts, window 5": {
        "seed": 11,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "sliding_window": 5,
    },
    "head 64, 4 of 8 experts, window 128": {
        "seed": 12,
        "head_dim": 64,
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "config_style": "transformers5",
    },
    "YaRN truncated, one key head, window 16": {
        "seed": 13,
        "hidden_size": 160,
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "sliding_window": 16,
        "rope_scaling": {"truncate": True},
    },
    "head 64, no groups, 3 of 5 experts, limit 3": {
        "seed": 14,
        "head_dim": 64,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "swiglu_limit": 3.0,
    },
    "all 4 experts, window 127, layers in another order": {
        "seed": 15,
        "num_experts_per_tok": 4,
        "sliding_window": 127,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "config_style": "transformers5",
    },
    "YaRN of gpt-oss-20b": {
        "seed": 16,
        "head_dim": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
        "rope_scaling": {"factor": 32.0, "beta_fast": 32.0, "original_max_position_embeddings": 4096},
        "shards": 3,
    },
}
LLAMA: dict[str, dict[str, Any]] = {
    "tied, Llama-3 RoPE, grouped": {"seed": 21},
    "untied, plain RoPE, no groups, float32": {
        "seed": 22,
        "tie_word_embeddings": False,
        "rope_scaling": None,
        "num_key_value_heads": 4,
        "dtype": "float32",
    },
    "biases, one key head of 24": {
        "seed": 23,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 24,
        "num_key_value_heads": 1,
        "config_style": "transformers5",
    },
    "mistral, window 12": {"seed": 24, "architecture": "mistral"},
    "mistral, window 128": {"seed": 25, "architecture": "mistral", "sliding_window": 128, "head_dim": 32},
}


def make_shape(name: str, directory: Path, **changes: Any) -> Path:
    """Write one of the checkpoints above, with changes, to a folder that does not exist yet."""
    from tests.tiny import make_gpt_oss, make_llama

    make = make_gpt_oss if name in GPT_OSS else make_llama
    return make(directory, **{**GPT_OSS, **LLAMA}[name] | changes)
