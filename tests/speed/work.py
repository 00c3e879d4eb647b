"""How many bytes a pass must read and how many operations it must compute, from the weights alone."""

from collections.abc import Iterable
from math import prod
from typing import Any

from assay.fast.cpu.weights import Linear
from assay.loaders import Checkpoint
from assay.reference.config import GptOssConfig
from assay.reference.weights import Tensor


def layer_work(linears: Iterable[Linear], products: int, matrices: int | None = None) -> dict[str, Any]:
    """Of `products` inputs through each of the projections; of a stack, `matrices` are read."""
    nbytes = operations = 0
    for linear in linears:
        N, O = linear.bias.shape  # noqa: E741
        rows = linear.rows
        nbytes += (matrices or N) * O * (rows.codes_bytes + rows.scales_bytes + rows.biases_bytes)
        operations += 2 * products * O * rows.columns
    return {"nbytes": nbytes, "operations": operations, "quantised": all(linear.quantised for linear in linears)}


def token_work(checkpoint: Checkpoint) -> tuple[float, float]:
    """Bytes read and operations computed for one decoded token, keys and values aside."""
    config, nbytes, operations = checkpoint.config, 0.0, 0.0
    for tensor in _multiplied(checkpoint):
        share = config.num_experts_per_tok / config.num_local_experts if isinstance(config, GptOssConfig) else 1.0
        share = share if _is_expert(tensor) else 1.0
        nbytes += share * _nbytes(tensor)
        operations += 2 * share * prod(tensor.shape)
    return nbytes, operations


def matrix_bytes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes of all experts, and of all other matrices that a token is multiplied with."""
    experts = sum(_nbytes(tensor) for tensor in _multiplied(checkpoint) if _is_expert(tensor))
    return experts, sum(map(_nbytes, _multiplied(checkpoint))) - experts


def _multiplied(checkpoint: Checkpoint) -> list[Tensor]:
    """The matrices; of the embedding one row is read, unless it is the head too."""
    tied = checkpoint.config.tie_word_embeddings
    return [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if name.endswith("proj.weight") or name in ("lm_head.weight", "model.embed_tokens.weight" if tied else "")
    ]


def _is_expert(tensor: Tensor) -> bool:
    return len(tensor.shape) == 3


def _nbytes(tensor: Tensor) -> int:
    return sum(part.nbytes for part in tensor.parts.values())
