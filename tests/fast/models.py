"""Random, well-scaled models built straight from a config and a dict of tensors, in a choice of encodings."""

from collections.abc import Callable

import numpy as np

from assay.reference.config import Config, GptOssConfig, LlamaConfig, RopeScaling, YarnScaling
from assay.reference.formats import (
    BF16,
    F16,
    F32,
    MXFP4,
    MXFP4_BLOCKS,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    AffineGroups,
)
from assay.reference.weights import Tensor, weight_shapes

YARN = YarnScaling(
    factor=8.0,
    beta_fast=8.0,
    beta_slow=1.0,
    original_max_position_embeddings=32,
    truncate=False,
    attention_factor=1.2079441541679836,
)


def llama_config(
    sliding_window: int | None = None,
    rope_scaling: RopeScaling = None,
    tie_word_embeddings: bool = True,
    bias: bool = False,
) -> LlamaConfig:
    """A small Llama with three query heads to a key head and sizes that no tile divides."""
    return LlamaConfig(
        vocab_size=101,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=rope_scaling,
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
        attention_bias=bias,
        mlp_bias=bias,
        sliding_window=sliding_window,
    )


def gpt_oss_config(sliding_window: int = 8, experts_per_tok: int = 3, layers: int = 3) -> GptOssConfig:
    """A small gpt-oss with everything on."""
    return GptOssConfig(
        vocab_size=131,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        rope_scaling=YARN,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        attention_bias=True,
        num_local_experts=7,
        num_experts_per_tok=experts_per_tok,
        swiglu_alpha=1.702,
        swiglu_limit=2.5,  # lower than the released 7, so that random activations reach it
        sliding_window=sliding_window,
        layer_types=("sliding_attention", "full_attention") * (layers // 2) + ("sliding_attention",) * (layers % 2),
    )


def float_tensor(name: str, values: np.ndarray, encoding: str) -> Tensor:
    """Values rounded to one of the plain formats."""
    if encoding == "BF16":
        return Tensor(name, values.shape, BF16, {"values": (values.astype("<f4").view("<u4") >> 16).astype("<u2")})
    record = {"F32": F32, "F16": F16}[encoding]
    return Tensor(name, values.shape, record, {"values": values.astype(record.stored)})


def quantised_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...], encoding: str) -> Tensor:
    """Random codes with scales that give the elements a standard deviation of about I^-0.5."""
    *outer, I = shape  # noqa: E741
    bytes_of = lambda *size: rng.integers(0, 256, (*outer, *size), dtype=np.uint8)  # noqa: E731
    deviation = I**-0.5 * rng.uniform(0.5, 1.5, (*outer, I // 32, 1))
    if encoding == "MXFP4":
        return Tensor(name, shape, MXFP4, {"blocks": bytes_of(I // 32, 16), "scales": _e8m0(deviation)[..., 0]})
    if encoding == "MXFP4_BLOCKS":
        return Tensor(
            name, shape, MXFP4_BLOCKS, {"blocks": np.concatenate((_e8m0(deviation), bytes_of(I // 32, 16)), -1)}
        )
    if encoding in ("affine4", "affine8"):
        bits = int(encoding[-1])
        scale = (deviation[..., 0] * 12**0.5 / 2**bits).astype(np.float16)
        parts = {"scales": scale, "biases": (-scale * 2.0 ** (bits - 1)).astype(np.float16)}
        return Tensor(name, shape, AffineGroups(bits, 32, F16), parts | {"weight": bytes_of(I * bits // 8).view("<u4")})
    if encoding in BLOCKS:
        return Tensor(name, shape, BLOCKS[encoding][0], {"blocks": _blocks(bytes_of, shape, encoding)})
    record, steps = {"Q8_0": (Q8_0, 256), "Q4_0": (Q4_0, 16), "Q4_1": (Q4_1, 16)}[encoding]
    d = (deviation * 12**0.5 / steps).astype("<f2")
    fields = [d.view(np.uint8), bytes_of(I // 32, 32 if record is Q8_0 else 16)]
    if record is Q4_1:
        fields.insert(1, (-7.5 * d).astype("<f2").view(np.uint8))
    return Tensor(name, shape, record, {"blocks": np.concatenate(fields, -1)})


# the record, where d is, and dmin if there is one, and what they are over the elements' standard deviation
BLOCKS = {
    "Q5_0": (Q5_0, {0: 1 / 9.2}),
    "Q5_1": (Q5_1, {0: 1 / 9.2, 2: -15.5 / 9.2}),
    "Q4_K": (Q4_K, {0: 1 / 260, 2: 7.5 / 260}),
    "Q5_K": (Q5_K, {0: 1 / 527, 2: 15.5 / 527}),
    "Q6_K": (Q6_K, {208: 1 / 1366}),
}


def _blocks(bytes_of: Callable[..., np.ndarray], shape: tuple[int, ...], encoding: str) -> np.ndarray:
    record, fields = BLOCKS[encoding]
    blocks = bytes_of(shape[-1] // record.elements, record.nbytes)
    for field, share in fields.items():
        blocks[..., field : field + 2] = np.array([shape[-1] ** -0.5 * share], "<f2").view(np.uint8)
    return blocks


def _e8m0(deviation: np.ndarray) -> np.ndarray:
    return (127 + np.round(np.log2(deviation / 2.93))).astype(np.uint8)  # 2.93: rms of E2M1's values


def random_model(config: Config, seed: int, encoding: str = "F32", experts: str = "MXFP4") -> dict[str, Tensor]:
    """All tensors of a model: matrices and experts in the encodings named, vectors in float32."""
    rng = np.random.default_rng(seed)
    return {name: _random_tensor(rng, name, shape, encoding, experts) for name, shape in weight_shapes(config).items()}


def _random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...], encoding: str, experts: str) -> Tensor:
    if "norm" in name:
        return float_tensor(name, rng.uniform(0.5, 1.5, shape), "F32")
    if name.endswith(("bias", "sinks")):
        return float_tensor(name, rng.normal(0, 0.5, shape), "F32")
    if "experts" in name:
        encoding = experts
    if encoding in ("F32", "F16", "BF16"):
        return float_tensor(name, rng.normal(0, shape[-1] ** -0.5, shape), encoding)
    return quantised_tensor(rng, name, shape, encoding)
