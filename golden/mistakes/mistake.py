"""The record of one known mistake, and the conditions that many of them share."""

from collections.abc import Callable
from dataclasses import dataclass

from assay.golden.mistakes.recipe import Variant
from assay.loaders.checkpoint import Checkpoint
from assay.reference.config import Config, GptOssConfig, Llama3Scaling, LongRopeScaling, YarnScaling


@dataclass(frozen=True)
class Needs:
    """What a prompt must have for a mistake to show: `tokens` positions, `chunks` calls, and what else in words."""

    tokens: int = 1
    chunks: int = 1
    else_: str = ""


@dataclass(frozen=True)
class Mistake:
    """A wrong way to compute something that somebody's backend really had, as a variant of the oracle's recipe.

    `taps` are those at which it acts first, by their names within the layer; `acts` says whether a checkpoint
    has what it goes wrong with. `grain` is the unit roundoff of a mistake that is a rounding: a value that lies
    between two multiples may then go to either.
    """

    id: str
    title: str
    explanation: str
    taps: tuple[str, ...]
    variant: Variant
    advice: str
    sources: tuple[str, ...] = ()
    acts: Callable[[Checkpoint], bool] = lambda checkpoint: True
    needs: Callable[[Config], Needs] = lambda config: Needs()
    grain: float = 0.0


ROPE = ("q_rope", "k_rope")
SECOND_POSITION = lambda config: Needs(tokens=2)  # noqa: E731 - the first position is not turned
SECOND_CHUNK = lambda config: Needs(tokens=2, chunks=2)  # noqa: E731


def is_gpt_oss(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint.config, GptOssConfig)


def is_dense(checkpoint: Checkpoint) -> bool:
    return not is_gpt_oss(checkpoint)


def has_yarn(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint.config.rope_scaling, YarnScaling)


def has_llama3(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint.config.rope_scaling, Llama3Scaling)


def has_longrope(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint.config.rope_scaling, LongRopeScaling)


def has_window(checkpoint: Checkpoint) -> bool:
    config = checkpoint.config
    return any(config.window(i) is not None for i in range(config.num_hidden_layers))


def has_groups(checkpoint: Checkpoint) -> bool:
    return 1 < checkpoint.config.num_key_value_heads < checkpoint.config.num_attention_heads


def has_tensor(end: str) -> Callable[[Checkpoint], bool]:
    """Whether layer 0 has a tensor of this name."""
    return lambda checkpoint: f"model.layers.0.{end}" in checkpoint.tensors


def is_square(end: str) -> Callable[[Checkpoint], bool]:
    """Whether this matrix of layer 0, or each of a stack, is square: only then does its transpose fit."""

    def square(checkpoint: Checkpoint) -> bool:
        tensor = checkpoint.tensors.get(f"model.layers.0.{end}")
        return tensor is not None and tensor.shape[-1] == tensor.shape[-2]

    return square


def is_stored_as(end: str, *encodings: str) -> Callable[[Checkpoint], bool]:
    """Whether layer 0 stores this matrix in one of the encodings; compares the start of their names."""

    def stored(checkpoint: Checkpoint) -> bool:
        tensor = checkpoint.tensors.get(f"model.layers.0.{end}")
        return tensor is not None and tensor.encoding.name.lower().startswith(encodings)

    return stored


def past_window(config: Config, extra: int = 1) -> Needs:
    """As many tokens as take a query past the smallest window."""
    windows = [window for i in range(config.num_hidden_layers) if (window := config.window(i)) is not None]
    return Needs(tokens=min(windows, default=0) + extra)
