"""Llama and gpt-oss on the CPU: the forward pass over the kernels, in the oracle's order and with its taps."""

from collections.abc import Callable, Mapping

import numpy as np

from assay.fast.cpu import jit
from assay.fast.cpu.attention import attend
from assay.fast.cpu.cache import CpuCache, LayerCache
from assay.fast.cpu.groups import by_expert, one_group
from assay.fast.cpu.ops import apply_rope, clamped_swiglu, expert_weights, rms_norm, swiglu, top_k, weighted_sum
from assay.fast.cpu.rope import rotary_tables
from assay.fast.cpu.token import TokenPass, shown
from assay.fast.cpu.weights import Layer, cast_weights, project
from assay.fast.engine import Observer, products_and_cache, unobserved
from assay.fast.inputs import checked_tokens
from assay.reference.config import Config, GptOssConfig
from assay.reference.weights import Tensor

Tables = tuple[np.ndarray, np.ndarray]
KeyValue = tuple[np.ndarray, np.ndarray]
Show = Callable[[str, np.ndarray], np.ndarray]


class CpuModel:
    """A model in float32: activations and sums; weights stay encoded.

    In mode `exact`, each output is computed alike whatever else is in the chunk and however many threads there
    are, so that any chunking gives the same bits (with LongRoPE: within the original context, where the factors
    do not change on the way). Mode `q8` rounds the inputs of products with quantised weights to int8, as ggml
    does; results depend on the chunks' lengths in the last bits. Keys and values are kept in float32, in modes
    `exact-f16` and `q8-f16` in float16: half the memory, rounded as in llama.cpp's cache. `threads` None leaves
    Numba's own setting. `notices` says which weights no kernel reads.
    """

    def __init__(
        self, config: Config, tensors: Mapping[str, Tensor], *, mode: str = "exact", threads: int | None = None
    ) -> None:
        """Check and cast the weights; raises CheckpointError where they do not fit the configuration.

        Raises ValueError for an unknown mode and for more threads than there are.
        """
        products, self.cache_dtype = products_and_cache(mode)
        count = jit.checked_threads(threads)
        self.config = config
        self.threads = threads
        self._weights = cast_weights(config, tensors, products)
        self._token: TokenPass | None = None
        if self._weights.in_place:
            self._token = TokenPass(config, self._weights, count)
        self.notices = self._weights.notices

    def new_cache(self) -> CpuCache:
        """An empty cache for one sequence."""
        return CpuCache(self.config, self.cache_dtype)

    def forward(self, tokens: np.ndarray, *, cache: CpuCache | None = None, tap: Observer | None = None) -> np.ndarray:
        """Logits, float32 [T,V], of T tokens that follow those in the cache, which grows by them.

        `tap` is shown every tensor of the tap table except attn_scores and attn_weights, which the fused
        kernel does not form. A pass that raises leaves the cache as it was. Raises ValueError for tokens
        that are no row of ids within the vocabulary or do not fit the context, and for another model's cache.
        """
        cache = self.new_cache() if cache is None else cache
        if cache.config != self.config:
            raise ValueError("the cache was made for a model of another configuration")
        token_T = checked_tokens(self.config, tokens, cache.length)
        with jit.threads(self.threads):
            if in_one_kernel(len(token_T)) and self._token is not None:
                return self._one_token(self._token, int(token_T[0]), cache, tap or unobserved)
            return self._forward(token_T, cache, tap or unobserved)

    def _one_token(self, run: TokenPass, token: int, cache: CpuCache, tap: Observer) -> np.ndarray:
        traced = tap is not unobserved
        logits_TV, taps = run(token, cache, rotary_tables(self.config, cache.length, 1), traced)
        if traced:
            show = _showing(tap)
            for name, array in shown(self.config, taps):
                show(name, array)
        cache.count_one()
        return logits_TV

    def _forward(self, token_T: np.ndarray, cache: CpuCache, tap: Observer) -> np.ndarray:
        weights, config, show = self._weights, self.config, _showing(tap)
        tables = rotary_tables(config, cache.length, len(token_T))
        x_TD = show("embed", weights.embed.decoded(token_T))
        fresh = []
        for i, layer in enumerate(weights.layers):
            x_TD, kv = block(x_TD, layer, config, tables, cache.layers[i], _showing(tap, f"layers.{i}."))
            fresh.append(kv)
        x_TD = show("final_norm", rms_norm(x_TD, weights.final_norm, config.rms_norm_eps))
        logits_TV = show("logits", weights.head(x_TD))
        for past, (k_TKC, v_TKC) in zip(cache.layers, fresh, strict=True):
            past.append(k_TKC, v_TKC)
        return logits_TV


