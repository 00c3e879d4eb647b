"""mlx-lm as a backend: taps from the modules of a model that it loaded, none of its code edited.

In that one model every module with something to show is replaced by itself with an ear on it. What is computed
between modules (attn_scores, attn_weights, expert_weights) is absent.
"""

import importlib.metadata
import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from assay.fast.mlx_support import require_mlx
from assay.golden.backends import KNOWN, Progress
from assay.golden.errors import GoldenError
from assay.loaders.checkpoint import Checkpoint
from assay.reference.config import GptOssConfig
from assay.reference.taps import Recorder

require_mlx("mlx-lm", KNOWN["mlx-lm"].install)

import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

Ear = Callable[[tuple[Any, ...], mx.array], None]  # told a call's arguments and its result


class Overheard:
    """A module that tells an ear of each call; everything else about it is the module's own."""

    def __init__(self, module: Any, ear: Ear):
        self._module, self._ear = module, ear

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        result = self._module(*arguments, **keywords)
        self._ear(arguments, result)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class MlxLmBackend:
    """A model of mlx-lm, its parameters cast to float32 or bfloat16, on MLX's default device."""

    name = "mlx-lm"

    def __init__(self, checkpoint: Checkpoint, mode: str, model: Any = None):
        on_cpu = mx.default_device().type == mx.cpu
        self.profile = f"mlx-lm-{mode}" if on_cpu else f"mlx-lm-gpu-{mode}"
        self.versions = {"mlx-lm": importlib.metadata.version("mlx-lm"), "mlx": importlib.metadata.version("mlx")}
        self.config = checkpoint.config
        self.model = _load(checkpoint, mode) if model is None else model
        self._record: Callable[[str, np.ndarray], np.ndarray] | None = None
        self._listen()

    def run(
        self, tokens: list[int], chunks: list[int], names: Collection[str], progress: Progress = None
    ) -> Mapping[str, np.ndarray]:
        recorder = self._record = Recorder(self.config, names, progress)
        cache, start = make_prompt_cache(self.model), 0
        try:
            for T in chunks:
                self._note("logits", self.model(mx.array([tokens[start : start + T]]), cache=cache)[0])
                start += T
        finally:
            self._record = None
        return recorder.values

    def _note(self, name: str, array: mx.array) -> None:
        if self._record is not None:
            integer = mx.issubdtype(array.dtype, mx.integer)
            self._record(name, np.array(array.astype(mx.int64 if integer else mx.float32)))

    def _output(self, name: str, heads: bool = False) -> Ear:
        """Notes a result [1,T,X] as [T,X], or as [T,heads,C]."""
        return lambda arguments, result: self._note(name, self._in_heads(result[0]) if heads else result[0])

    def _in_heads(self, array: mx.array) -> mx.array:
        return array.reshape(*array.shape[:-1], -1, self.config.head_dim)

    def _listen(self) -> None:
        body = self.model.model
        body.embed_tokens = Overheard(body.embed_tokens, self._output("embed"))
        body.norm = Overheard(body.norm, self._output("final_norm"))
        for i, layer in enumerate(body.layers):
            prefix = f"layers.{i}"
            layer.input_layernorm = Overheard(layer.input_layernorm, self._output(f"{prefix}.attn_norm"))
            self._listen_to_attention(layer.self_attn, prefix)
            layer.post_attention_layernorm = Overheard(
                layer.post_attention_layernorm, self._both(f"{prefix}.attn_residual", f"{prefix}.mlp_norm")
            )
            if isinstance(self.config, GptOssConfig):
                self._listen_to_experts(layer.mlp, prefix)
            else:
                self._listen_to_dense(layer.mlp, prefix)
            layer.mlp = Overheard(layer.mlp, self._output(f"{prefix}.mlp_out"))
            body.layers[i] = Overheard(layer, self._output(f"{prefix}.block_out"))

    def _both(self, before: str, after: str) -> Ear:
        """Notes a call's first argument and its result."""

        def ear(arguments: tuple[Any, ...], result: mx.array) -> None:
            self._note(before, arguments[0][0])
            self._note(after, result[0])

        return ear

    def _pieces(self, names: list[str], sizes: list[int], heads: bool = False) -> Ear:
        """Notes the pieces of a fused projection's result."""

        def ear(arguments: tuple[Any, ...], result: mx.array) -> None:
            for name, piece in zip(names, mx.split(result[0], np.cumsum(sizes)[:-1].tolist(), axis=-1), strict=True):
                self._note(name, self._in_heads(piece) if heads else piece)

        return ear

    def _listen_to_attention(self, attention: Any, prefix: str) -> None:
        C = self.config.head_dim
        if hasattr(attention, "qkv_proj"):
            sizes = [self.config.dims[heads] * C for heads in "HKK"]
            attention.qkv_proj = Overheard(
                attention.qkv_proj, self._pieces([f"{prefix}.{x}" for x in "qkv"], sizes, heads=True)
            )
        else:
            for x in "qkv":
                projection = getattr(attention, f"{x}_proj")
                setattr(attention, f"{x}_proj", Overheard(projection, self._output(f"{prefix}.{x}", heads=True)))
        turn = itertools.cycle(("q_rope", "k_rope"))  # it turns the queries first

        def rope_ear(arguments: tuple[Any, ...], result: mx.array) -> None:
            self._note(f"{prefix}.{next(turn)}", result[0].swapaxes(0, 1))  # [1,H,T,C] -> [T,H,C]

        def out_ear(arguments: tuple[Any, ...], result: mx.array) -> None:
            self._note(f"{prefix}.attn_heads", self._in_heads(arguments[0][0]))
            self._note(f"{prefix}.attn_out", result[0])

        attention.rope = Overheard(attention.rope, rope_ear)
        attention.o_proj = Overheard(attention.o_proj, out_ear)

    def _listen_to_dense(self, mlp: Any, prefix: str) -> None:
        if hasattr(mlp, "gate_up_proj"):
            names, F = [f"{prefix}.gate", f"{prefix}.up"], self.config.dims["F"]
            mlp.gate_up_proj = Overheard(mlp.gate_up_proj, self._pieces(names, [F, F]))
        else:
            mlp.gate_proj = Overheard(mlp.gate_proj, self._output(f"{prefix}.gate"))
            mlp.up_proj = Overheard(mlp.up_proj, self._output(f"{prefix}.up"))
        mlp.down_proj = Overheard(mlp.down_proj, lambda arguments, result: self._note(f"{prefix}.act", arguments[0][0]))

    def _listen_to_experts(self, mlp: Any, prefix: str) -> None:
        mlp.router = Overheard(mlp.router, self._output(f"{prefix}.router_logits"))
        heard: dict[str, mx.array] = {}
        experts = mlp.experts
        for module, name in (("gate_proj", "expert_gate"), ("up_proj", "expert_up"), ("activation", "expert_act")):

            def keep(arguments: tuple[Any, ...], result: mx.array, name: str = name) -> None:
                heard[name] = result

            setattr(experts, module, Overheard(getattr(experts, module), keep))

        def experts_ear(arguments: tuple[Any, ...], result: mx.array) -> None:
            ids = arguments[1][0]
            self._note(f"{prefix}.expert_ids", ids)
            for name, array in heard.items():
                self._note(f"{prefix}.{name}", _by_token(array, ids))
            self._note(f"{prefix}.expert_out", result[0])

        mlp.experts = Overheard(experts, experts_ear)


def _by_token(array: mx.array, ids_TA: mx.array) -> mx.array:
    """Rows of (token, expert) pairs, [1,T,A,1,F] or [T*A,1,F] in the order of the experts' ids, as [T,A,F]."""
    if array.ndim == 3:
        array = array[mx.argsort(mx.argsort(ids_TA.flatten()))]
    return array.reshape(*ids_TA.shape, -1)


def _load(checkpoint: Checkpoint, mode: str) -> Any:
    if checkpoint.format == "gguf":
        raise GoldenError(
            "backend 'mlx-lm' reads Hugging Face and MLX directories, not GGUF",
            where=checkpoint.path,
            remedy="give such a directory with --model",
        )
    try:
        model, _ = load_model(checkpoint.path)
    except Exception as error:  # it raises what its many parts raise; whatever it is, it is mlx-lm's refusal
        version = importlib.metadata.version("mlx-lm")
        raise GoldenError(
            f"mlx-lm {version} does not load this checkpoint", where=checkpoint.path, got=error
        ) from error
    model.set_dtype(getattr(mx, mode))
    return model


open_backend = MlxLmBackend
