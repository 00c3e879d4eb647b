"""Mistakes of windows, causality and the key/value cache."""

from dataclasses import replace

import numpy as np

from assay.golden.mistakes.mistake import SECOND_CHUNK, Mistake, Needs, has_window, is_gpt_oss, past_window
from assay.golden.mistakes.recipe import Array, Recipe, Variant, configure, exchange, true_mask
from assay.reference.config import Config, GptOssConfig

FAMILY = "window and cache"

MASK = ("attn_scores", "attn_weights")
KINDS = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}


def _window(more: int) -> Variant:
    return configure(sliding_window=lambda config: config.sliding_window + more)


def _window_missing(recipe: Recipe) -> Recipe:
    config = recipe.config
    if isinstance(config, GptOssConfig):
        return replace(recipe, config=replace(config, layer_types=("full_attention",) * config.num_hidden_layers))
    return replace(recipe, config=replace(config, sliding_window=None))


def _causal_missing(config: Config, layer: int, query_T: Array, key_S: Array, start_T: Array) -> Array:
    """Within a chunk everybody sees everybody, as far as the window reaches back."""
    same_chunk_TS = start_T[:, None] == start_T[None, :]
    return true_mask(config, layer, query_T, key_S, start_T) | same_chunk_TS & (key_S > query_T[:, None])


def _own_key_masked(config: Config, layer: int, query_T: Array, key_S: Array, start_T: Array) -> Array:
    return true_mask(config, layer, query_T, key_S, start_T) & (key_S < query_T[:, None])


def _cached_skipped(config: Config, layer: int, query_T: Array, key_S: Array, start_T: Array) -> Array:
    return true_mask(config, layer, query_T, key_S, start_T) & (key_S >= start_T[:, None])


def _first_key_masked(config: Config, layer: int, query_T: Array, key_S: Array, start_T: Array) -> Array:
    hidden_TS = (key_S == 0) & (query_T[:, None] > 0)
    return true_mask(config, layer, query_T, key_S, start_T) & ~hidden_TS


def _mask_from_chunk(config: Config, layer: int, query_T: Array, key_S: Array, start_T: Array) -> Array:
    """The mask counts queries from the chunk's start: later chunks see too few keys."""
    return true_mask(config, layer, query_T - start_T, key_S, start_T)


def _rolled(amount: int, within_window: bool = False) -> Variant:
    """The values of earlier chunks shifted among themselves, or only those that a windowed layer's cache keeps."""

    def combine(config: Config, layer: int, weights_HTS: Array, v_SHC: Array, start_T: Array) -> Array:
        window = config.window(layer)
        kept = len(start_T) if window is None or not within_window else window - 1
        out_THC = np.empty((len(start_T), *v_SHC.shape[1:]), v_SHC.dtype)
        for start in np.unique(start_T):
            v, first = v_SHC.copy(), max(0, start - kept)
            v[first:start] = np.roll(v[first:start], amount, axis=0)
            rows_T = start_T == start
            out_THC[rows_T] = (weights_HTS[:, rows_T] @ v.transpose(1, 0, 2)).transpose(1, 0, 2)
        return out_THC

    return exchange(combine=combine)


def _past_window(config: Config) -> Needs:
    return past_window(config)


