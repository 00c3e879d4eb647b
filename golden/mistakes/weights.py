"""Mistakes of decoding and laying out weights: transposes, nibble order, scales."""

from collections.abc import Callable

import numpy as np

from assay.golden.mistakes.mistake import Mistake, is_square, is_stored_as
from assay.golden.mistakes.recipe import Array, weight_changed
from assay.loaders.checkpoint import Checkpoint

FAMILY = "weights"

PROJECTIONS = ("gate", "up", "down")
EXPERTS = tuple(f"mlp.experts.{name}_proj.weight" for name in PROJECTIONS)
EXPERT_TAPS = ("expert_gate", "expert_up", "expert_out")
IS_MXFP4 = is_stored_as("mlp.experts.gate_proj.weight", "mxfp4")


def _groups(order: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A change of the elements' order within each group of 32."""
    return lambda w: order(w.reshape(*w.shape[:-1], -1, 32)).reshape(w.shape)


def _neighbours_swapped(w: Array) -> Array:
    return w.reshape(*w.shape[:-1], 16, 2)[..., ::-1]


def _read_as_halves(w: Array) -> Array:
    """Element 2j read as j and 2j + 1 as j + 16: bytes of neighbours taken for bytes of block halves."""
    return w.reshape(*w.shape[:-1], 16, 2).swapaxes(-1, -2)


def _read_as_neighbours(w: Array) -> Array:
    return w.reshape(*w.shape[:-1], 2, 16).swapaxes(-1, -2)


def _halves_swapped(w: Array) -> Array:
    return np.roll(w, 16, axis=-1)


def _expert_transposed(name: str, tap: str) -> Mistake:
    end = f"mlp.experts.{name}_proj.weight"
    return Mistake(
        f"expert-{name}-transposed",
        f"Experts' {name} projection transposed",
        "Hidden and expert width are equal, so that the transpose of each expert's matrix fits.",
        (tap,),
        weight_changed(np.transpose, end),
        "Experts are [N, out, in] here; transformers keeps them as [N, in, out].",
        ("Megatron-Bridge #3743, #3753", "unsloth-zoo #1114, #1251, #1294", "mlx-lm 2e8dc7cc, 6b7a319c"),
        is_square(end),
    )


def _dense_transposed(name: str, tap: str) -> Mistake:
    end = f"mlp.{name}_proj.weight"
    return Mistake(
        f"mlp-{name}-transposed",
        f"Weight of the {name} projection transposed",
        "The matrix is square, so that its transpose fits.",
        (tap,),
        weight_changed(np.transpose, end),
        "Weights are stored [out, in]: y = x W^T.",
        ("Megatron-Bridge #3743, #3753", "unsloth-zoo #1114"),
        is_square(end),
    )


def _mxfp4(id: str, title: str, explanation: str, order: Callable[[Array], Array]) -> Mistake:
    return Mistake(
        id,
        title,
        explanation,
        EXPERT_TAPS,
        weight_changed(_groups(order), *EXPERTS),
        "Safetensors: low nibble element 2j, high 2j + 1. GGUF: low nibble element j, high j + 16.",
        ("kekzl/imp #567",),
        IS_MXFP4,
    )


def _exponent(id: str, which: str, names: tuple[str, ...], taps: tuple[str, ...], by: int) -> Mistake:
    return Mistake(
        id,
        f"MXFP4 scale exponent off by {by:+d}{which}",
        f"Decoded weights are {2.0**by:g} times what they should be{which}: another bias than 127, or the doubled "
        "table of GGUF without its halved scale.",
        taps,
        weight_changed(lambda w: w * w.dtype.type(2.0**by), *(f"mlp.experts.{name}_proj.weight" for name in names)),
        "E8M0 byte e is 2^(e - 127); with a table of doubled values use half of it.",
        ("compressed-tensors #538, #541", "vLLM #35979, #35562"),
        IS_MXFP4,
    )


def _is_q4_0(checkpoint: Checkpoint) -> bool:
    return is_stored_as("self_attn.q_proj.weight", "q4_0")(checkpoint)


MISTAKES = (
    *(_expert_transposed(name, tap) for name, tap in zip(PROJECTIONS, EXPERT_TAPS, strict=True)),
    *(_dense_transposed(name, tap) for name, tap in zip(PROJECTIONS, ("gate", "up", "mlp_out"), strict=True)),
    _mxfp4("mxfp4-nibbles-swapped", "MXFP4 nibbles swapped", "High nibble read before low.", _neighbours_swapped),
    _mxfp4(
        "mxfp4-read-as-halves",
        "MXFP4 nibbles laid out as block halves",
        "Bytes that hold neighbours (2j, 2j + 1) are read as if they held j and j + 16.",
        _read_as_halves,
    ),
    _mxfp4(
        "mxfp4-read-as-neighbours",
        "MXFP4 nibbles laid out as neighbours",
        "Bytes that hold j and j + 16 (GGUF) are read as if they held 2j and 2j + 1.",
        _read_as_neighbours,
    ),
    _mxfp4(
        "mxfp4-halves-swapped",
        "MXFP4 block halves swapped",
        "Elements 16 to 31 of each block come first.",
        _halves_swapped,
    ),
    _exponent("mxfp4-exponent-high", "", PROJECTIONS, EXPERT_TAPS, 1),
    _exponent("mxfp4-exponent-low", "", PROJECTIONS, EXPERT_TAPS, -1),
    _exponent("mxfp4-exponent-two-low", "", PROJECTIONS, EXPERT_TAPS, -2),
    _exponent("mxfp4-down-exponent-high", " in the down projection", ("down",), ("expert_out",), 1),
    _exponent("mxfp4-down-exponent-low", " in the down projection", ("down",), ("expert_out",), -1),
    Mistake(
        "mxfp4-sign-ignored",
        "MXFP4 sign bit ignored",
        "Bit 3 of each code is masked away.",
        EXPERT_TAPS,
        weight_changed(np.abs, *EXPERTS),
        "Bit 3 is the sign, bits 0 to 2 the magnitude.",
        (),
        IS_MXFP4,
    ),
)
