"""Llama and gpt-oss through MLX: the forward pass in the oracle's order and with its taps.

Arrays carry a batch axis B of sequences of equal length. MLX is lazy: a pass builds a graph, which runs when its
result is asked for. A tap asks for a result early and changes nothing of what is computed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from assay.fast.engine import Observer
from assay.fast.inputs import checked_tokens
from assay.fast.metal.cache import LayerCache, MetalCache, visible_keys
from assay.fast.metal.ops import clamped_swiglu, expert_weights, rms_norm, swiglu, top_k, weighted_sum
from assay.fast.metal.rope import Rotation
from assay.fast.metal.weights import Layer, cast_weights
from assay.reference.config import Config, GptOssConfig
from assay.reference.weights import Tensor

MODES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
SORTED_FROM = 64  # (token, expert) pairs from which on it pays to bring those of an expert together

Show = Callable[[str, mx.array], None]
Mask: TypeAlias = "mx.array | str | None"


class MetalModel:
    """A model on MLX's default device; `mode` is the dtype of activations, keys and values.

    Sums are float32 in either mode. Quantised weights stay as they are stored; `notices` says what could not.
    """

    def __init__(self, config: Config, tensors: Mapping[str, Tensor], mode: str = "float32") -> None:
        """Check the weights and hand them to MLX; raises CheckpointError where they do not fit the configuration.

        Raises ValueError for an unknown mode.
        """
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
        self.config, self.mode = config, mode
        self.dtype = MODES[mode]
        self._weights = cast_weights(config, tensors, self.dtype)
        self._rotate = Rotation(config)
        self.notices = self._weights.notices

    def new_cache(self) -> MetalCache:
        """An empty cache for one sequence, or for a batch."""
        return MetalCache(self.config)

    def forward(
        self, tokens: np.ndarray, *, cache: MetalCache | None = None, tap: Observer | None = None
    ) -> np.ndarray:
        """Logits, float32 [T,V], of T tokens that follow those in the cache, which grows by them.

        `tap` is shown every tensor of the tap table except attn_scores and attn_weights, which MLX's
        attention does not hand out. A pass that raises leaves the cache as it was. Raises ValueError for tokens
        that are no row of ids within the vocabulary or do not fit the context, and for another model's cache.
        """
        cache = self._own(cache)
        return self._logits(self._rows([tokens], cache), cache, _showing(tap))[0]

    def forward_batch(self, tokens: np.ndarray, *, cache: MetalCache | None = None) -> np.ndarray:
        """Logits, float32 [B,T,V], of B sequences of T tokens each; otherwise as `forward`.

        Raises ValueError for sequences of unequal length, and for a cache of another number of sequences.
        """
        cache = self._own(cache)
        return self._logits(self._rows(tokens, cache), cache, _nothing)

    def greedy(self, tokens: np.ndarray, *, cache: MetalCache | None = None) -> Iterator[int]:
        """Yield the most likely token until the context is full; the device works on the next while one is used.

        So the cache is always one token ahead of what was yielded.
        """
        cache = self._own(cache)
        return (int(token_B[0]) for token_B in self._greedy(self._rows([tokens], cache), cache))

    def greedy_batch(self, tokens: np.ndarray, *, cache: MetalCache | None = None) -> Iterator[np.ndarray]:
        """Yield the most likely tokens [B] of B sequences of T tokens each; else as `greedy` and `forward_batch`."""
        cache = self._own(cache)
        return self._greedy(self._rows(tokens, cache), cache)

    def _rows(self, tokens: Iterable[np.ndarray], cache: MetalCache) -> np.ndarray:
        """Sequences of equal length, checked: [B,T]."""
        rows = [checked_tokens(self.config, row, cache.length) for row in tokens]
        lengths = sorted({len(row) for row in rows})
        if len(lengths) != 1:
            raise ValueError(f"a batch must be sequences of one length, got lengths {lengths}")
        if cache.sequences not in (None, len(rows)):
            raise ValueError(f"the cache holds {cache.sequences} sequences, got tokens of {len(rows)}")
        return np.stack(rows)

    def _greedy(self, token_BT: np.ndarray, cache: MetalCache) -> Iterator[np.ndarray]:
        prompt_BT = mx.array(token_BT)
        if prompt_BT.shape[1] > 1:
            # of all but the last token only keys and values are wanted: what is not asked for MLX never computes
            self._body(prompt_BT[:, :-1], cache, _nothing)
            _commit(cache, prompt_BT.shape[1] - 1)
            mx.async_eval(cache.arrays)
        token_B = self._next(prompt_BT[:, -1:], cache)
        while cache.length < self.config.max_position_embeddings:
            following_B = self._next(token_B[:, None], cache)
            yield np.array(token_B)
            token_B = following_B
        yield np.array(token_B)

    def _own(self, cache: MetalCache | None) -> MetalCache:
        cache = self.new_cache() if cache is None else cache
        if cache.config != self.config:
            raise ValueError("the cache was made for a model of another configuration")
        return cache

    def _logits(self, token_BT: np.ndarray, cache: MetalCache, show: Show) -> np.ndarray:
        logits_BTV = self._weights.head(self._body(mx.array(token_BT), cache, show))
        show("logits", logits_BTV)
        _commit(cache, token_BT.shape[1])
        logits_BTV = logits_BTV.astype(mx.float32)
        mx.eval(logits_BTV, cache.arrays)
        return np.array(logits_BTV)

    def _next(self, token_BT: mx.array, cache: MetalCache) -> mx.array:
        """The most likely token [B] after one more, under way."""
        x_B1D = self._body(token_BT, cache, _nothing)
        token_B = mx.argmax(self._weights.head(x_B1D[:, 0]), axis=-1)
        _commit(cache, 1)
        mx.async_eval(token_B, cache.arrays)
        return token_B

    def _body(self, token_BT: mx.array, cache: MetalCache, show: Show) -> mx.array:
        """final_norm [B,T,D]."""
        config, weights = self.config, self._weights
        start, T = cache.length, token_BT.shape[1]
        masks = {window: visible_keys(window, start, T) for window in {layer.window for layer in cache.layers}}
        x = weights.embed.rows(token_BT).astype(self.dtype)
        show("embed", x)
        for i, layer in enumerate(weights.layers):
            in_layer = show if show is _nothing else lambda name, array, i=i: show(f"layers.{i}.{name}", array)
            past = cache.layers[i]
            x = block(x, layer, config, self._rotate, past, masks[past.window], in_layer)
        x = rms_norm(x, weights.final_norm, config.rms_norm_eps)
        show("final_norm", x)
        return x


def block(
    x: mx.array, layer: Layer, config: Config, rotate: Rotation, past: LayerCache, mask: Mask, show: Show
) -> mx.array:
    """One layer: [B,T,D] -> [B,T,D]."""
    h = rms_norm(x, layer.attn_norm, config.rms_norm_eps)
    show("attn_norm", h)
    x = x + attention(h, layer, config, rotate, past, mask, show)
    show("attn_residual", x)
    h = rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
    show("mlp_norm", h)
    mlp_out = mixture_of_experts(h, layer, config, show) if isinstance(config, GptOssConfig) else dense(h, layer, show)
    show("mlp_out", mlp_out)
    x = x + mlp_out
    show("block_out", x)
    return x


def attention(
    x: mx.array, layer: Layer, config: Config, rotate: Rotation, past: LayerCache, mask: Mask, show: Show
) -> mx.array:
    """Attention: [B,T,D] -> [B,T,D]."""
    B, T, _ = x.shape
    H, K, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = layer.q(x).reshape(B, T, H, C), layer.k(x).reshape(B, T, K, C), layer.v(x).reshape(B, T, K, C)
    show("q", q)
    show("k", k)
    show("v", v)
    # each by itself: of a prompt's last layer MLX then computes no queries, for nothing asks for them
    q, k, v = rotate(q.swapaxes(1, 2), past.length), rotate(k.swapaxes(1, 2), past.length), v.swapaxes(1, 2)
    show("q_rope", q.swapaxes(1, 2))
    show("k_rope", k.swapaxes(1, 2))
    k, v = past.extend(k, v)
    heads = mx.fast.scaled_dot_product_attention(q, k, v, scale=C**-0.5, mask=mask, sinks=layer.sinks)
    heads = heads.swapaxes(1, 2)
    show("attn_heads", heads)
    out = layer.o(heads.reshape(B, T, H * C))
    show("attn_out", out)
    return out


def dense(x: mx.array, layer: Layer, show: Show) -> mx.array:
    """Llama's feed-forward: [B,T,D] -> [B,T,D]."""
    gate, up = layer.gate(x), layer.up(x)
    show("gate", gate)
    show("up", up)
    act = swiglu(gate, up)
    show("act", act)
    return layer.down(act)


