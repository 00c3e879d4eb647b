"""Stored tensors: named, shaped views of encoded bytes, decoded only when asked for."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from assay.reference.config import Config, GptOssConfig

IN_CACHE = 1 << 17  # elements; their float32 and what decoding makes on the way take 2 MB


class Encoding(Protocol):
    """How the elements of a tensor are coded in its parts (see `assay.reference.formats`)."""

    @property
    def name(self) -> str: ...

    def shape(self, parts: dict[str, np.ndarray]) -> tuple[int, ...]:
        """The shape of what `decode` answers, without decoding."""
        ...

    def decode(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        """float32 of the parts; their leading axes stay, their last one or two become elements."""
        ...


@dataclass(frozen=True)
class Tensor:
    """A weight under its canonical name: logical shape, encoding, and views of the bytes that hold it.

    Every part has the same leading axes. Their product is that of `shape[:-1]`, but there may be more
    of them: a layout change such as the RoPE row permutation is then a strided view, and nothing is
    copied until `decode`. `stored_as` lists the tensors of the file that the parts came from, and
    `layout` names the layout changes on the way, in order.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    parts: dict[str, np.ndarray]
    stored_as: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()

    def decode(self) -> np.ndarray:
        """All elements, float32 [*shape]: exactly the values that the encoding defines."""
        return np.ascontiguousarray(self.encoding.decode(self.parts), dtype=np.float32).reshape(self.shape)

    def decode_as(self, dtype: np.dtype) -> np.ndarray:
        """All elements in `dtype` [*shape], each core decoding a share as many rows at a time as stay in its cache.

        The pieces halve the time of decoding a matrix of gpt-oss-20b whole, the shares on two cores that again.
        """
        rows = max(1, IN_CACHE // prod(self.shape[1:]))
        if not self.has_rows or rows >= self.shape[0]:
            return self.decode().astype(dtype)
        array = np.empty(self.shape, dtype)

        def decode_share(share: range) -> None:
            for start in range(share.start, share.stop, rows):
                stop = min(start + rows, share.stop)
                array[start:stop] = self[start:stop].decode()

        threads = os.cpu_count() or 1
        ends = [self.shape[0] * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode_share, map(range, ends, ends[1:])))
        return array

    @property
    def has_rows(self) -> bool:
        """Whether rows can be selected undecoded: no layout change has split the first axis."""
        return all(part.shape[0] == self.shape[0] for part in self.parts.values())

    def __getitem__(self, index: Any) -> "Tensor":
        """The tensor restricted to some entries of its first axis (an integer, a slice or ids), undecoded.

        Raises ValueError where a layout change split that axis: decode the whole tensor then.
        """
        if not self.has_rows:
            raise ValueError(f"{self.name}: rows of a permuted tensor cannot be selected before decoding")
        rows = np.empty(self.shape[0], np.uint8)[index]
        parts = {name: part[index] for name, part in self.parts.items()}
        return Tensor(self.name, (*rows.shape, *self.shape[1:]), self.encoding, parts, self.stored_as, self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes that the encoded parts take."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


# Canonical names are Hugging Face's, with one exception: gpt-oss's fused gate_up_proj, whose rows interleave
# gate and up, is two tensors here (as in GGUF and MLX), since splitting it is a view in every container.
_ATTENTION = {
    "input_layernorm.weight": "D",
    "self_attn.q_proj.weight": "HC,D",
    "self_attn.k_proj.weight": "KC,D",
    "self_attn.v_proj.weight": "KC,D",
    "self_attn.o_proj.weight": "D,HC",
    "post_attention_layernorm.weight": "D",
}
_ATTENTION_BIAS = {
    "self_attn.q_proj.bias": "HC",
    "self_attn.k_proj.bias": "KC",
    "self_attn.v_proj.bias": "KC",
    "self_attn.o_proj.bias": "D",
}
_DENSE = {"mlp.gate_proj.weight": "F,D", "mlp.up_proj.weight": "F,D", "mlp.down_proj.weight": "D,F"}
_DENSE_BIAS = {"mlp.gate_proj.bias": "F", "mlp.up_proj.bias": "F", "mlp.down_proj.bias": "D"}
_EXPERTS = {
    "self_attn.sinks": "H",
    "mlp.router.weight": "N,D",
    "mlp.router.bias": "N",
    "mlp.experts.gate_proj.weight": "N,F,D",
    "mlp.experts.gate_proj.bias": "N,F",
    "mlp.experts.up_proj.weight": "N,F,D",
    "mlp.experts.up_proj.bias": "N,F",
    "mlp.experts.down_proj.weight": "N,D,F",
    "mlp.experts.down_proj.bias": "N,D",
}


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a model of this config has, by canonical name."""
    layer = dict(_ATTENTION)
    if config.attention_bias:
        layer |= _ATTENTION_BIAS
    if isinstance(config, GptOssConfig):
        layer |= _EXPERTS
    else:
        layer |= _DENSE | (_DENSE_BIAS if config.mlp_bias else {})
    axes = {"model.embed_tokens.weight": "V,D", "model.norm.weight": "D"}
    if not config.tie_word_embeddings:
        axes["lm_head.weight"] = "V,D"
    for i in range(config.num_hidden_layers):
        axes |= {f"model.layers.{i}.{name}": letters for name, letters in layer.items()}
    return {name: tuple(prod(config.dims[c] for c in axis) for axis in a.split(",")) for name, a in axes.items()}
