"""Hugging Face transformers as a backend: taps from module hooks and from its attention interface.

Attention runs as transformers' own eager function, called through an entry of the attention interface that
notes its arguments and result; experts run as its eager implementation, whose activation method is noted the
same way. What cannot be seen from outside (attn_scores, expert_out) is absent.
"""

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils.quantization_config import Mxfp4Config

from assay.golden.backends import Progress
from assay.golden.errors import GoldenError
from assay.golden.weights import LazyWeights
from assay.loaders.checkpoint import Checkpoint
from assay.reference.config import GptOssConfig
from assay.reference.taps import Recorder

ATTENTION = "assay_eager"


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy on the host; bfloat16 widened to float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


def _noted_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
    """The model's own eager attention; its inputs and outputs go to the module's `assay_note`."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    heads, weights = eager(module, query, key, *rest, **kwargs)
    note: Callable[[str, torch.Tensor], None] | None = getattr(module, "assay_note", None)
    if note is not None:
        T = query.shape[2]
        note("q_rope", query[0].transpose(0, 1))  # [1,H,T,C] -> [T,H,C]
        note("k_rope", key[0, :, -T:].transpose(0, 1))  # the cache's keys come first
        note("attn_weights", weights[0])
        note("attn_heads", heads[0])
    return heads, weights


class TransformersBackend:
    """A causal language model of transformers, run on the CPU in float32 or bfloat16."""

    name = "transformers"

    def __init__(self, checkpoint: Checkpoint, mode: str, model: torch.nn.Module | None = None):
        self.profile = f"transformers-{mode}"
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.config = checkpoint.config
        self._names = set(checkpoint.tensors)
        self.model: Any = _load(checkpoint, mode) if model is None else model
        self._record: Callable[[str, np.ndarray], np.ndarray] | None = None
        self._chosen: dict[int, torch.Tensor] = {}
        self._length = 0  # positions of the sequence up to the end of the chunk that runs
        self._hook()

    def run(
        self, tokens: list[int], chunks: list[int], names: Collection[str], progress: Progress = None
    ) -> Mapping[str, np.ndarray]:
        recorder = self._record = Recorder(self.config, names, progress)
        past, start = None, 0
        try:
            for T in chunks:
                ids = torch.tensor([tokens[start : start + T]])
                start += T
                self._length = start
                with torch.no_grad():
                    past = self.model(ids, past_key_values=past, use_cache=True).past_key_values
        finally:
            self._record = None
        return recorder.values

    def weights(self) -> Mapping[str, np.ndarray]:
        """What transformers decoded, by canonical name: gpt-oss's fused [N,D,2F] with gate in even columns split."""
        makers: dict[str, Callable[[], np.ndarray]] = {}

        def keep(name: str, tensor: torch.Tensor) -> None:
            makers[name] = lambda: _to_numpy(tensor)

        for name, tensor in self.model.state_dict(keep_vars=True).items():
            stem, _, kind = name.rpartition(".")
            if kind.startswith("gate_up_proj") and tensor.ndim in (2, 3) and stem.endswith("experts"):
                end = "bias" if kind.endswith("bias") else "weight"
                for at, which in enumerate(("gate", "up")):
                    half = tensor[..., at::2]
                    keep(f"{stem}.{which}_proj.{end}", half if end == "bias" else half.transpose(1, 2))
            elif kind.startswith("down_proj") and stem.endswith("experts"):
                end = "bias" if kind.endswith("bias") else "weight"
                keep(f"{stem}.down_proj.{end}", tensor if end == "bias" else tensor.transpose(1, 2))
            elif name in self._names:
                keep(name, tensor)
        return LazyWeights(makers)

    def _note(self, name: str, tensor: torch.Tensor) -> None:
        if self._record is not None:
            self._record(name, _to_numpy(tensor))

    def _note_attention(self, prefix: str, name: str, tensor: torch.Tensor) -> None:
        if name == "attn_weights":  # a sliding layer's cache has dropped the keys before the window
            tensor = torch.nn.functional.pad(tensor, (self._length - tensor.shape[-1], 0))
        self._note(f"{prefix}.{name}", tensor)

    def _after(self, module: torch.nn.Module, name: str, heads: bool = False) -> None:
        """Note a module's output [1,T,X] as [T,X], or as [T,heads,C]."""
        C = self.config.head_dim

        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            tensor = tensor[0] if tensor.ndim == 3 else tensor
            self._note(name, tensor.unflatten(-1, (-1, C)) if heads else tensor)

        module.register_forward_hook(hook)

    def _before(self, module: torch.nn.Module, name: str) -> None:
        """Note a module's input [1,T,X] as [T,X]."""
        module.register_forward_pre_hook(lambda module, inputs: self._note(name, inputs[0][0]))

    def _after_fused(self, module: torch.nn.Module, names: list[str], sizes: list[int], heads: bool = False) -> None:
        """Note the pieces of a fused projection's output [1,T,sum of sizes], each as `_after` does."""
        C = self.config.head_dim

        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            for name, piece in zip(names, output[0].split(sizes, dim=-1), strict=True):
                self._note(name, piece.unflatten(-1, (-1, C)) if heads else piece)

        module.register_forward_hook(hook)

    def _hook(self) -> None:
        body = self.model.model
        self._after(body.embed_tokens, "embed")
        self._after(body.norm, "final_norm")
        self._after(self.model.lm_head, "logits")
        for i, layer in enumerate(body.layers):
            prefix = f"layers.{i}"
            self._after(layer.input_layernorm, f"{prefix}.attn_norm")
            self._hook_projections(layer, prefix)
            layer.self_attn.assay_note = lambda name, tensor, p=prefix: self._note_attention(p, name, tensor)
            self._after(layer.self_attn.o_proj, f"{prefix}.attn_out")
            self._before(layer.post_attention_layernorm, f"{prefix}.attn_residual")
            self._after(layer.post_attention_layernorm, f"{prefix}.mlp_norm")
            if isinstance(self.config, GptOssConfig):
                self._hook_experts(layer.mlp, i)
            else:
                self._before(layer.mlp.down_proj, f"{prefix}.act")
            self._after(layer.mlp, f"{prefix}.mlp_out")
            self._after(layer, f"{prefix}.block_out")

    def _hook_projections(self, layer: Any, prefix: str) -> None:
        """q, k, v and a dense model's gate and up; phi-3 computes each group as one projection."""
        dims, C = self.config.dims, self.config.head_dim
        if self.model.config.model_type == "phi3":
            qkv, gate_up = [f"{prefix}.{name}" for name in "qkv"], [f"{prefix}.gate", f"{prefix}.up"]
            self._after_fused(layer.self_attn.qkv_proj, qkv, [dims[heads] * C for heads in "HKK"], heads=True)
            self._after_fused(layer.mlp.gate_up_proj, gate_up, [dims["F"]] * 2)
            return
        for name in "qkv":
            self._after(getattr(layer.self_attn, f"{name}_proj"), f"{prefix}.{name}", heads=True)
        if not isinstance(self.config, GptOssConfig):
            self._after(layer.mlp.gate_proj, f"{prefix}.gate")
            self._after(layer.mlp.up_proj, f"{prefix}.up")

    def _hook_experts(self, mlp: Any, i: int) -> None:
        prefix = f"layers.{i}"

        def routed(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            logits, weights, ids = output
            self._note(f"{prefix}.router_logits", logits)
            self._note(f"{prefix}.expert_ids", ids)
            self._note(f"{prefix}.expert_weights", weights)
            self._chosen[i] = ids

        mlp.router.register_forward_hook(routed)
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        activation = mlp.experts._apply_gate

        def noted_activation(gate_up: torch.Tensor) -> torch.Tensor:
            act = activation(gate_up)
            calls.append((gate_up, act))
            return act

        def experts_done(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            self._note_experts(prefix, self._chosen[i], calls)
            calls.clear()

        mlp.experts._apply_gate = noted_activation
        mlp.experts.register_forward_hook(experts_done)

    def _note_experts(self, prefix: str, ids_TA: torch.Tensor, calls: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Rows of each expert's call back to [T,A,F]: the eager loop has experts by id, tokens by (slot, position)."""
        experts = torch.unique(ids_TA)
        if len(calls) != len(experts):
            return
        F = self.config.dims["F"]
        gate, up, act = (torch.empty(*ids_TA.shape, F, dtype=calls[0][0].dtype) for _ in range(3))
        for e, (gate_up, activated) in zip(experts, calls, strict=True):
            a, t = torch.where(e == ids_TA.T)
            gate[t, a], up[t, a], act[t, a] = gate_up[:, 0::2], gate_up[:, 1::2], activated
        for name, tensor in (("expert_gate", gate), ("expert_up", up), ("expert_act", act)):
            self._note(f"{prefix}.{name}", tensor)


def _load(checkpoint: Checkpoint, mode: str) -> torch.nn.Module:
    if checkpoint.format != "safetensors":
        raise GoldenError(
            f"backend 'transformers' reads Hugging Face directories, not {checkpoint.format}",
            where=checkpoint.path,
            remedy="give the Hugging Face checkpoint with --model",
        )
    AttentionInterface.register(ATTENTION, _noted_attention)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    kwargs: dict[str, Any] = {"dtype": getattr(torch, mode), "attn_implementation": ATTENTION}
    if isinstance(checkpoint.config, GptOssConfig):
        kwargs |= {"experts_implementation": "eager"}
        if any(tensor.encoding.name == "MXFP4" for tensor in checkpoint.tensors.values()):
            kwargs |= {"quantization_config": Mxfp4Config(dequantize=True)}
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, local_files_only=True, **kwargs)
    except Exception as error:  # it raises what its many parts raise; whatever it is, it is transformers' refusal
        raise GoldenError(
            f"transformers {transformers.__version__} does not load this checkpoint", where=checkpoint.path, got=error
        ) from error
    return model.eval()


open_backend = TransformersBackend
