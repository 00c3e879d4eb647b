"""assay check: the verdict as text, JSON and exit status, for backends and for dumps of other engines."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from assay.cli import shared
from assay.golden.store import load_golden, save_golden
from tests.checkpoint_files import CHECKPOINTS, copied, tokens_of
from tests.cli.run import refused, run
from tests.golden.faults import jolted, taps_with

IDS = ",".join(map(str, tokens_of("gpt_oss")))
KEYS = {
    *("verdict", "first_divergence", "cause", "deviations", "logits", "routing", "taps", "not_supplied", "structure"),
    *("scope", "backend", "profile", "reason", "allowance", "schema", "versions", "weights"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the checkpoint with a golden of it beside it."""
    folder = tmp_path_factory.mktemp("check")
    copied("gpt_oss/hf", folder / "model")
    result = run("record", folder / "model", "--tokens", IDS, "--out", folder / "g.safetensors")
    assert result.status == 0
    return folder


def dumped(path, taps, metadata=None):
    save_file({name: np.ascontiguousarray(array) for name, array in taps.items()}, path, metadata)
    return path


# --- backends ---


@pytest.mark.parametrize("mode", [[], ["--mode", "float64"], ["--mode", "float32"]])
def test_a_right_backend_is_status_0(folder, mode):
    result = run("check", folder / "g.safetensors", "--backend", "reference", *mode)
    assert (result.status, result.err) == (0, "")
    profile = mode[1] if mode else "float64"
    assert f"match reference, judged by the noise of {profile}" in result.text
    assert "end to end: KL" in result.text
    assert "routing: 0 of 120 choices" in result.text


@pytest.mark.parametrize("mode", ["exact-f16", "q8-f16"])
def test_a_float16_cache_is_no_fault(folder, mode):
    """Under the profile that its mode names; under that of a float32 cache attention's output is what is off."""
    golden, products = folder / "g.safetensors", mode.removesuffix("-f16").replace("exact", "float32")
    result = run("check", golden, "--backend", "cpu", "--mode", mode)
    assert result.status == 0, result.text
    assert f"match cpu, judged by the noise of {products}-f16-cache" in result.text
    wrong = run("check", golden, "--backend", "cpu", "--mode", mode, "--profile", products)
    assert wrong.status == 1
    assert "layers.0.attn_heads" in wrong.text


def test_the_checkpoint_is_found_from_another_folder(folder, tmp_path, monkeypatch):
    golden = load_golden(folder / "g.safetensors")
    assert golden.provenance.checkpoint == "model"
    monkeypatch.chdir(tmp_path)
    assert run("check", folder / "g.safetensors", "--backend", "reference").status == 0
    monkeypatch.chdir(folder)
    assert run("check", "g.safetensors", "--backend", "reference").status == 0


def test_a_checkpoint_that_moved(folder, tmp_path):
    golden = save_golden(load_golden(folder / "g.safetensors"), tmp_path / "g.safetensors")
    message = refused("check", golden, "--backend", "reference")
    assert "--model" in message
    assert run("check", golden, "--backend", "reference", "--model", folder / "model").status == 0


def test_another_container_of_the_same_model(folder):
    """A golden of the Hugging Face files judges the GGUF: same weights, same config, same digests."""
    gguf = CHECKPOINTS / "gpt_oss/gguf/model.gguf"
    result = run("check", folder / "g.safetensors", "--backend", "reference", "--model", gguf)
    assert result.status == 0


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("name", ["", ".", "/"])
def test_an_output_without_a_name(folder, option, name):
    """As of a shell variable that is not set."""
    message = refused("check", folder / "g.safetensors", "--backend", "reference", option, name)
    assert "not the name of a file to write" in message


# --- progress ---


@pytest.fixture
def terminal(monkeypatch):
    """Where messages go, as a terminal that is shown each update."""
    screen = io.StringIO()
    monkeypatch.setattr(shared, "messages", Console(file=screen, force_terminal=True, width=100))
    return screen


