"""Makers of small real checkpoints: other people's tools write them, and we judge ourselves by those.

Weights are random but scaled so that every feature of the model shows in the numbers: attention is far
from uniform, routers are decisive, biases and sinks act, a small share of the gates is beyond the clamp.
Peers (torch, transformers, mlx-lm, llama.cpp) are imported where they are used: importing this module
needs none of them.
"""

import ctypes
import json
import math
import os
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.tiny_tokenizers import write_tokenizer

if TYPE_CHECKING:
    import torch

GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 1536,
    "model_type": "gpt_oss",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    # the ramp's ends are pairs 0.87 and 3.66 of 16: rounding them (truncate) changes the logits visibly
    "rope_scaling": {
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "original_max_position_embeddings": 96,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 12,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 384,
}

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 384,
}

_LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")
MISTRAL = {key: value for key, value in LLAMA.items() if key not in _LLAMA_ONLY} | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "rope_scaling": None,
    "sliding_window": 12,
    "tie_word_embeddings": False,
}

# eight pairs of a head; both sets of factors move every pair but the first, visibly, and the long one more
PHI3: dict[str, Any] = {key: value for key, value in LLAMA.items() if key not in _LLAMA_ONLY} | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "embd_pdrop": 0.0,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 24,
    "resid_pdrop": 0.0,
    "rope_scaling": {
        "long_factor": [1.0299999713897705, 1.25, 1.6, 2.2, 3.1, 4.3, 5.0, 5.4],
        "short_factor": [1.0, 1.01, 1.05, 1.1, 1.2, 1.35, 1.5, 1.6],
        "type": "longrope",
    },
    "sliding_window": 18,
    "tie_word_embeddings": False,
}
del PHI3["head_dim"]  # phi-3 has no such key: hidden_size / num_attention_heads

# Standard deviation of a matrix's entries times the square root of its input width, by the name's end. With inputs of
# unit size, queries and keys score about +-2, routers about +-2, and 2 % of the experts' gates exceed the limit 7.
MATRIX_GAIN = {
    "embed_tokens.weight": 3.0,
    "lm_head.weight": 3.0,
    "q_proj.weight": 1.2,
    "k_proj.weight": 1.2,
    "v_proj.weight": 1.0,
    "o_proj.weight": 1.0,
    "router.weight": 2.0,
    "experts.gate_up_proj": 3.0,
    "experts.down_proj": 0.2,
    "gate_proj.weight": 1.5,
    "up_proj.weight": 1.5,
    "down_proj.weight": 0.8,
}
# mean and standard deviation of everything that is not a matrix
VECTOR_SCALE = {"norm.weight": (1.0, 0.2), "sinks": (0.5, 1.0), "bias": (0.0, 0.3)}


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A well-scaled float32 tensor [*shape] that depends on nothing but its arguments."""
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    for end, gain in MATRIX_GAIN.items():
        if name.endswith(end):
            inputs = shape[-2] if ".experts." in name else shape[-1]  # transformers keeps experts as [N, in, out]
            return (noise * gain / math.sqrt(inputs)).astype(np.float32)
    mean, deviation = next(scale for end, scale in VECTOR_SCALE.items() if name.endswith(end))
    return (mean + deviation * noise).astype(np.float32)


def quantise_mxfp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """OCP MX encoding of [..., n*32]: blocks uint8 [..., n, 16], low nibble first, and scales uint8 [..., n].

    The scale's exponent is floor(log2(largest)) - 2 (OCP Microscaling Formats v1.0, section 6.3), elements
    are rounded to nearest, ties to the even code.
    """
    groups = w.reshape(*w.shape[:-1], -1, 32).astype(np.float64)
    largest = np.abs(groups).max(axis=-1)
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 3, -127)  # frexp's significand is in [1/2, 1)
    scaled = groups / np.exp2(exponent)[..., None]
    even_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = even_first[np.abs(np.abs(scaled)[..., None] - magnitudes[even_first]).argmin(axis=-1)]
    codes = (codes + 8 * np.signbit(scaled)).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent + 127).astype(np.uint8)


def gpt_oss_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> "dict[str, torch.Tensor]":
    """The tensors of a gpt-oss checkpoint in the released form, from transformers' parameter names and shapes."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        w = random_weight(name, shape, seed)
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = quantise_mxfp4(w.swapaxes(1, 2))  # [N, in, out] -> [N, out, in]
            tensors |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
        else:
            tensors[name] = torch.from_numpy(w).to(torch.bfloat16)
    return tensors


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' own parameters for a config; a tied head is left out."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    return {k: tuple(w.shape) for k, w in state.items() if k != "lm_head.weight" or not config.tie_word_embeddings}


