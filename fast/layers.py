"""One block's weights as every fast path holds them, and where in a checkpoint they are; no mathematics."""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from assay.reference.config import Config, GptOssConfig

VectorT = TypeVar("VectorT")
LinearT = TypeVar("LinearT")
SinksT = TypeVar("SinksT")
VectorT_co = TypeVar("VectorT_co", covariant=True)
LinearT_co = TypeVar("LinearT_co", covariant=True)
SinksT_co = TypeVar("SinksT_co", covariant=True)


@dataclass(frozen=True)
class Layer(Generic[VectorT, LinearT, SinksT]):
    """One block's weights. A dense model has no router; in a mixture of experts the last three are stacks."""

    attn_norm: VectorT
    q: LinearT
    k: LinearT
    v: LinearT
    o: LinearT
    sinks: SinksT
    mlp_norm: VectorT
    router: LinearT | None
    gate: LinearT
    up: LinearT
    down: LinearT


class Cast(Protocol[VectorT_co, LinearT_co, SinksT_co]):
    """Makes a path's own records of tensors, by canonical name."""

    def vector(self, name: str) -> VectorT_co:
        """A small tensor of floats."""
        ...

    def linear(self, name: str) -> LinearT_co:
        """A projection, or a stack of them, and its bias if it has one."""
        ...

    def sinks(self, name: str | None) -> SinksT_co:
        """Attention's sinks, or what stands for none."""
        ...


def cast_layer(config: Config, cast: Cast[VectorT, LinearT, SinksT], i: int) -> Layer[VectorT, LinearT, SinksT]:
    """Layer i of a model."""
    prefix, sparse = f"model.layers.{i}", isinstance(config, GptOssConfig)
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    feed_forward = f"{mlp}.experts" if sparse else mlp
    return Layer(
        attn_norm=cast.vector(f"{prefix}.input_layernorm.weight"),
        q=cast.linear(f"{attention}.q_proj"),
        k=cast.linear(f"{attention}.k_proj"),
        v=cast.linear(f"{attention}.v_proj"),
        o=cast.linear(f"{attention}.o_proj"),
        sinks=cast.sinks(f"{attention}.sinks" if sparse else None),
        mlp_norm=cast.vector(f"{prefix}.post_attention_layernorm.weight"),
        router=cast.linear(f"{mlp}.router") if sparse else None,
        gate=cast.linear(f"{feed_forward}.gate_proj"),
        up=cast.linear(f"{feed_forward}.up_proj"),
        down=cast.linear(f"{feed_forward}.down_proj"),
    )
