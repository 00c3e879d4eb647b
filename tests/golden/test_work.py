"""The work of a step, against what the checkpoints' files hold."""

import pytest

from assay.golden.work import DECODED, LEAST, work_by_kind
from assay.loaders.checkpoint import Checkpoint
from assay.reference.taps import kind_of, tap_table
from tests.checkpoint_files import opened


def of_all_steps(checkpoint: Checkpoint, T: int) -> int:
    works = work_by_kind(checkpoint.config, T)
    return sum(works[kind_of(name)] - LEAST for name in tap_table(checkpoint.config))


def elements(checkpoint: Checkpoint, end: str = ".weight") -> int:
    """Values of all matrices; of a tied head once."""
    tensors = {name: t for name, t in checkpoint.tensors.items() if len(t.shape) > 1 and name.endswith(end)}
    if not checkpoint.config.tie_word_embeddings:
        tensors.pop("model.embed_tokens.weight", None)
    return sum(t.size for t in tensors.values())


@pytest.mark.parametrize("name", ["llama/hf", "mistral/hf", "phi3/hf"])
def test_each_matrix_is_decoded_once_and_multiplied_at_each_position(name: str) -> None:
    checkpoint = opened(name)
    config = checkpoint.config
    assert of_all_steps(checkpoint, 0) == DECODED * elements(checkpoint)
    scores = 2 * config.num_hidden_layers * config.dims["H"] * config.dims["C"]
    assert of_all_steps(checkpoint, 7) == (DECODED + 7) * elements(checkpoint) + 49 * scores


def test_experts_are_decoded_when_chosen_and_multiplied_as_often_as_that() -> None:
    checkpoint = opened("gpt_oss/hf")
    config = checkpoint.config
    D, F, A, N = (config.dims[letter] for letter in "DFAN")
    works = [work_by_kind(config, T)["expert_up"] - LEAST for T in (1, 1000)]
    assert works == [(1 + DECODED) * A * D * F, (1000 * A + DECODED * N) * D * F]