MISTAKES = (
    Mistake(
        "window-one-more",
        "Window one key too wide",
        "The query sees window + 1 keys: its own position is not counted.",
        MASK,
        _window(1),
        "A window of 128 is the query's own position and the 127 before it: distance < window.",
        ("mlx-lm #390", "mlx-swift-lm #39", "Megatron-Bridge #2656"),
        has_window,
        _past_window,
    ),
    Mistake(
        "window-one-less",
        "Window one key too narrow",
        "The query sees window - 1 keys.",
        MASK,
        _window(-1),
        "A window of 128 is the query's own position and the 127 before it: distance < window.",
        ("Megatron-Bridge #2656",),
        has_window,
        lambda config: past_window(config, 0),
    ),
    Mistake(
        "window-missing",
        "Sliding window missing",
        "Windowed layers see every key.",
        MASK,
        _window_missing,
        "Hide keys that are a window or more back on the layers that layer_types says.",
        ("transformers #39408, #29623", "vLLM #3385, #4380", "SGLang #30050"),
        has_window,
        _past_window,
    ),
    Mistake(
        "window-on-all-layers",
        "Sliding window on all layers",
        "Full layers are windowed too.",
        MASK,
        configure(layer_types=lambda config: ("sliding_attention",) * config.num_hidden_layers),
        "Follow layer_types: in gpt-oss every other layer sees everything.",
        ("zml #763", "transformers #29176"),
        is_gpt_oss,
        _past_window,
    ),
    Mistake(
        "window-on-other-layers",
        "Sliding window on the other layers",
        "Windowed and full layers are exchanged.",
        MASK,
        configure(layer_types=lambda config: tuple(KINDS[kind] for kind in config.layer_types)),
        "In gpt-oss the even layers are windowed, counted from 0.",
        ("zml #763", "transformers #39408"),
        is_gpt_oss,
        _past_window,
    ),
    Mistake(
        "causal-mask-missing",
        "Causal mask missing",
        "Queries see later keys of their own chunk.",
        MASK,
        exchange(mask=_causal_missing),
        "Hide keys after the query's own position, in prefill too.",
        needs=lambda config: Needs(tokens=2),
    ),
    Mistake(
        "own-key-masked",
        "A query does not see its own key",
        "The causal comparison is strict.",
        MASK,
        exchange(mask=_own_key_masked),
        "Let a query see keys up to and including its own position.",
        ("mlxcel #412, #418",),
        needs=lambda config: Needs(tokens=2),
    ),
    Mistake(
        "first-key-masked",
        "The first key is hidden",
        "Position 0 is treated as padding.",
        MASK,
        exchange(mask=_first_key_masked),
        "Do not take token 0, or a BOS, for padding.",
        needs=lambda config: Needs(tokens=2),
    ),
    Mistake(
        "cached-keys-skipped",
        "Cached keys skipped",
        "A chunk sees only itself: keys before its start are left out.",
        MASK,
        exchange(mask=_cached_skipped),
        "Start the loop over keys at the window's first key, not at the chunk's start.",
        ("openai/gpt-oss #163, PR #196", "vLLM #30887", "VeloxQuant #389", "flashinfer #847"),
        needs=SECOND_CHUNK,
    ),
    Mistake(
        "mask-from-chunk-start",
        "Mask counted from the chunk's start",
        "The causal mask takes the query's place within the chunk for its position.",
        MASK,
        exchange(mask=_mask_from_chunk),
        "Add the number of cached positions to the query's index in the mask.",
        ("ik_llama.cpp #2087",),
        needs=SECOND_CHUNK,
    ),
    Mistake(
        "cache-rolled",
        "Cached values one position late",
        "Values of earlier chunks stand one slot after their keys, as when a ring is written before it is read.",
        ("attn_heads",),
        _rolled(1),
        "Write keys and values to the same slot, position mod capacity.",
        ("transformers #37574", "mistral.rs #246, #994"),
        needs=lambda config: Needs(tokens=3, chunks=2),
    ),
    Mistake(
        "cache-rolled-back",
        "Cached values one position early",
        "Values of earlier chunks stand one slot before their keys.",
        ("attn_heads",),
        _rolled(-1),
        "Write keys and values to the same slot, position mod capacity.",
        ("transformers #37574", "mistral.rs #246, #994"),
        needs=lambda config: Needs(tokens=3, chunks=2),
    ),
    Mistake(
        "cache-ring-rolled",
        "A windowed cache's values rolled within its ring",
        "Of the window - 1 positions that a windowed layer's cache keeps, the values stand one slot after their keys, "
        "the newest value in the oldest slot.",
        ("attn_heads",),
        _rolled(1, within_window=True),
        "Roll or trim keys and values alike when the ring wraps.",
        ("transformers #37574", "mistral.rs #246, #994"),
        has_window,
        lambda config: Needs(tokens=past_window(config).tokens + 1, chunks=2),
    ),
)