def mixture_of_experts(x: mx.array, layer: Layer, config: GptOssConfig, show: Show) -> mx.array:
    """gpt-oss's feed-forward: [B,T,D] -> [B,T,D]."""
    assert layer.router is not None
    B, T, D = x.shape
    A = config.num_experts_per_tok
    logits = layer.router(x)
    show("router_logits", logits)
    ids = top_k(logits, A)
    show("expert_ids", ids)
    weights = expert_weights(logits, ids)
    show("expert_weights", weights)
    # one row for each (token, expert) pair, those of an expert together if that pays
    chosen, rows = ids.flatten(), mx.arange(B * T * A)
    in_order = B * T * A >= SORTED_FROM
    place = rows
    if in_order:
        rows = mx.argsort(chosen)
        place, chosen = mx.argsort(rows), chosen[rows]
    by_token = lambda y: y[place].reshape(B, T, A, -1)  # noqa: E731
    x_P1D = x.reshape(B * T, 1, D)[rows // A]
    gate, up = layer.gate.by_expert(x_P1D, chosen, in_order), layer.up.by_expert(x_P1D, chosen, in_order)
    show("expert_gate", by_token(gate))
    show("expert_up", by_token(up))
    act = clamped_swiglu(gate, up, config.swiglu_alpha, config.swiglu_limit)
    show("expert_act", by_token(act))
    out = by_token(layer.down.by_expert(act, chosen, in_order))
    show("expert_out", out)
    return weighted_sum(weights, out)


def _commit(cache: MetalCache, T: int) -> None:
    for layer in cache.layers:
        layer.commit(T)


def _nothing(name: str, array: mx.array) -> None:
    """Shows nothing: its arguments, where they are mere views, are never computed."""


def _showing(tap: Observer | None) -> Show:
    """The tap as a function that hands on the one sequence of an array, as a read-only NumPy array."""
    if tap is None:
        return _nothing

    def show(name: str, array: mx.array) -> None:
        integer = mx.issubdtype(array.dtype, mx.integer)
        value = np.array(array[0].astype(mx.int64 if integer else mx.float32))
        value.flags.writeable = False
        tap(name, value)

    return show