def in_one_kernel(T: int) -> bool:
    """Whether a chunk takes the whole model in one compiled function; longer ones are compiled step by step."""
    return T == 1


def block(
    x_TD: np.ndarray, layer: Layer, config: Config, tables: Tables, past: LayerCache, show: Show
) -> tuple[np.ndarray, KeyValue]:
    """One layer, [T,D] -> [T,D], and the keys and values that it adds to the past."""
    h_TD = show("attn_norm", rms_norm(x_TD, layer.attn_norm, config.rms_norm_eps))
    attn_out_TD, kv = attention(h_TD, layer, config, tables, past, show)
    x_TD = show("attn_residual", x_TD + attn_out_TD)
    h_TD = show("mlp_norm", rms_norm(x_TD, layer.mlp_norm, config.rms_norm_eps))
    if isinstance(config, GptOssConfig):
        mlp_out_TD = mixture_of_experts(h_TD, layer, config, show)
    else:
        mlp_out_TD = dense(h_TD, layer, show)
    return show("block_out", x_TD + show("mlp_out", mlp_out_TD)), kv


def attention(
    x_TD: np.ndarray, layer: Layer, config: Config, tables: Tables, past: LayerCache, show: Show
) -> tuple[np.ndarray, KeyValue]:
    """Attention, [T,D] -> [T,D], and the chunk's keys (after RoPE) and values."""
    T, C = len(x_TD), config.head_dim
    projected = project((layer.q, layer.k, layer.v), one_group(T), x_TD)
    q_THC, k_TKC, v_TKC = (show(name, y.reshape(T, -1, C)) for name, y in zip("qkv", projected, strict=True))
    q_THC = show("q_rope", apply_rope(q_THC, *tables))
    k_TKC = show("k_rope", apply_rope(k_TKC, *tables))
    heads_THC = show("attn_heads", attend(q_THC, k_TKC, v_TKC, past, layer.sinks))
    return show("attn_out", layer.o(heads_THC.reshape(T, -1))), (k_TKC, v_TKC)


def dense(x_TD: np.ndarray, layer: Layer, show: Show) -> np.ndarray:
    """Llama's feed-forward: [T,D] -> [T,D]."""
    gate_TF, up_TF = project((layer.gate, layer.up), one_group(len(x_TD)), x_TD)
    show("gate", gate_TF)
    show("up", up_TF)
    return layer.down(show("act", swiglu(gate_TF, up_TF)))


def mixture_of_experts(x_TD: np.ndarray, layer: Layer, config: GptOssConfig, show: Show) -> np.ndarray:
    """gpt-oss's feed-forward, tokens grouped by expert: [T,D] -> [T,D]."""
    assert layer.router is not None
    logits_TN = show("router_logits", layer.router(x_TD))
    ids_TA = show("expert_ids", top_k(logits_TN, config.num_experts_per_tok))
    weights_TA = show("expert_weights", expert_weights(logits_TN, ids_TA))
    from_token = by_expert(ids_TA)
    from_pair = from_token._replace(x_row=from_token.y_row)  # each chosen expert has its own input now
    T, A = ids_TA.shape
    gate, up = project((layer.gate, layer.up), from_token, x_TD)
    gate_TAF = show("expert_gate", gate.reshape(T, A, -1))
    up_TAF = show("expert_up", up.reshape(T, A, -1))
    act_TAF = show("expert_act", clamped_swiglu(gate_TAF, up_TAF, config.swiglu_alpha, config.swiglu_limit))
    out_TAD = project([layer.down], from_pair, act_TAF.reshape(T * A, -1))[0].reshape(T, A, -1)
    return weighted_sum(weights_TA, show("expert_out", out_TAD))


def _showing(tap: Observer, prefix: str = "") -> Show:
    """The tap as a function that hands on a read-only view and answers the array itself."""

    if tap is unobserved:
        return lambda name, array: array

    def show(name: str, array: np.ndarray) -> np.ndarray:
        view = array.view()
        view.flags.writeable = False
        tap(prefix + name, view)
        return array

    return show
