"""With no MLX, or one too old: a message with what to do, and everything else works. Most of this needs no MLX."""

import subprocess
import sys

import pytest

from tests.checkpoint_files import CHECKPOINTS, copied, edit_json
from tests.cli.run import refused, run

WITHOUT_MLX = "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = sys.modules['mlx_lm'] = None\n"


def python(program: str) -> subprocess.CompletedProcess[str]:
    hangs = 600  # seconds: compiling every kernel takes a minute on an idle machine
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=hangs)


def without_mlx(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process where MLX cannot be imported."""
    return python(f"{WITHOUT_MLX}from assay.cli.main import main; main({[str(a) for a in arguments]})")


def test_without_mlx(tmp_path):
    """Every command but those that measure or inject for minutes, in one process where importing MLX fails."""
    model, golden = CHECKPOINTS / "llama/hf", tmp_path / "g.safetensors"
    commands = [
        ["demo"],
        ["inspect", CHECKPOINTS / "gpt_oss/mlx"],
        ["verify", CHECKPOINTS / "gpt_oss/mlx", "--same-as", CHECKPOINTS / "gpt_oss/hf"],
        ["convert", model, tmp_path / "mlx", "--to", "mlx", "--quant", "affine4/32"],
        ["synth", "smollm2-135m", "--to", "mlx", "--layers", 1, "--out", tmp_path / "synthetic"],
        ["vectors", "--out", tmp_path / "vectors"],
        ["mistakes"],
        ["record", model, "--tokens", "9,10,11", "--out", golden],
        ["check", golden, "--backend", "cpu"],
        ["generate", model, "--tokens", "9", "--max-tokens", 2, "--backend", "cpu"],
    ]
    done = python(
        f"{WITHOUT_MLX}from assay.cli.main import main\n"
        f"for command in {[[str(word) for word in command] for command in commands]}:\n"
        "    try:\n        main(command)\n"
        "    except SystemExit as exit:\n        assert not exit.code, (command, exit.code)\n"
        "assert {name for name in sys.modules if name.startswith('mlx')} == {'mlx', 'mlx.core', 'mlx_lm'}"
    )
    assert done.returncode == 0, done.stderr
    for backend in (
        ("check", golden, "--backend", "metal"),
        ("generate", model, "--tokens", "9", "--backend", "metal"),
    ):
        refused = without_mlx(*backend)
        assert refused.returncode == 2
        assert refused.stderr.startswith("assay: backend 'metal' needs")
        assert refused.stderr.endswith("what to do: pip install 'assay[metal]'\n")
    refused = without_mlx("check", golden, "--backend", "mlx-lm")
    assert refused.returncode == 2
    assert refused.stderr.startswith("assay: backend 'mlx-lm' needs MLX\n")
    assert refused.stderr.endswith("what to do: pip install 'assay[metal,peers]'\n")


def with_version(version: str) -> subprocess.CompletedProcess[str]:
    """Import the MLX path beside something that calls itself MLX of this version."""
    return python(
        "import sys, types; core = types.ModuleType('mlx.core'); mlx = types.ModuleType('mlx'); mlx.core = core\n"
        f"core.__version__ = {version!r}; sys.modules |= {{'mlx': mlx, 'mlx.core': core}}\n"
        "from assay.loaders.errors import CheckpointError\n"
        "try:\n    import assay.fast.metal\nexcept CheckpointError as error:\n    print(error)"
    )


@pytest.mark.parametrize("version", ["0.29.3", "0.9.0", "0.29.0.dev20251001"])
def test_too_old(version):
    assert with_version(version).stdout == (
        f"MLX {version} is not supported\n  expected: 0.30 or later\n"
        "  what to do: pip install 'assay[metal]' --upgrade\n"
    )


@pytest.mark.parametrize("version", ["0.30.0", "1.0.0", "0.31.0.dev2025"])
def test_new_enough(version):
    """It goes on, to what that empty module lacks."""
    done = with_version(version)
    assert done.stdout == ""
    assert "module 'mlx.core' has no attribute" in done.stderr


LLAMA = CHECKPOINTS / "llama/hf"


def generated(backend: str, *arguments: object, model: object = LLAMA) -> list[int]:
    result = run("generate", model, "--tokens", "9,10,11", "--max-tokens", 12, "--backend", backend, *arguments)
    assert result.status == 0, result
    return [int(word) for word in result.out.split()]


@pytest.mark.peers
@pytest.mark.parametrize("sampling", [(), ("--temperature", 1.3, "--seed", 4), ("--repetition-penalty", 1.5)], ids=str)
def test_generate(sampling):
    """All three engines choose, or draw, the same tokens."""
    ids = generated("reference", *sampling)
    assert len(ids) == 12
    assert generated("metal", *sampling) == generated("cpu", *sampling) == ids


@pytest.mark.peers
def test_generate_ends_after_a_stop_token(tmp_path):
    """Though the device is a token ahead."""
    ids = generated("metal", "--mode", "bfloat16")
    assert ids[2] not in ids[:2]
    folder = copied("llama/hf", tmp_path / "hf")
    edit_json(folder / "generation_config.json", lambda c: c.__setitem__("eos_token_id", [1, ids[2]]))
    assert generated("metal", "--mode", "bfloat16", model=folder) == ids[:3]


def test_modes_are_the_backend_s_own():
    for backend, known in (("cpu", "exact, q8"), ("metal", "float32, bfloat16"), ("reference", "none")):
        message = refused("generate", LLAMA, "--tokens", "9", "--backend", backend, "--mode", "int4")
        assert f"backend '{backend}' has no mode 'int4'" in message
        assert f"expected: {known}" in message
