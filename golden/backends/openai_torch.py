"""OpenAI's own torch model of gpt-oss as a backend: its classes, run on the CPU, filled with a checkpoint's weights.

The model is `gpt_oss/torch/model.py` of the package gpt-oss, as it is: `pip install --no-deps gpt-oss` (its
release asks for Python 3.12 for the sake of its tools; this file needs torch alone). It has no cache: chunks are
run as one sequence. Taps are what its modules and functions take and return.
"""

import contextlib
import importlib.metadata
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from gpt_oss.torch import model as gpt_oss

from assay.golden.backends import Progress
from assay.golden.errors import GoldenError
from assay.loaders.checkpoint import Checkpoint
from assay.reference.config import GptOssConfig, YarnScaling
from assay.reference.taps import Recorder

_EPS, _ALPHA = 1e-5, 1.702  # what the model has fixed
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class OpenAiTorchBackend:
    """`gpt_oss.torch.model.Transformer` in bfloat16, as released, or with everything widened to float32."""

    name = "openai-torch"

    def __init__(self, checkpoint: Checkpoint, mode: str):
        if not isinstance(checkpoint.config, GptOssConfig):
            raise GoldenError("backend 'openai-torch' runs gpt-oss only", where=checkpoint.path)
        self.profile = f"openai-torch-{mode}"
        self.versions = {"gpt-oss": importlib.metadata.version("gpt-oss"), "torch": torch.__version__}
        self.config = checkpoint.config
        with torch.device("cpu"):
            self.model = gpt_oss.Transformer(_config(checkpoint.config), torch.device("cpu")).eval()
        self.model.to(_DTYPES[mode])
        _fill(self.model, checkpoint)
        self._record: Callable[[str, np.ndarray], np.ndarray] | None = None
        self._layer = 0
        self._hook()

    def run(
        self, tokens: list[int], chunks: list[int], names: Collection[str], progress: Progress = None
    ) -> Mapping[str, np.ndarray]:
        recorder = self._record = Recorder(self.config, names, progress)
        try:
            with torch.inference_mode(), self._functions_watched():
                self.model(torch.tensor(tokens))
        finally:
            self._record = None
        return recorder.values

    def _note(self, name: str, tensor: torch.Tensor) -> None:
        if self._record is not None:
            dtype = torch.float32 if tensor.is_floating_point() else torch.int64
            self._record(name, tensor.detach().to(dtype).numpy().copy())

    def _in_layer(self, name: str, tensor: torch.Tensor) -> None:
        self._note(f"layers.{self._layer}.{name}", tensor)

    def _hook(self) -> None:
        def after(module: torch.nn.Module, name: str) -> None:
            module.register_forward_hook(lambda module, inputs, output: self._note(name, output))

        def enters(i: int) -> Callable[..., None]:
            def hook(module: torch.nn.Module, inputs: Any) -> None:
                self._layer = i

            return hook

        after(self.model.embedding, "embed")
        after(self.model.norm, "final_norm")
        after(self.model.unembedding, "logits")
        for i, block in enumerate(self.model.block):
            block.register_forward_pre_hook(enters(i))
            after(block.attn.norm, f"layers.{i}.attn_norm")
            block.attn.qkv.register_forward_hook(self._projected)
            block.attn.rope.register_forward_hook(self._rotated)
            block.attn.out.register_forward_hook(self._attended)
            after(block.attn, f"layers.{i}.attn_residual")
            after(block.mlp.norm, f"layers.{i}.mlp_norm")
            after(block.mlp.gate, f"layers.{i}.router_logits")
            after(block, f"layers.{i}.block_out")

    def _projected(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        dims, C = self.config.dims, self.config.head_dim
        for name, piece in zip("qkv", output.split([dims[heads] * C for heads in "HKK"], dim=-1), strict=True):
            self._in_layer(name, piece.unflatten(-1, (-1, C)))

    def _rotated(self, module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        for name, turned in zip(("q_rope", "k_rope"), output, strict=True):
            self._in_layer(name, turned.reshape(len(turned), -1, self.config.head_dim))

    def _attended(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self._in_layer("attn_heads", inputs[0].unflatten(-1, (-1, self.config.head_dim)))
        self._in_layer("attn_out", output)

    @contextlib.contextmanager
    def _functions_watched(self) -> Iterator[None]:
        """Between modules: what the experts' part of the model's own functions are called with and return."""
        topk, softmax, einsum, swiglu = torch.topk, torch.nn.functional.softmax, torch.einsum, gpt_oss.swiglu

        def noted_topk(*args: Any, **kwargs: Any) -> Any:
            chosen = topk(*args, **kwargs)
            self._in_layer("expert_ids", chosen.indices)
            return chosen

        def noted_softmax(*args: Any, **kwargs: Any) -> torch.Tensor:
            weights = softmax(*args, **kwargs)
            self._in_layer("expert_weights", weights)
            return weights

        def noted_swiglu(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            act = swiglu(x, **kwargs)
            self._in_layer("expert_gate", x[..., ::2])
            self._in_layer("expert_up", x[..., 1::2])
            self._in_layer("expert_act", act)
            return act

        def noted_einsum(equation: str, *operands: torch.Tensor) -> torch.Tensor:
            result = einsum(equation, *operands)
            if equation == "bec,be->bc":
                self._in_layer("expert_out", operands[0])
                self._in_layer("mlp_out", result)
            return result

        gpt_oss.swiglu, torch.topk, torch.einsum = noted_swiglu, noted_topk, noted_einsum
        torch.nn.functional.softmax = noted_softmax
        try:
            yield
        finally:
            gpt_oss.swiglu, torch.topk, torch.einsum = swiglu, topk, einsum
            torch.nn.functional.softmax = softmax


def _config(config: GptOssConfig) -> Any:
    """The model's own record; GoldenError for what it has fixed and the checkpoint has otherwise."""
    scaling = config.rope_scaling
    kinds = tuple("full_attention" if i % 2 else "sliding_attention" for i in range(config.num_hidden_layers))
    fixed = {
        "rms_norm_eps": (config.rms_norm_eps, _EPS),
        "swiglu_alpha": (config.swiglu_alpha, _ALPHA),
        "layer_types": (config.layer_types, kinds),
        "attention_bias": (config.attention_bias, True),
        "tie_word_embeddings": (config.tie_word_embeddings, False),
        "rope_scaling.truncate": (isinstance(scaling, YarnScaling) and scaling.truncate, False),
    }
    for name, (got, wanted) in fixed.items():
        if got != wanted:
            raise GoldenError(f"OpenAI's torch model has {name} fixed", expected=wanted, got=got)
    if not isinstance(scaling, YarnScaling):
        raise GoldenError("OpenAI's torch model needs YaRN", got=scaling)
    return gpt_oss.ModelConfig(
        num_hidden_layers=config.num_hidden_layers,
        num_experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        swiglu_limit=config.swiglu_limit,
        head_dim=config.head_dim,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        sliding_window=config.sliding_window,
        initial_context_length=scaling.original_max_position_embeddings,
        rope_theta=config.rope_theta,
        rope_scaling_factor=scaling.factor,
        rope_ntk_alpha=scaling.beta_slow,
        rope_ntk_beta=scaling.beta_fast,
    )


def _fill(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """The model's parameters from canonical tensors: q, k and v as one, gate and up as alternate rows of one."""

    def stored(name: str) -> torch.Tensor:
        return torch.from_numpy(checkpoint.tensors[name].decode())

    values = {
        "embedding.weight": stored("model.embed_tokens.weight"),
        "norm.scale": stored("model.norm.weight"),
        "unembedding.weight": stored("lm_head.weight"),
    }
    for i in range(checkpoint.config.num_hidden_layers):
        ours, theirs = f"model.layers.{i}", f"block.{i}"
        attention, experts = f"{ours}.self_attn", f"{ours}.mlp.experts"
        values[f"{theirs}.attn.norm.scale"] = stored(f"{ours}.input_layernorm.weight")
        values[f"{theirs}.attn.sinks"] = stored(f"{attention}.sinks")
        values[f"{theirs}.mlp.norm.scale"] = stored(f"{ours}.post_attention_layernorm.weight")
        for what in ("weight", "bias"):
            values[f"{theirs}.attn.qkv.{what}"] = torch.cat([stored(f"{attention}.{x}_proj.{what}") for x in "qkv"])
            values[f"{theirs}.attn.out.{what}"] = stored(f"{attention}.o_proj.{what}")
            values[f"{theirs}.mlp.gate.{what}"] = stored(f"{ours}.mlp.router.{what}")
            pair = [stored(f"{experts}.{name}_proj.{what}") for name in ("gate", "up")]
            values[f"{theirs}.mlp.mlp1_{what}"] = torch.stack(pair, dim=2).flatten(1, 2)
            values[f"{theirs}.mlp.mlp2_{what}"] = stored(f"{experts}.down_proj.{what}")
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(values)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


open_backend = OpenAiTorchBackend