def test_the_search_for_a_cause_has_a_bar_of_its_own(folder, tmp_path, terminal):
    dump = dumped(tmp_path / "d.safetensors", taps_with({"layers.1.attn_heads": jolted}))
    assert run("check", folder / "g.safetensors", "--dump", dump, "--profile", "float32").status == 1
    shown = terminal.getvalue()
    assert shown.index("forced pass") < shown.index("search for the cause")
    assert "mistakes" in shown


def test_a_match_shows_no_search(folder, terminal):
    assert run("check", folder / "g.safetensors", "--backend", "reference").status == 0
    assert "forced pass" in terminal.getvalue()
    assert "search" not in terminal.getvalue()


# --- json ---


def test_json_on_stdout_is_nothing_but_json(folder):
    result = run("check", folder / "g.safetensors", "--backend", "reference", "--json", "-")
    report = json.loads(result.out)
    assert (result.status, report["verdict"], report["first_divergence"]) == (0, "match", None)
    assert set(report) >= KEYS
    assert report["not_supplied"] == []
    assert report["versions"] == {"numpy": np.__version__}
    assert [tap["tap"] for tap in report["taps"]] == load_golden(folder / "g.safetensors").provenance.taps


def test_json_in_a_file_beside_the_report(folder, tmp_path):
    dump = dumped(tmp_path / "d.safetensors", taps_with({"layers.1.attn_heads": jolted}))
    result = run("check", folder / "g.safetensors", "--dump", dump, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert result.status == 1
    assert "first divergence: layers.1.attn_heads" in result.text
    first = report["first_divergence"]
    assert (report["verdict"], first["tap"]) == ("diverges", "layers.1.attn_heads")
    assert first["local_error"] == pytest.approx(0.001, rel=1e-3)
    assert first["ratio"] > report["allowance"] > 1
    assert first["ratio"] == pytest.approx(first["local_error"] / first["noise"], rel=0.5)
    rows = {tap["tap"]: tap for tap in report["taps"]}
    assert [name for name, row in rows.items() if row["verdict"] == "diverges"] == ["layers.1.attn_heads"]
    assert rows["logits"]["inherited_error"] > 1e-6
    assert {"index", "expected", "got"} <= set(rows["logits"]["worst"])


def test_json_of_nan_is_null(folder, tmp_path):
    taps = taps_with({})
    taps["logits"] = taps["logits"] * np.nan
    result = run("check", folder / "g.safetensors", "--dump", dumped(tmp_path / "d.safetensors", taps), "--json", "-")
    report = json.loads(result.out, parse_constant=lambda name: pytest.fail(name))
    assert (result.status, report["first_divergence"]["tap"]) == (1, "logits")
    assert report["first_divergence"]["worst"]["got"] is None
    assert report["logits"]["kl_nats"] is None


# --- html ---


def test_a_page_beside_the_report(folder, tmp_path):
    dump = dumped(tmp_path / "d.safetensors", taps_with({"layers.1.attn_heads": jolted}))
    result = run("check", folder / "g.safetensors", "--dump", dump, "--html", tmp_path / "r.html")
    assert result.status == 1
    assert "first divergence: layers.1.attn_heads" in result.text
    page = (tmp_path / "r.html").read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert "layers.1.attn_heads" in page
    assert str(folder / "g.safetensors") in page
    run("check", folder / "g.safetensors", "--backend", "reference", "--html", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text("utf-8")
    assert f"numpy {np.__version__}" in page
    assert str(folder / "model") in page


def test_a_page_without_the_checkpoint_and_of_other_tokens(folder, tmp_path):
    golden = save_golden(load_golden(folder / "g.safetensors"), tmp_path / "g.safetensors")
    dump = dumped(tmp_path / "d.safetensors", taps_with({"layers.1.attn_heads": jolted}))
    assert run("check", golden, "--dump", dump, "--html", tmp_path / "r.html").status == 1
    assert "cannot be told apart" in (tmp_path / "r.html").read_text("utf-8")
    dump = dumped(tmp_path / "d.safetensors", taps_with({}), {"tokens": "1,2"})
    assert run("check", folder / "g.safetensors", "--dump", dump, "--html", tmp_path / "r.html").status == 2
    assert "the backend ran other tokens" in (tmp_path / "r.html").read_text("utf-8")


# --- dumps ---


def test_a_dump_with_a_map_in_bfloat16_numbers(folder, tmp_path):
    names = {"h{i}": "layers.{i}.block_out", "emb": "embed", "out": "logits"}
    (tmp_path / "map.json").write_text(json.dumps(names))
    taps = taps_with({}, dtype=np.float32)
    theirs = {f"h{i}": taps[f"layers.{i}.block_out"] for i in range(3)} | {"emb": taps["embed"], "out": taps["logits"]}
    np.savez(tmp_path / "d.npz", **theirs)
    result = run("check", folder / "g.safetensors", "--dump", tmp_path / "d.npz", "--names", tmp_path / "map.json")
    assert (result.status, result.err) == (0, "")
    assert "judged by the noise of float32" in result.text
    assert "not supplied" in result.text
    half = run(
        *("check", folder / "g.safetensors", "--dump", tmp_path / "d.npz", "--names", tmp_path / "map.json"),
        *("--profile", "bfloat16"),
    )
    assert "judged by the noise of bfloat16" in half.text


def test_a_golden_as_a_dump(folder):
    assert run("check", folder / "g.safetensors", "--dump", folder / "g.safetensors").status == 0


def test_a_dump_without_the_checkpoint_is_end_to_end(folder, tmp_path):
    golden = save_golden(load_golden(folder / "g.safetensors"), tmp_path / "g.safetensors")
    dump = dumped(tmp_path / "d.safetensors", taps_with({"layers.1.attn_heads": jolted}))
    result = run("check", golden, "--dump", dump, "--json", "-")
    report = json.loads(result.out)
    assert (result.status, report["scope"], report["verdict"]) == (1, "end-to-end", "diverges")
    assert "local and inherited error cannot be told apart" in report["reason"]
    assert report["taps"][0]["local_error"] is None


@pytest.mark.parametrize("metadata", [{"tokens": "1,2,3"}, {"tokens": IDS + ",1"}])
def test_other_tokens_are_incomparable(folder, tmp_path, metadata):
    dump = dumped(tmp_path / "d.safetensors", taps_with({}), metadata)
    result = run("check", folder / "g.safetensors", "--dump", dump, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert (result.status, report["verdict"]) == (2, "incomparable")
    assert "the backend ran other tokens" in report["reason"]
    assert "incomparable" in result.text
    assert set(report) >= KEYS


def test_tokens_are_compared_before_any_number(folder, tmp_path, monkeypatch):
    """Other tokens: no tap is read, be it misshapen or full of NaN."""
    from assay.golden.backends.dump import _Renamed

    monkeypatch.setattr(_Renamed, "__getitem__", lambda self, tap: pytest.fail(f"{tap} was read"))
    taps = {"embed": np.full(3, np.nan, np.float32), "weights.model.norm.weight": np.zeros(2, np.float32)}
    dump = dumped(tmp_path / "d.safetensors", taps, {"tokens": f"1,{IDS}"})
    result = run("check", folder / "g.safetensors", "--dump", dump)
    assert result.status == 2
    assert "the dump has [1] in front of what the golden has" in result.text


def test_weights_in_a_dump_are_compared_first(folder, tmp_path):
    """Under any name map; the weights' own dtype says nothing of what taps were computed in."""
    from assay.loaders import open_checkpoint

    tensors = open_checkpoint(folder / "model").tensors
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qko"]
    arrays = {f"weights.{name}": tensors[name].decode() for name in names}
    good = {"model.embed_tokens": taps_with({}, dtype=np.float32)["embed"]} | arrays
    dump = dumped(tmp_path / "good.safetensors", good)
    result = run("check", folder / "g.safetensors", "--dump", dump, "--names", "hf", "--json", "-")
    assert (result.status, json.loads(result.out)["weights"]) == (0, {"compared": 3, "differing": []})
    q = arrays[f"weights.{names[0]}"]
    q = q.reshape(4, 2, 16, 64).swapaxes(1, 2).reshape(q.shape)
    dump = dumped(tmp_path / "bad.safetensors", good | {f"weights.{names[0]}": q, "lm_head": np.zeros((40, 320), "f4")})
    result = run("check", folder / "g.safetensors", "--dump", dump, "--names", "hf", "--json", "-")
    report = json.loads(result.out)
    assert (result.status, report["profile"]) == (1, "float32")
    assert report["first_divergence"]["tap"] == f"weights.{names[0]}"
    assert report["cause"]["id"] == "q-rows-to-neighbours"
    assert "lm_head" not in report["weights"]["differing"]
    text = run("check", folder / "g.safetensors", "--dump", dump, "--names", "hf").text
    assert "first divergence: weights.model.layers.0.self_attn.q_proj.weight" in text


def test_a_dump_with_none_of_the_taps_is_incomparable(folder, tmp_path):
    dump = dumped(tmp_path / "d.safetensors", {"something": np.ones(3)})
    result = run("check", folder / "g.safetensors", "--dump", dump)
    assert result.status == 2
    assert "none of the taps" in result.text


# --- what cannot be carried out ---

WRONG = {
    "neither backend nor dump": ([], "either --backend or --dump"),
    "both": (["--backend", "reference", "--dump", "x"], "either --backend or --dump"),
    "names without a dump": (["--backend", "reference", "--names", "hf"], "--names goes with --dump"),
    "unknown backend": (["--backend", "vllm"], "unknown backend 'vllm'"),
    "unknown mode": (["--backend", "reference", "--mode", "q8"], "no mode 'q8'"),
    "unknown profile": (["--backend", "reference", "--profile", "int4"], "unknown profile 'int4'"),
    "no such dump": (["--dump", "/nowhere.safetensors"], "/nowhere.safetensors"),
    "no such model": (["--backend", "reference", "--model", "/nowhere"], "/nowhere: cannot be read"),
    "another model": (["--backend", "reference", "--model", CHECKPOINTS / "llama/hf"], "another checkpoint"),
    "no such map": (["--dump", "DUMP", "--names", "tensorrt"], "no such name map: tensorrt"),
    "a place that is none": (["--backend", "reference", "--json", "/nowhere/r.json"], "cannot be written"),
    "a folder that is none": (["--backend", "reference", "--html", "/nowhere/r.html"], "/nowhere: no such folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_checked(folder, tmp_path, case):
    arguments, part = WRONG[case]
    dump = dumped(tmp_path / "d.safetensors", {"embed": np.ones((40, 64))})
    arguments = [dump if argument == "DUMP" else argument for argument in arguments]
    assert part in refused("check", folder / "g.safetensors", *arguments)
    assert list(tmp_path.iterdir()) == [dump]


def test_another_model_shows_both_digests(folder):
    message = refused("check", folder / "g.safetensors", "--backend", "reference", "--model", CHECKPOINTS / "llama/hf")
    assert load_golden(folder / "g.safetensors").provenance.config_sha256 in message
    assert "expected: config sha256" in message


def test_a_golden_that_is_none(folder, tmp_path):
    dump = dumped(tmp_path / "d.safetensors", {"embed": np.ones((40, 64))})
    assert "not a golden" in refused("check", dump, "--backend", "reference")
    assert str(tmp_path / "no") in refused("check", tmp_path / "no", "--backend", "reference")


@pytest.mark.parametrize(
    ("name", "array", "part"),
    [("embed", np.ones((39, 64)), "wrong shape"), ("embed", np.full((40, 64), "x"), "real numbers")],
)
def test_a_dump_that_does_not_fit(folder, tmp_path, name, array, part):
    np.savez(tmp_path / "d.npz", **{name: array})
    assert part in refused("check", folder / "g.safetensors", "--dump", tmp_path / "d.npz")
