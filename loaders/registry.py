"""Shapes of released models, by the names that `assay synth` takes.

Every number is from the config.json of the model's repository on Hugging Face, named in `source`; where a key is not
in that file, the value is its class's in transformers.
"""

from dataclasses import dataclass, replace

from assay.loaders.config import yarn_attention_factor
from assay.loaders.errors import CheckpointError
from assay.reference.config import Config, GptOssConfig, LlamaConfig, YarnScaling


@dataclass(frozen=True)
class Shape:
    """A released model's config, and what a stand-in for its tokenizer must have: special tokens at their ids."""

    source: str
    model_type: str
    config: Config
    pre_tokenizer: str
    special_tokens: dict[int, str]
    bos: int
    eos: int
    pad: int

    def shortened(self, layers: int | None) -> Config:
        """The config with its first layers only; CheckpointError for a count that it does not have."""
        if layers is None:
            return self.config
        if not 1 <= layers <= self.config.num_hidden_layers:
            raise CheckpointError(
                "--layers is out of range", expected=f"1 to {self.config.num_hidden_layers}", got=layers
            )
        if isinstance(self.config, GptOssConfig):
            return replace(self.config, num_hidden_layers=layers, layer_types=self.config.layer_types[:layers])
        return replace(self.config, num_hidden_layers=layers)


def _gpt_oss(layers: int, experts: int) -> GptOssConfig:
    kinds = "sliding_attention", "full_attention"
    return GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        rope_scaling=YarnScaling(
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            original_max_position_embeddings=4096,
            truncate=False,
            attention_factor=yarn_attention_factor(32.0),
        ),
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        attention_bias=True,
        num_local_experts=experts,
        num_experts_per_tok=4,
        swiglu_alpha=1.702,  # a constant of the model's code
        swiglu_limit=7.0,
        sliding_window=128,
        layer_types=tuple(kinds[i % 2] for i in range(layers)),
    )


def _llama(
    vocab: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    positions: int,
    *,
    theta: float = 10000.0,
    tied: bool = False,
    window: int | None = None,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=hidden // heads[0],
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=None,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        attention_bias=False,
        mlp_bias=False,
        sliding_window=window,
    )


_HARMONY = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
}
_SENTENCEPIECE = {0: "<unk>", 1: "<s>", 2: "</s>"}

SHAPES = {
    "gpt-oss-20b": Shape(
        "openai/gpt-oss-20b", "gpt_oss", _gpt_oss(24, 32), "gpt-4o", _HARMONY, bos=199998, eos=200002, pad=199999
    ),
    "gpt-oss-120b": Shape(
        "openai/gpt-oss-120b", "gpt_oss", _gpt_oss(36, 128), "gpt-4o", _HARMONY, bos=199998, eos=200002, pad=199999
    ),
    "tinyllama-1.1b": Shape(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "llama",
        _llama(32000, 2048, 5632, 22, (32, 4), 2048),
        "gpt-2",
        _SENTENCEPIECE,
        bos=1,
        eos=2,
        pad=2,
    ),
    "mistral-7b": Shape(
        "mistralai/Mistral-7B-v0.1",
        "mistral",
        _llama(32000, 4096, 14336, 32, (32, 8), 32768, window=4096),
        "gpt-2",
        _SENTENCEPIECE,
        bos=1,
        eos=2,
        pad=2,
    ),
    "phi-3-mini": Shape(
        "microsoft/Phi-3-mini-4k-instruct",
        "phi3",
        _llama(32064, 3072, 8192, 32, (32, 32), 4096, window=2047),
        "gpt-2",
        {**_SENTENCEPIECE, 32000: "<|endoftext|>"},
        bos=1,
        eos=32000,
        pad=32000,
    ),
    "smollm2-135m": Shape(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llama",
        _llama(49152, 576, 1536, 30, (9, 3), 8192, theta=100000.0, tied=True),
        "smollm",
        {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"},
        bos=1,
        eos=2,
        pad=2,
    ),
}


def find_shape(name: str) -> Shape:
    """The shape of that name; CheckpointError, listing the names, if there is none."""
    if name not in SHAPES:
        raise CheckpointError(f"no registered shape {name!r}", expected=f"one of {', '.join(SHAPES)}")
    return SHAPES[name]
