"""The MLX path on an x86 CPU is its profile: every product equal to the bit, however many inputs are added up."""

import platform
from dataclasses import replace

import numpy as np
import pytest

from assay.golden.emulate_mlx import MetalOnCpu
from assay.reference import Model, forward
from tests.fast.engines import tokens_of, traced
from tests.fast.models import gpt_oss_config, random_model

pytestmark = pytest.mark.peers
PRODUCTS = {"q", "k", "v", "attn_out", "router_logits", "expert_gate", "expert_up", "expert_out", "logits"}
ENCODINGS = [("BF16", "MXFP4"), ("Q8_0", "MXFP4_BLOCKS"), ("affine8", "affine4"), ("F16", "BF16"), ("Q4_1", "Q4_0")]


@pytest.mark.parametrize(("encoding", "experts"), ENCODINGS)
def test_products(encoding: str, experts: str) -> None:
    import mlx.core as mx

    from assay.fast.metal import MetalModel

    if mx.default_device().type != mx.cpu or platform.machine() != "x86_64":
        pytest.skip("MLX on a GPU, or on another processor, adds up in another order")
    config = replace(gpt_oss_config(layers=2), hidden_size=1024, intermediate_size=512)
    tensors, tokens = random_model(config, 3, encoding, experts), tokens_of(config, 20)
    _, taps = traced(MetalModel(config, tensors), tokens, [20])
    emulation, seen = MetalOnCpu(Model(config, tensors, np.dtype(np.float32))), set()

    def force(name: str, array: np.ndarray) -> np.ndarray:
        kind = name.rsplit(".", 1)[-1]
        if kind in PRODUCTS:
            np.testing.assert_array_equal(array, taps[name], err_msg=name)
            seen.add(kind)
        return taps.get(name, array)

    forward(emulation.model, tokens, tap=force)
    assert seen == PRODUCTS
