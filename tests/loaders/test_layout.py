"""Fused matrices taken apart, by literal rows."""

from dataclasses import replace

import numpy as np
import pytest

from assay.loaders import layout
from assay.loaders.names import gguf_targets, safetensors_targets
from tests.checkpoint_files import opened
from tests.fast.models import llama_config

# two query heads and one key head of two channels, four feed-forward rows
CONFIG = replace(
    llama_config(), num_attention_heads=2, num_key_value_heads=1, head_dim=2, hidden_size=3, intermediate_size=4
)
QKV = np.arange(8 * 3).reshape(8, 3)
GATE_UP = np.arange(8 * 3).reshape(8, 3)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (layout.Q_ROWS, [0, 1, 2, 3]),
        (layout.K_ROWS, [4, 5]),
        (layout.V_ROWS, [6, 7]),
        (layout.GATE_FIRST, [0, 1, 2, 3]),
        (layout.UP_LAST, [4, 5, 6, 7]),
    ],
)
def test_rows_of_a_fused_matrix(change, rows):
    part = change.apply(QKV, CONFIG)
    assert (part[:, 0] // 3).tolist() == rows
    assert part.base is QKV.base  # a view


def targets(found):
    return [(name, *(change.name for change in changes)) for name, changes in found]


def test_fused_names_of_phi3():
    layer = "model.layers.1"
    qkv = [(f"{layer}.self_attn.{m}_proj.weight", f"{m} rows of qkv") for m in "qkv"]
    gate_up = [
        (f"{layer}.mlp.gate_proj.weight", "first half of gate_up"),
        (f"{layer}.mlp.up_proj.weight", "second half of gate_up"),
    ]
    assert targets(safetensors_targets(f"{layer}.self_attn.qkv_proj.weight")) == qkv
    assert targets(safetensors_targets(f"{layer}.mlp.gate_up_proj.weight")) == gate_up
    assert targets(gguf_targets("phi3", "blk.1.attn_qkv.weight")) == qkv
    assert targets(gguf_targets("phi3", "blk.1.ffn_up.weight")) == gate_up


def test_other_names_of_phi3_in_gguf():
    """Heads turn in halves there: separate q and k, which llama.cpp takes too, are not permuted."""
    assert targets(gguf_targets("phi3", "blk.0.attn_q.weight")) == [("model.layers.0.self_attn.q_proj.weight",)]
    assert targets(gguf_targets("phi3", "blk.0.ffn_down.weight")) == [("model.layers.0.mlp.down_proj.weight",)]
    assert targets(gguf_targets("llama", "blk.0.ffn_up.weight")) == [("model.layers.0.mlp.up_proj.weight",)]
    assert gguf_targets("phi3", "blk.0.ffn_gate.weight") == []
    assert gguf_targets("llama", "blk.0.attn_qkv.weight") == []


@pytest.mark.parametrize("name", ["phi3/hf", "phi3/gguf"])
def test_the_pieces_are_what_was_fused(name):
    """The maker builds each fused matrix of random weights that bear the names of the separate ones."""
    from assay.reference.formats import BF16
    from tests.tiny import random_weight

    for key, tensor in opened(name).tensors.items():
        if key.endswith("proj.weight"):
            rounded = (random_weight(key, tensor.shape, 5).view(np.uint32) + 0x8000) >> 16  # no ties in random numbers
            np.testing.assert_array_equal(tensor.decode(), BF16.decode({"values": rounded.astype("<u2")}), err_msg=key)
