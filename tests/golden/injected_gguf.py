"""Faults that the catalogue does not know, made in the GGUF file that llama.cpp reads (and the oracle does not)."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.checkpoint_files import CHECKPOINTS

GPT_OSS = CHECKPOINTS / "gpt_oss/gguf/model.gguf"
MXFP4_BYTES = 17  # of a block, its scale first


class Fault(NamedTuple):
    """What is done to the reader's mapped file, and the tap where it first acts."""

    change: Callable[[Any], None]
    tap: str


def field(name: str, factor: float) -> Callable[[Any], None]:
    """A number of the header, some times as large."""

    def change(reader: Any) -> None:
        reader.fields[f"gpt-oss.{name}"].parts[-1][0] *= factor

    return change


def tensors(end: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    """The stored values of one tensor of every layer; of quantised ones the bytes."""

    def change(reader: Any) -> None:
        for tensor in reader.tensors:
            if tensor.name.endswith(end):
                tensor.data[:] = edit(tensor.data.copy())

    return change


def scales_of_the_next_block(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, MXFP4_BYTES)
    blocks[:, 0] = np.roll(blocks[:, 0], -1)
    return data


def rows_lost(data: np.ndarray) -> np.ndarray:
    data[-8:] = 0
    return data


def half_of_the_router(reader: Any) -> None:
    """Rows of the router stand for the next expert's, its bias does not."""
    tensors("ffn_gate_inp.weight", lambda w: np.roll(w, 1, axis=0))(reader)


FAULTS: dict[str, Fault] = {
    "RoPE base a third": Fault(field("rope.freq_base", 1 / 3), "layers.0.q_rope"),
    "YaRN factor halved": Fault(field("rope.scaling.factor", 0.5), "layers.0.q_rope"),
    "window of a third": Fault(field("attention.sliding_window", 1 / 3), "layers.0.attn_heads"),
    "epsilon a thousand times too large": Fault(field("attention.layer_norm_rms_epsilon", 1000), "layers.0.attn_norm"),
    "sinks of the other sign": Fault(tensors("attn_sinks.weight", lambda s: -s), "layers.0.attn_heads"),
    "key bias of the next head": Fault(tensors("attn_k.bias", lambda b: np.roll(b, 32)), "layers.0.k"),
    "router's rows of the next expert": Fault(half_of_the_router, "layers.0.router_logits"),
    "rows of W_o lost": Fault(tensors("attn_output.weight", rows_lost), "layers.0.attn_out"),
    "scales of the next block": Fault(tensors("ffn_down_exps.weight", scales_of_the_next_block), "layers.0.expert_out"),
}


def with_fault(fault: Fault, path: Path) -> Path:
    """A copy of the small gpt-oss with a fault in it."""
    from gguf import GGUFReader

    shutil.copyfile(GPT_OSS, path)
    reader = GGUFReader(path, "r+")
    fault.change(reader)
    reader.data.flush()
    return path
