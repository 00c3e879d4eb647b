"""Random checkpoints: the shapes of the released models, in three containers, with values that stay sane."""

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest

from assay.loaders.checkpoint import open_checkpoint
from assay.loaders.errors import CheckpointError
from assay.loaders.quantise import encoder_of
from assay.loaders.registry import SHAPES, Shape, find_shape
from assay.loaders.synth import GAINS, random_weight, synth
from assay.reference import forward
from assay.reference.config import GptOssConfig, YarnScaling
from assay.reference.weights import weight_shapes

TARGETS = ["gguf", "safetensors", "mlx"]
TEXT = "The caf\u00e9 \u4f60\u597d, \U0001f600 and the\n\n\tother 1234"

# what the models' own pages give as their number of parameters
PARAMETERS = {
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "phi-3-mini": 3_821_079_552,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_released_model(name: str) -> None:
    assert sum(map(prod, weight_shapes(SHAPES[name].config).values())) == PARAMETERS[name]


def tiny(name: str) -> Shape:
    """A registered shape with its axes cut down and its features left."""
    shape = SHAPES[name]
    tokens = dict(enumerate(shape.special_tokens.values()))
    small = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_hidden_layers": 6,
    }
    config = shape.config
    if isinstance(config, GptOssConfig):
        small |= {"num_local_experts": 8, "layer_types": config.layer_types[:6]}
    config = replace(config, **small)
    return replace(shape, config=config, special_tokens=tokens, bos=0, eos=1, pad=2)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", ["gpt-oss-20b", "mistral-7b", "phi-3-mini", "smollm2-135m"])
def test_opens_with_its_shape_and_encodes_any_text(name: str, to: str, tmp_path: Path) -> None:
    shape = tiny(name)
    nbytes = synth(shape, tmp_path / "out", to, layers=3)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.format == to
    assert checkpoint.config == shape.shortened(3)
    assert sum(tensor.nbytes for tensor in checkpoint.tensors.values()) == nbytes
    assert checkpoint.tokenizer.get_vocab_size() == shape.config.vocab_size
    ids = checkpoint.tokenizer.encode(TEXT).ids
    assert checkpoint.tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode())  # some merges act


@pytest.mark.parametrize(
    ("to", "experts", "others"),
    [("gguf", "MXFP4", "Q8_0"), ("safetensors", "MXFP4", "BF16"), ("mlx", "MXFP4", "affine8/64")],
)
def test_encodings_are_the_published_files(to: str, experts: str, others: str, tmp_path: Path) -> None:
    synth(tiny("gpt-oss-20b"), tmp_path / "out", to, layers=1)
    tensors = open_checkpoint(tmp_path / "out").tensors
    assert tensors["model.layers.0.mlp.experts.down_proj.weight"].encoding.name == experts
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert tensors[name].encoding.name == others
    synth(tiny("gpt-oss-20b"), tmp_path / "plain", to, layers=1, encoder="F16")
    assert open_checkpoint(tmp_path / "plain").tensors["lm_head.weight"].encoding.name == "F16"


@pytest.mark.parametrize(
    ("to", "encoder"),
    [
        ("mlx", "affine4/128 F32"),
        ("mlx", "affine3/32"),
        ("gguf", "TQ2_0 (by gguf-py)"),
        ("gguf", "Q5_1"),
        ("mlx", "MLX nvfp4"),
    ],
)
def test_encodings_of_any_group(to: str, encoder: str, tmp_path: Path) -> None:
    shape = tiny("mistral-7b")
    shape = replace(shape, config=replace(shape.config, intermediate_size=512))
    synth(shape, tmp_path / "out", to, layers=1, encoder=encoder)
    down = open_checkpoint(tmp_path / "out").tensors["model.layers.0.mlp.down_proj.weight"]
    assert down.encoding == encoder_of(encoder).encoding
    if not encoder.startswith("TQ"):  # ternary codes do not keep the size of an entry
        assert down.decode().std() == pytest.approx(GAINS["down_proj"] / 512**0.5, rel=0.2)


def test_rows_that_are_no_whole_groups(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"down_proj\.weight has no room for affine4/128.*\n.*multiple of 128"):
        synth(tiny("mistral-7b"), tmp_path / "out", "mlx", layers=1, encoder="affine4/128")
    assert not list(tmp_path.iterdir())


def growth(path: Path, tokens: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation of block_out by layer, and the logits."""
    deviations: list[float] = []

    def tap(name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith("block_out"):
            deviations.append(float(array.std()))
        return array

    checkpoint = open_checkpoint(path)
    ids = np.random.default_rng(1).integers(checkpoint.config.vocab_size, size=tokens)
    logits = forward(checkpoint.model(np.float32), ids, tap=tap)
    return np.array(deviations), logits


@pytest.mark.parametrize("name", ["gpt-oss-20b", "mistral-7b", "smollm2-135m"])
def test_activations_stay_of_the_order_of_one(name: str, tmp_path: Path) -> None:
    synth(tiny(name), tmp_path / "model.gguf", "gguf")
    deviations, logits = growth(tmp_path / "model.gguf")
    assert deviations.min() > 0.1
    assert deviations.max() < 5
    assert deviations.max() / deviations.min() < 10
    assert np.isfinite(logits).all()
    assert 1 < logits.std() < 10


def test_a_released_shape_stays_sane_to_the_last_layer(tmp_path: Path) -> None:
    shape = find_shape("smollm2-135m")
    synth(replace(shape, config=replace(shape.config, vocab_size=512)), tmp_path / "model.gguf", "gguf")
    deviations, logits = growth(tmp_path / "model.gguf", tokens=4)
    assert len(deviations) == 30
    assert 0.1 < deviations.min() < deviations.max() < 10
    assert np.isfinite(logits).all()


def test_same_seed_same_bytes_another_seed_other_ones(tmp_path: Path) -> None:
    shape = tiny("gpt-oss-20b")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synth(shape, tmp_path / name, "gguf", layers=1, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert len(a) == len(c)
    assert a != c


def test_values_do_not_depend_on_how_many_rows_are_read() -> None:
    weight = random_weight("model.layers.0.mlp.experts.up_proj.weight", (3, 40, 128), "MXFP4", seed=5)
    read = [np.concatenate([p["blocks"] for p in weight.pieces(rows)]) for rows in (1, 7, 1000)]
    assert read[0].shape == (120, 4, 16)
    np.testing.assert_array_equal(read[0], read[1])
    np.testing.assert_array_equal(read[0], read[2])


def test_entries_have_the_scale_asked_for() -> None:
    weight = random_weight("model.layers.0.self_attn.q_proj.weight", (4096, 1024), "F32", seed=0)
    values = np.concatenate([p["values"] for p in weight.pieces(256)])
    assert values.std() == pytest.approx(1 / 32, rel=0.01)
    assert abs(values.mean()) < 1e-4


def test_yarn_of_gpt_oss_is_not_rounded() -> None:
    scaling = SHAPES["gpt-oss-20b"].config.rope_scaling
    assert isinstance(scaling, YarnScaling)
    assert not scaling.truncate


@pytest.mark.parametrize("layers", [0, 25])
def test_layers_out_of_range(layers: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--layers is out of range"):
        synth(SHAPES["gpt-oss-20b"], tmp_path / "out", "gguf", layers=layers)


def test_unknown_shape() -> None:
    with pytest.raises(CheckpointError, match="no registered shape 'gpt-5'"):
        find_shape("gpt-5")
