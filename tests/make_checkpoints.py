"""Remake every file under tests/checkpoints and the bundled golden/tiny: `python -m tests.make_checkpoints`.

Needs the peers extra and ASSAY_LLAMA_CPP, the path of a llama.cpp source tree. The same versions on the
same machine write the same bytes; on another processor the last bits of expected.safetensors may differ.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny

CHECKPOINTS = Path(__file__).parent / "checkpoints"
BUNDLED = Path(__file__).parent.parent / "golden" / "tiny"
PACKAGES = ("transformers", "torch", "safetensors", "tokenizers", "mlx", "mlx-lm", "llama-cpp-python", "numpy")
PROMPT = (
    "The river went past the mill, and nobody said why: 1953 years, 250 steps, WHAT YOU WATCH... isn't it? Caf\u00e9.\n"
)
PROMPT_LENGTH = 40  # more than three sliding windows
GPT_OSS_SEED = 11  # of the first 24, the clearest choices on the prompt: no two experts closer than 0.046 logits

README = """\
# Small checkpoints written by other people's tools

Random weights, every feature of the architecture on. `python -m tests.make_checkpoints` remakes all of it, this file
included; `manifest.json` holds the size and SHA-256 of each file.

Made with {versions}.

| where | made by | what |
|---|---|---|
| `gpt_oss/hf` | `tests.tiny.make_gpt_oss`: transformers' parameter names and shapes, safetensors \
| the released model's form: experts as MXFP4 blocks and scales, the rest bfloat16, two shards, rope_scaling as there |
| `gpt_oss/gguf` | llama.cpp's convert_hf_to_gguf | the same: experts MXFP4 blocks, matrices BF16, vectors F32 |
| `gpt_oss/mlx` | mlx_lm.convert | the same weights, gate and up split, bfloat16 and mxfp4 |
| `gpt_oss/mlx-q8` | mlx_lm.convert, 8 bits | experts mxfp4, the rest affine 8-bit in groups of 64 |
| `llama/hf` | `tests.tiny.make_llama`, as above | bfloat16, tied head, grouped-query, Llama-3 RoPE scaling |
| `llama/gguf` | llama.cpp's convert_hf_to_gguf | the same, BF16; q and k rows permuted, scaling as rope_freqs |
| `llama/gguf-q8_0`, `-q4_0`, `-q4_1` | llama_model_quantize on `llama/gguf`, pure | every matrix in that type |
| `llama/mlx-4bit` | mlx_lm.convert, 4 bits | every matrix affine 4-bit in groups of 32 |
| `mistral/hf` | `tests.tiny.make_llama` | bfloat16, untied head, sliding window of 12, config.json as transformers 5 \
writes it (rope_parameters) |
| `phi3/hf` | `tests.tiny.make_phi3` | bfloat16, untied head, fused qkv and gate_up, grouped-query, \
sliding window of 18, LongRoPE whose long factors apply from 25 positions on |
| `phi3/gguf` | llama.cpp's convert_hf_to_gguf | the same, BF16; LongRoPE's factors as two tensors |
| `*/expected.safetensors` | transformers, float32 on the CPU, eager attention, on `*/hf` | `tokens` int64 [T] of a \
fixed prompt; `embed`, `layers.i.block_out`, `final_norm` [T,D] and `logits` [T,V] float32 |

Engines that differ from the expected logits by far more than rounding, on these files or others of the same makers:

- llama.cpp and mlx-lm round the ends of YaRN's ramp, transformers does not (`gpt_oss`: NMSE 0.23);
- llama.cpp and mlx-lm ignore Mistral's sliding window (`mistral`: NMSE 0.7; without a window they agree to 1e-6);
- they ignore phi-3's too; llama.cpp takes its long factors if the context it is opened with is longer than the \
original one, mlx-lm always, transformers if the call's last position is beyond it;
- mlx-lm reads rope_theta and rope_scaling but not the rope_parameters of transformers 5: then it uses plain RoPE.
"""


def write_expected(family: Path) -> None:
    """Run transformers on FAMILY/hf and write FAMILY/expected.safetensors."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(family / "hf" / "tokenizer.json")).encode(PROMPT).ids[:PROMPT_LENGTH]
    taps = tiny.transformers_taps(family / "hf", tokens)
    save_file({"tokens": np.array(tokens, np.int64)} | taps, family / "expected.safetensors")


def make_gpt_oss(family: Path) -> None:
    """One gpt-oss in all containers."""
    hf = tiny.make_gpt_oss(family / "hf", seed=GPT_OSS_SEED, vocab_size=320)
    tiny.to_gguf(hf, _file_in(family / "gguf"))
    tiny.to_mlx(hf, family / "mlx")
    tiny.to_mlx(hf, family / "mlx-q8", q_bits=8)


def make_llama(family: Path) -> None:
    """One Llama, plain and in the quantised forms of both engines."""
    hf = tiny.make_llama(family / "hf", seed=2)
    plain = tiny.to_gguf(hf, _file_in(family / "gguf"))
    for type_name in ("Q8_0", "Q4_0", "Q4_1"):
        tiny.quantize_gguf(plain, _file_in(family / f"gguf-{type_name.lower()}"), type_name)
    tiny.to_mlx(hf, family / "mlx-4bit", q_bits=4, q_group_size=32)


def make_mistral(family: Path) -> None:
    """One Mistral with a sliding window."""
    tiny.make_llama(family / "hf", seed=3, architecture="mistral", config_style="transformers5")


def make_phi3(family: Path) -> None:
    """One phi-3 with LongRoPE and a window, as transformers and as llama.cpp have it."""
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    hf = tiny.make_phi3(family / "hf", seed=5, vocab_size=320, **shape)
    tiny.to_gguf(hf, _file_in(family / "gguf"))


def make_bundled(directory: Path) -> None:
    """The gpt-oss that the package carries for `assay demo`: square experts, as in the released models."""
    tiny.make_gpt_oss(
        directory,
        seed=1,
        hidden_size=96,
        intermediate_size=96,
        head_dim=64,
        num_hidden_layers=4,
        num_local_experts=8,
        num_experts_per_tok=4,
        sliding_window=16,
        vocab_size=384,
    )


FAMILIES: dict[str, Callable[[Path], None]] = {
    "gpt_oss": make_gpt_oss,
    "llama": make_llama,
    "mistral": make_mistral,
    "phi3": make_phi3,
}


def manifest_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a directory but the manifest itself, by relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }


def make_all(directory: Path) -> None:
    """Write every family, the README and the manifest into an existing empty directory."""
    for name, make in FAMILIES.items():
        print(f"{name} ...", flush=True)
        make(directory / name)
        write_expected(directory / name)
    versions = {package: version(package) for package in PACKAGES}
    listed = ", ".join(f"{package} {number}" for package, number in versions.items())
    (directory / "README.md").write_text(README.format(versions=listed))
    manifest = {"versions": versions, "files": manifest_of(directory)}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def main() -> None:
    """Make everything aside, then put it in the place of what was there."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        (made / "checkpoints").mkdir()
        make_all(made / "checkpoints")
        make_bundled(made / "tiny")
        for target in (CHECKPOINTS, BUNDLED):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(made / target.name, target)
            for file in target.rglob("*.*"):
                file.chmod(0o644)  # safetensors writes files that only their owner may read
            print(f"{sum(f.stat().st_size for f in target.rglob('*') if f.is_file())} bytes in {target.name}")


def _file_in(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory / "model.gguf"


if __name__ == "__main__":
    main()
