"""Faults planted one at a time into good checkpoints, each with what `assay verify` must say of it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.loaders.planters import (
    EMBED,
    GGUF,
    K_PROJ,
    NORM,
    ONE,
    SHARD_1,
    SHARD_2,
    Place,
    at_data,
    at_tensor,
    block,
    coarser,
    code,
    cut,
    entry,
    gguf_bad_text,
    gguf_cut,
    gguf_gap,
    gguf_name_twice,
    gguf_with,
    ghost_module,
    hole,
    index_names_the_wrong_shard,
    info,
    lengthened,
    more_tokens,
    replaced,
    settings,
    shifted,
    taken_id,
    twice_in_two_shards,
    whole_file,
    without,
    zeroed,
)


class Fault(NamedTuple):
    """The checkpoint to spoil, how, and what must be said of it."""

    base: str
    plant: Callable[[Path], Place]
    words: str
    check: str = "structure"
    severity: str = "error"
    also: str = "nothing"  # words of what the same fault makes true of other tensors


NAN_16, INF_16, MINUS_INF_BF16 = b"\x01\x7e", b"\x00\x7c", b"\x80\xff"
MX = "model.layers.0.mlp.experts.down_proj"
NO_K = {"blk.0.attn_k.weight": None}

FAULTS: dict[str, Fault] = {
    # values
    "NaN in bfloat16": Fault(
        "llama/hf", code(ONE, EMBED, 2 * (64 * 5 + 3), b"\xc0\x7f"), "at element [5, 3]", "values"
    ),
    "-inf in a norm": Fault("gpt_oss/hf", code(SHARD_2, NORM, 4, MINUS_INF_BF16), "at element [2]", "values"),
    "E8M0 255": Fault("gpt_oss/hf", code(SHARD_1, f"{MX}_scales", 7, b"\xff"), "a scale is not finite", "values"),
    "E8M0 254": Fault("gpt_oss/hf", code(SHARD_1, f"{MX}_scales", 7, b"\xfe"), "too large", "values", "warning"),
    "NaN in float32": Fault("llama/gguf", block("output_norm.weight", 12, b"\0\0\xc0\x7f"), "at element [3]", "values"),
    "inf in BF16 of GGUF": Fault(
        "gpt_oss/gguf", block("blk.1.attn_q.weight", 0, b"\x80\x7f"), "element [0, 0]", "values"
    ),
    "Q8_0 scale inf": Fault(
        "llama/gguf-q8_0", block("blk.1.ffn_up.weight", 34 * 3, INF_16), "element [1, 32]", "values"
    ),
    "Q4_0 scale NaN": Fault("llama/gguf-q4_0", block("blk.0.attn_k.weight", 18, NAN_16), "element [0, 32]", "values"),
    "Q4_1 minimum NaN": Fault(
        "llama/gguf-q4_1", block("blk.0.attn_k.weight", 22, NAN_16), "a minimum is not", "values"
    ),
    "MXFP4 scale of GGUF": Fault("gpt_oss/gguf", block("blk.0.ffn_up_exps.weight", 34, b"\xff"), "[0, 1, 0]", "values"),
    "MXFP4 scale of GGUF too large": Fault(
        "gpt_oss/gguf", block("blk.0.ffn_up_exps.weight", 34, b"\xfd"), "too large", "values", "warning"
    ),
    "affine scale NaN": Fault(
        "llama/mlx-4bit", code(ONE, f"{K_PROJ[:-6]}scales", 2, b"\xc0\x7f"), "a scale is", "values"
    ),
    "affine scale huge": Fault(
        "llama/mlx-4bit", code(ONE, f"{K_PROJ[:-6]}scales", 2, b"\x00\x7f"), "too large", "values", "warning"
    ),
    "affine bias inf": Fault(
        "llama/mlx-4bit", code(ONE, f"{K_PROJ[:-6]}biases", 2, b"\x80\x7f"), "not finite", "values"
    ),
    "MLX mxfp4 scale": Fault(
        "gpt_oss/mlx", code(ONE, "model.layers.1.mlp.experts.up_proj.scales", 9, b"\xff"), "a scale is", "values"
    ),
    "every number zero": Fault("llama/hf", zeroed(ONE, K_PROJ), "every value is zero", "values", "warning"),
    # structure of safetensors
    "overlap": Fault("llama/hf", entry(NORM, shifted(-2), "data"), "overlaps"),
    "hole": Fault("llama/hf", hole, "a hole of 2 bytes"),
    "trailing bytes": Fault("llama/hf", lengthened(ONE, 3), "3 trailing bytes"),
    "cut short": Fault("mistral/hf", cut(ONE, 1), "beyond the file"),
    "unknown dtype": Fault("llama/hf", entry(K_PROJ, lambda e: e.update(dtype="F4"), "entry"), "unknown dtype"),
    "size against dtype": Fault("llama/hf", entry(K_PROJ, lambda e: e.update(dtype="F32"), "data"), "wrong size"),
    "negative length": Fault("llama/hf", entry(K_PROJ, lambda e: e.update(shape=[-32, -64]), "entry"), "wrong shape"),
    "wrong shape": Fault("llama/hf", replaced(K_PROJ, "BF16", [64, 32]), "wrong shape for"),
    "wrong kind of number": Fault("llama/hf", replaced(K_PROJ, "I32", [32, 64]), "wrong dtype"),
    "missing": Fault("llama/hf", without(K_PROJ), "1 tensor missing"),
    "unused": Fault("llama/hf", replaced("model.extra.weight", "F32", [3]), "no use for"),
    "in two shards": Fault("gpt_oss/hf", twice_in_two_shards, "is also in"),
    "index is wrong": Fault("gpt_oss/hf", index_names_the_wrong_shard, "does not hold what the index names"),
    # structure of GGUF
    "GGUF cut short": Fault("llama/gguf-q8_0", gguf_cut, "ends beyond the end of the file"),
    "GGUF overlap": Fault("llama/gguf", info("blk.1.attn_q.weight", -1, lambda o: o - 32, "data"), "overlaps tensor"),
    "GGUF gap": Fault("llama/gguf", gguf_gap, "does not lie right behind"),
    "GGUF misaligned": Fault(
        "llama/gguf", info("blk.1.attn_q.weight", -1, lambda o: o + 1, "info"), "misaligned offset"
    ),
    "GGUF unknown type": Fault("llama/gguf", info("blk.1.attn_q.weight", -2, lambda t: 99, "info"), "ggml type 99"),
    "GGUF name twice": Fault("llama/gguf", gguf_name_twice, "occurs twice", also="1 tensor missing"),
    "GGUF missing": Fault("llama/gguf", gguf_with(whole_file(K_PROJ), tensors=NO_K), "1 tensor missing"),
    "GGUF wrong shape": Fault(
        "llama/gguf",
        gguf_with(at_data("blk.0.attn_k.weight"), tensors={"blk.0.attn_k.weight": np.ones((64, 32), np.float32)}),
        "wrong shape for",
    ),
    "GGUF unused": Fault(
        "llama/gguf",
        gguf_with(at_data("blk.0.extra.weight"), tensors={"blk.0.extra.weight": np.ones(4, np.float32)}),
        "no use for",
    ),
    "GGUF trailing bytes": Fault("llama/gguf", lengthened(GGUF, 40), "40 trailing bytes", severity="warning"),
    # settings
    "MLX groups that do not fit": Fault(
        "llama/mlx-4bit", at_tensor(EMBED, coarser), "do not fit together", also="do not fit together"
    ),
    "MLX settings twice": Fault(
        "llama/mlx-4bit", settings(lambda c: c["quantization_config"].update(bits=8)), "disagree on 'bits'", "settings"
    ),
    "MLX settings of no module": Fault(
        "llama/mlx-4bit",
        lambda f: settings(ghost_module)(f)._replace(tensor="model.layers.9.mlp.router.weight"),
        "a module that has no scales",
        "settings",
        "warning",
    ),
    # vocabulary
    "more tokens than rows": Fault(
        "llama/hf",
        at_tensor(EMBED, more_tokens, "tokenizer.json"),
        "no row for 1 of the tokenizer's tokens",
        "vocabulary",
    ),
    "added token's id is taken": Fault(
        "llama/hf", settings(taken_id, "tokenizer.json"), "does not get the id", "vocabulary"
    ),
    "tokenizer damaged": Fault(
        "llama/hf", settings(lambda t: t.pop("model"), "tokenizer.json"), "not a readable tokenizer.json", "vocabulary"
    ),
    "special token nowhere": Fault(
        "llama/hf",
        settings(lambda t: t.update(pad_token="[PAD]"), "tokenizer_config.json"),
        "'[PAD]' is not in",
        "vocabulary",
    ),
    "eos beyond the vocabulary": Fault(
        "llama/hf",
        settings(lambda g: g.update(eos_token_id=[378, 384]), "generation_config.json"),
        "no token id",
        "vocabulary",
    ),
    "bos a text": Fault("llama/hf", settings(lambda c: c.update(bos_token_id="<s>")), "bos_token_id", "vocabulary"),
    "GGUF eos beyond the vocabulary": Fault(
        "llama/gguf",
        gguf_with(whole_file(), metadata={"tokenizer.ggml.eos_token_id": 384}),
        "eos_token_id",
        "vocabulary",
    ),
    "GGUF merges not UTF-8": Fault("llama/gguf", gguf_bad_text, "not valid UTF-8", "vocabulary"),
    "GGUF vocabulary of another size": Fault(
        "llama/gguf",
        gguf_with(
            at_data("token_embd.weight"),
            tensors={"token_embd.weight": np.ones((385, 64), np.float32)},
            metadata={"llama.vocab_size": 385},
        ),
        "differ in size",
        "vocabulary",
    ),
}
