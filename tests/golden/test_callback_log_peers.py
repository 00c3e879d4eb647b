"""llama.cpp's callback log, printed by its own code: as it ships it is refused, with all elements it is a dump."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.checkpoint_files import CHECKPOINTS, tokens_of
from tests.cli.run import refused, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif("ASSAY_LLAMA_CPP" not in os.environ, reason="ASSAY_LLAMA_CPP names no llama.cpp source tree"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]

GGUF = CHECKPOINTS / "gpt_oss/gguf/model.gguf"
TOKENS = tokens_of("gpt_oss")
EVERYTHING = {'"%12.4f"': '"%.9g"', "t->nb, 3, pimpl": "t->nb, 1 << 30, pimpl"}  # docs/your-own-engine.md


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "g.safetensors"
    assert run("record", GGUF, "--tokens", ",".join(map(str, TOKENS)), "--out", path).status == 0
    return path


def compiled(folder: Path, changes: dict[str, str]) -> Path:
    """A program that prints llama.cpp's log, these changes made to its source."""
    import llama_cpp

    tree, libraries = Path(os.environ["ASSAY_LLAMA_CPP"]), Path(llama_cpp.__file__).parent / "lib"
    source = (tree / "common/debug.cpp").read_text("utf-8")
    for before, after in changes.items():
        assert source.count(before) == 1
        source = source.replace(before, after)
    (folder / "debug.cpp").write_text(source)
    includes = [f"-I{tree / part}" for part in ("common", "include", "ggml/include", "vendor")]
    linked = [f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu", f"-Wl,-rpath,{libraries}"]
    files = [str(Path(__file__).with_name("callback_log.cpp")), str(folder / "debug.cpp")]
    subprocess.run(["g++", "-std=c++17", *includes, *files, *linked, "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("everything"), EVERYTHING)


def logged(program: Path, tokens: list[int] = TOKENS, model: Path = GGUF) -> Path:
    done = subprocess.run([str(program), str(model), *map(str, tokens)], check=True, capture_output=True)
    log = program.with_name("nodes.log")
    log.write_bytes(done.stdout)
    return log


def test_as_it_ships_it_cannot_be_judged(golden, tmp_path):
    message = refused("check", golden, "--dump", logged(compiled(tmp_path, {})))
    assert "the log holds only the edges of this tensor" in message
    assert "docs/your-own-engine.md" in message


def test_with_all_elements_it_is_a_dump(golden, program, tmp_path):
    log = logged(program)
    result = run("check", golden, "--dump", log, "--json", tmp_path / "report.json")
    assert result.status == 0
    assert "known-deviation" in result.text
    assert "judged by the noise of llama.cpp" in result.text
    assert "YaRN ramp rounded (yarn-ramp-rounded), first at layers.0.q_rope" in result.text
    assert "not supplied" not in result.text
    judged = {tap["tap"]: tap["positions"] for tap in json.loads((tmp_path / "report.json").read_text())["taps"]}
    last = [len(TOKENS) - 1]  # the only one whose logits were wanted
    assert judged["logits"] == judged["final_norm"] == last
    assert judged["layers.2.k"] is judged["layers.1.mlp_out"] is None
    strict = run("check", golden, "--dump", log, "--strict")
    assert strict.status == 1
    assert "first divergence: layers.0.q_rope" in strict.text
    assert re.search(r"cause: YaRN ramp rounded", strict.text)


def test_a_log_of_other_tokens_is_of_another_length(golden, program):
    assert "wrong shape" in refused("check", golden, "--dump", logged(program, TOKENS[:-1]))


@pytest.mark.parametrize(
    ("family", "diverging"), [("llama", set()), ("phi3", {"layers.0.attn_heads", "layers.1.attn_heads"})]
)
def test_logs_of_the_llama_family(program, tmp_path, family, diverging):
    """Llama's q and k are logged in neighbour pairs, phi-3's fused; llama.cpp ignores phi-3's window of 18."""
    model, tokens = CHECKPOINTS / family / "gguf/model.gguf", TOKENS[:30]
    tokens = [token % 320 for token in tokens]
    golden = tmp_path / "g.safetensors"
    assert run("record", model, "--tokens", ",".join(map(str, tokens)), "--out", golden).status == 0
    run("check", golden, "--dump", logged(program, tokens, model), "--json", tmp_path / "report.json")
    taps = json.loads((tmp_path / "report.json").read_text())["taps"]
    assert {"q", "k", "v", "gate", "up", "act"} <= {tap["tap"].rsplit(".", 1)[-1] for tap in taps}
    assert {tap["tap"] for tap in taps if tap["verdict"] != "match"} == diverging
