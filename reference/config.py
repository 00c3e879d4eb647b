"""Model configurations as frozen records; every field that changes the numbers is spelled out.

Fields carry the names of Hugging Face's config.json and have no defaults: whoever builds one
(`assay.loaders.config`) must have read each value from the checkpoint or decided it knowingly.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Llama3Scaling:
    """RoPE scaling of Llama 3.1 and later: low frequencies divided by `factor`, a smooth ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolated low, extrapolated high frequencies.

    `truncate` says whether the ends of the ramp between the two are rounded to whole pair indices
    (the paper's code does, gpt-oss does not). `attention_factor` is the factor m on cos and sin.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    truncate: bool
    attention_factor: float


@dataclass(frozen=True)
class FrequencyFactors:
    """One divisor for each rotary pair's frequency, as GGUF stores Llama-3 scaling (`rope_freqs.weight`)."""

    factors: tuple[float, ...]


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): one divisor a pair up to the original context, another beyond.

    When the long set takes over is a convention. Here, as in transformers, by the length that a call
    reaches: its last position + 1 above `original_max_position_embeddings` turns all positions of that
    call by the long set, while keys cached by earlier calls stay as they were turned. So a sequence cut
    into chunks equals the uncut one only if all of it is on one side. llama.cpp decides by the size of
    its context instead, whatever it holds, and mlx-lm always takes the long set.
    `attention_factor` is the factor m on cos and sin, with either set.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float


RopeScaling = Llama3Scaling | YarnScaling | FrequencyFactors | LongRopeScaling | None


@dataclass(frozen=True)
class LlamaConfig:
    """The Llama family: dense SwiGLU, grouped-query attention; Mistral and phi-3 add a sliding window."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by dimension letter (see `assay.reference.ops`)."""
        return _attention_dims(self) | {"F": self.intermediate_size}

    def window(self, layer: int) -> int | None:
        """Keys that a query of this layer sees, itself included; None for all."""
        return self.sliding_window


@dataclass(frozen=True)
class GptOssConfig:
    """gpt-oss: mixture of experts with a clamped SwiGLU, attention sinks, alternating windows, YaRN."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    num_local_experts: int
    num_experts_per_tok: int
    swiglu_alpha: float
    swiglu_limit: float
    sliding_window: int
    layer_types: tuple[str, ...]

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by dimension letter (see `assay.reference.ops`)."""
        return _attention_dims(self) | {
            "N": self.num_local_experts,
            "A": self.num_experts_per_tok,
            "F": self.intermediate_size,
        }

    def window(self, layer: int) -> int | None:
        """Keys that a query of this layer sees, itself included; None for all."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None


Config = LlamaConfig | GptOssConfig


def _attention_dims(config: Config) -> dict[str, int]:
    return {
        "D": config.hidden_size,
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "G": config.num_attention_heads // config.num_key_value_heads,
        "C": config.head_dim,
        "V": config.vocab_size,
    }
