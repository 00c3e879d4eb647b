"""Backends of other packages, found through entry points of small distributions that are really installed."""

import sys
from importlib.metadata import entry_points

import pytest

from assay.golden.backends import open_backend
from assay.golden.errors import GoldenError
from tests.checkpoint_files import CHECKPOINTS, opened, tokens_of
from tests.cli.run import refused, run

ENGINE = """
import numpy as np
import assay.reference as reference
from assay.reference.taps import Recorder

class Engine:
    name, profile = "what it calls itself", "float32"
    versions = {"my-runtime": 7}

    def __init__(self, checkpoint, mode):
        self.model, self.mode = checkpoint.model(np.dtype(np.float32)), mode

    def run(self, tokens, chunks, names, progress=None):
        recorder, cache, start = Recorder(self.model.config, names, progress), reference.KVCache(), 0
        for T in chunks:
            reference.forward(self.model, np.array(tokens[start : start + T]), cache=cache, tap=recorder)
            start += T
        return recorder.values
"""
FAILING = ENGINE.replace("        for T in chunks", "        1 / 0\n        for T in chunks")
GPT_OSS = "gpt_oss/hf"
IDS = ",".join(map(str, tokens_of("gpt_oss")))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution with one module and entry points, as pip leaves it on the path."""

    def distribution(name, module, text, points):
        site = tmp_path / name
        info = site / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = "".join(f"{backend} = {value}\n" for backend, value in points.items())
        (info / "entry_points.txt").write_text(f"[assay.backends]\n{lines}")
        (site / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield distribution
    for module in ("my_engine", "my_engine_too"):
        sys.modules.pop(module, None)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugins") / "g.safetensors"
    assert run("record", CHECKPOINTS / GPT_OSS, "--tokens", IDS, "--out", path).status == 0
    return path


def test_a_registered_backend_is_run_by_its_name(install, golden):
    install("my-engine-assay", "my_engine", ENGINE, {"my-engine": "my_engine:Engine"})
    assert [point.name for point in entry_points(group="assay.backends")] == ["my-engine"]
    result = run("check", golden, "--backend", "my-engine")
    assert (result.status, result.err) == (0, "")
    assert "match my-engine, judged by the noise of float32" in result.text


def test_its_versions_and_mode(install):
    install("my-engine-assay", "my_engine", ENGINE, {"my-engine": "my_engine:Engine"})
    backend = open_backend("my-engine", opened(GPT_OSS), "fast")
    assert backend.versions == {"my-engine-assay": "1.2", "my-runtime": "7"}
    assert backend.name == "my-engine"
    assert backend._backend.mode == "fast"
    assert open_backend("my-engine", opened(GPT_OSS))._backend.mode is None


def test_it_records_goldens_too(install, tmp_path):
    install("my-engine-assay", "my_engine", ENGINE, {"my-engine": "my_engine:Engine"})
    out = tmp_path / "g.safetensors"
    assert run("record", CHECKPOINTS / GPT_OSS, "--tokens", "1,2,3", "--backend", "my-engine", "--out", out).status == 0


def test_an_unknown_name_lists_what_is_registered(install, golden):
    install("my-engine-assay", "my_engine", ENGINE, {"my-engine": "my_engine:Engine", "cpu": "my_engine:Engine"})
    message = refused("check", golden, "--backend", "vllm")
    assert "unknown backend 'vllm'" in message
    assert "expected: reference, cpu, metal, mlx-lm, transformers, llama.cpp, openai-torch, my-engine" in message


def test_ours_cannot_be_replaced(install):
    install("my-engine-assay", "my_engine", "raise ImportError", {"reference": "my_engine:Engine"})
    assert open_backend("reference", opened(GPT_OSS)).profile == "float64"


BROKEN = {
    "no such module": (ENGINE, "not_there:Engine", "cannot be opened: ModuleNotFoundError"),
    "no such function": (ENGINE, "my_engine:Motor", "cannot be opened: AttributeError"),
    "a module that fails": ("import nothing_of_that_name", "my_engine:Engine", "nothing_of_that_name"),
    "a module that exits": ("raise SystemExit(3)", "my_engine:Engine", "cannot be opened: SystemExit"),
    "no function": ("Engine = 3", "my_engine:Engine", "my_engine:Engine is no function, but int"),
    "fails to open": ("def Engine(c, m): return {}[m]", "my_engine:Engine", "cannot be opened: KeyError"),
    "no backend": ("def Engine(c, m): return 3", "my_engine:Engine", "does not follow the protocol"),
    "unknown profile": (ENGINE.replace('"float32"', '"int3"', 1), "my_engine:Engine", "unknown profile 'int3'"),
    "odd versions": (ENGINE.replace('{"my-runtime": 7}', "3"), "my_engine:Engine", "does not follow the protocol"),
    "fails to run": (FAILING, "my_engine:Engine", "failed: ZeroDivisionError: division by zero"),
    "answers nothing": (ENGINE.replace("return recorder.values", "return"), "my_engine:Engine", "answered NoneType"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_one_message(install, golden, case):
    text, value, part = BROKEN[case]
    install("my-engine-assay", "my_engine", text, {"my-engine": value})
    message = refused("check", golden, "--backend", "my-engine")
    assert part in message
    assert f"{value} of my-engine-assay 1.2" in message
    assert "'my-engine'" in message


def test_the_message_says_the_line(install, golden, tmp_path):
    install("my-engine-assay", "my_engine", FAILING, {"my-engine": "my_engine:Engine"})
    line = FAILING.splitlines().index("        1 / 0") + 1
    message = refused("check", golden, "--backend", "my-engine")
    assert f"{tmp_path / 'my-engine-assay' / 'my_engine.py'}:{line}" in message


def test_what_a_plugin_says_of_the_request_is_said_as_it_is(install, golden):
    text = "from assay.golden.errors import GoldenError\ndef Engine(c, m): raise GoldenError('no gpt-oss', got=m)"
    install("my-engine-assay", "my_engine", text, {"my-engine": "my_engine:Engine"})
    assert refused("check", golden, "--backend", "my-engine", "--mode", "x").startswith("assay: no gpt-oss")


def test_two_packages_of_one_name(install):
    install("my-engine-assay", "my_engine", ENGINE, {"my-engine": "my_engine:Engine"})
    install("its-fork", "my_engine_too", ENGINE, {"my-engine": "my_engine_too:Engine"})
    with pytest.raises(GoldenError, match="several packages register a backend 'my-engine'") as error:
        open_backend("my-engine", opened(GPT_OSS))
    assert "its-fork 1.2" in str(error.value)
    assert "my-engine-assay 1.2" in str(error.value)