def save_sharded(directory: Path, tensors: "dict[str, torch.Tensor]", shards: int) -> None:
    """model-0000i-of-0000n.safetensors of about equal sizes and their index; a layer may span two of them."""
    from safetensors.torch import save_file

    total, done, weight_map = sum(w.nbytes for w in tensors.values()), 0, {}
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name in sorted(tensors):
        part = min(done * shards // total, shards - 1)
        parts[part][name] = tensors[name].contiguous()
        weight_map[name] = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
        done += tensors[name].nbytes
    for part, content in enumerate(parts):
        save_file(content, directory / f"model-{part + 1:05d}-of-{shards:05d}.safetensors", metadata={"format": "pt"})
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def make_gpt_oss(
    directory: Path, *, seed: int, shards: int = 2, config_style: str = "released", **config_overrides: Any
) -> Path:
    """A random gpt-oss checkpoint as OpenAI released the model: experts in MXFP4, all else bfloat16, sharded.

    `config_style` is "released" (rope_theta and rope_scaling, as in gpt-oss-20b's config.json) or
    "transformers5" (what transformers 5 writes: rope_parameters, dtype). Overrides are config.json keys;
    those inside rope_scaling are merged into the default's.
    """
    directory = _empty_directory(directory)
    settings = _settings(GPT_OSS, config_overrides)
    settings |= write_tokenizer(directory, "gpt_oss", settings["vocab_size"])
    if "layer_types" not in settings:
        kinds = ("sliding_attention", "full_attention")
        settings["layer_types"] = [kinds[i % 2] for i in range(settings["num_hidden_layers"])]
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    settings["quantization_config"] = {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    released_only = {
        "experts_per_token": settings["num_experts_per_tok"],
        "initial_context_length": settings["rope_scaling"]["original_max_position_embeddings"],
    }
    config = _write_config(directory, settings, released_only, config_style)
    save_sharded(directory, gpt_oss_tensors(parameter_shapes(config), seed), shards)
    return directory


def make_llama(
    directory: Path,
    *,
    seed: int,
    architecture: str = "llama",
    dtype: str = "bfloat16",
    config_style: str = "released",
    **config_overrides: Any,
) -> Path:
    """A random Llama or Mistral checkpoint in one safetensors file of bfloat16 or float32 weights."""
    import torch
    from safetensors.torch import save_file

    directory = _empty_directory(directory)
    settings = _settings({"llama": LLAMA, "mistral": MISTRAL}[architecture], config_overrides)
    settings |= write_tokenizer(directory, "llama", settings["vocab_size"])
    settings["torch_dtype"] = dtype
    config = _write_config(directory, settings, {}, config_style)
    tensors = {
        name: torch.from_numpy(random_weight(name, shape, seed)).to(getattr(torch, dtype))
        for name, shape in sorted(parameter_shapes(config).items())
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make_phi3(
    directory: Path, *, seed: int, dtype: str = "bfloat16", config_style: str = "released", **config_overrides: Any
) -> Path:
    """A random phi-3 checkpoint in one safetensors file; fused matrices are `random_weight`s one below the other."""
    import torch
    from safetensors.torch import save_file

    directory = _empty_directory(directory)
    settings = _settings(PHI3, config_overrides)
    settings |= write_tokenizer(directory, "llama", settings["vocab_size"])
    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text())
    # llama.cpp's converter takes phi-3's tokenizer for SentencePiece otherwise; Phi-4, same architecture, says so too
    _write_json(directory / "tokenizer_config.json", tokenizer_config | {"tokenizer_class": "GPT2Tokenizer"})
    settings["torch_dtype"] = dtype
    config = _write_config(directory, settings, {}, config_style)
    tensors = {
        name: torch.from_numpy(_phi3_weight(name, shape, config, seed)).to(getattr(torch, dtype))
        for name, shape in sorted(parameter_shapes(config).items())
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _phi3_weight(name: str, shape: tuple[int, ...], config: Any, seed: int) -> np.ndarray:
    """`random_weight`, a fused matrix in pieces under the names that Llama gives them."""
    rows, D = config.hidden_size // config.num_attention_heads, config.hidden_size
    q, kv, F = rows * config.num_attention_heads, rows * config.num_key_value_heads, config.intermediate_size
    fused = {"qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv}, "gate_up_proj": {"gate_proj": F, "up_proj": F}}
    for matrix, pieces in fused.items():
        if matrix in name:
            return np.concatenate([random_weight(name.replace(matrix, p), (n, D), seed) for p, n in pieces.items()])
    return random_weight(name, shape, seed)


def to_gguf(hf_directory: Path, out_file: Path, *, outtype: str = "bf16") -> Path:
    """Convert with llama.cpp's own converter, found in the source tree that ASSAY_LLAMA_CPP names.

    The converter knows pre-tokenizers by the hash of what they do to a sample text, so it cannot know that
    of a small vocabulary: a subprocess tells it the name.
    """
    tree = os.environ.get("ASSAY_LLAMA_CPP")
    if not tree:
        raise RuntimeError("set ASSAY_LLAMA_CPP to a llama.cpp source tree (the one with convert_hf_to_gguf.py)")
    model_type = json.loads((hf_directory / "config.json").read_text())["model_type"]
    pre_tokenizer = "gpt-4o" if model_type == "gpt_oss" else "llama-bpe"
    # in anything called phi3 llama.cpp looks for special tokens of the released tokenizer, and fails without them
    name = f"tiny {model_type}".replace("phi3", "phi 3")
    runner = (
        f"import sys; sys.path.insert(0, {tree!r}); import convert_hf_to_gguf as c, conversion.base as b; "
        f"b.TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre_tokenizer!r}; c.main()"
    )
    options = ["--outfile", str(out_file), "--outtype", outtype, "--model-name", name]
    command = [sys.executable, "-c", runner, str(hf_directory), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"llama.cpp's converter failed:\n{done.stderr}")
    return out_file


def quantize_gguf(source: Path, out_file: Path, type_name: str) -> Path:
    """Quantise every matrix of a GGUF file with llama.cpp: type_name is Q8_0, Q4_0 or Q4_1."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    options.pure = True  # no Q6_K for the embedding
    options.nthread = 1
    options.allow_requantize = True
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(out_file).encode(), ctypes.byref(options))
    if status:
        raise RuntimeError(f"llama_model_quantize answered {status} for {type_name}")
    return out_file


def to_mlx(
    hf_directory: Path,
    out_directory: Path,
    *,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
) -> Path:
    """Convert with mlx-lm, quantising if `q_bits` is given; gpt-oss experts stay the MXFP4 that they are."""
    from mlx_lm import convert

    quantize = q_bits is not None
    convert(str(hf_directory), str(out_directory), quantize, q_group_size, q_bits, q_mode)
    return out_directory


def transformers_model(hf_directory: Path) -> Any:
    """The checkpoint as transformers runs it in float32, MXFP4 decoded, attention in plain torch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    released = AutoConfig.from_pretrained(hf_directory).model_type == "gpt_oss"
    quantization = {"quantization_config": Mxfp4Config(dequantize=True)} if released else {}
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(hf_directory, **options, **quantization).eval()


def transformers_taps(hf_directory: Path, tokens: list[int]) -> dict[str, np.ndarray]:
    """What transformers computes in float32, by tap: embed, every block_out, final_norm [T,D], logits [T,V]."""
    import torch

    model, taps = transformers_model(hf_directory), {}

    def keep(name: str, module: Any) -> None:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            taps[name] = hidden.detach().reshape(len(tokens), -1).numpy().copy()

        module.register_forward_hook(hook)

    keep("embed", model.model.embed_tokens)
    for i, layer in enumerate(model.model.layers):
        keep(f"layers.{i}.block_out", layer)
    keep("final_norm", model.model.norm)
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return taps | {"logits": logits.numpy().copy()}


def llama_cpp_logits(gguf_file: Path, tokens: list[int]) -> np.ndarray:
    """Logits float32 [T,V] of llama.cpp on the CPU, in one batch."""
    from llama_cpp import Llama

    size = max(len(tokens), 32)
    llama = Llama(str(gguf_file), n_ctx=size, n_batch=size, n_ubatch=size, n_threads=1, logits_all=True, verbose=False)
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)])


def mlx_logits(directory: Path, tokens: list[int]) -> np.ndarray:
    """Logits float32 [T,V] of mlx-lm on the CPU, in one batch."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(directory)
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


def _empty_directory(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def _settings(defaults: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    rope = overrides.get("rope_scaling", {})
    merged = None if rope is None else {**(defaults["rope_scaling"] or {}), **rope}
    return defaults | overrides | {"rope_scaling": merged or None}


def _write_config(directory: Path, settings: dict[str, Any], released_only: dict[str, Any], style: str) -> Any:
    """Write config.json in one of its two styles; answers transformers' view of it."""
    from transformers import AutoConfig

    released = dict(sorted((settings | released_only).items()))
    _write_json(directory / "config.json", released)
    if style == "released":
        return AutoConfig.from_pretrained(directory)
    if style != "transformers5":
        raise ValueError(f"config_style is 'released' or 'transformers5', got {style!r}")
    _write_json(directory / "config.json", settings)  # without the two names that only OpenAI's file has
    config = AutoConfig.from_pretrained(directory)
    config.save_pretrained(directory)
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
