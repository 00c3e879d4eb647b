"""The command itself: exit status, help, interruption, and bad checkpoints through every verb that opens one."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import assay.reference as reference
from assay.cli import app
from tests.checkpoint_files import CHECKPOINTS, copied
from tests.cli.run import refused, run
from tests.loaders.broken_checkpoints import BROKEN, path_of

LLAMA = CHECKPOINTS / "llama/hf"
COMMAND = [sys.executable, "-m", "assay.cli"]
VERBS = ["demo", "inspect", "record", "check", "generate"]


def test_help_lists_every_verb():
    result = run("--help")
    assert result.status == 0
    for verb in VERBS:
        assert verb in result.out
        assert run(verb, "--help").status == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["unknown"],
        ["inspect"],
        ["inspect", "x", "--unknown"],
        ["record", LLAMA],
        ["generate", LLAMA, "--max-tokens", "0"],
        ["generate", LLAMA, "--max-tokens", "many"],
        ["generate", LLAMA, "--temperature", "-1"],
        ["generate", LLAMA, "--tokens", "1", "--temperature", "nan"],
    ],
)
def test_bad_usage_is_status_2(arguments):
    result = run(*arguments)
    assert result.status == 2
    assert "Traceback" not in result.err
    assert result.out == ""


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_one_message_and_nothing_written(case, tmp_path):
    name, spoil, parts = BROKEN[case]
    folder, out = copied(name, tmp_path / name.split("/")[1]), tmp_path / "out"
    spoil(folder)
    out.mkdir()
    message = refused("record", path_of(folder), "--tokens", "1,2,3", "--out", out / "g.safetensors")
    assert all(part in message for part in parts)
    assert refused("inspect", path_of(folder), "--json") == message
    assert refused("generate", path_of(folder), "--tokens", "1,2,3", "--backend", "reference") == message
    assert list(out.iterdir()) == []


def test_a_path_that_is_not_there():
    assert "/nowhere/x.gguf: cannot be read" in refused("inspect", "/nowhere/x.gguf")


NO_MEMORY = "assay: out of memory\n  what to do: run fewer tokens, shorter --chunks or fewer --taps\n"
UNLOADED = "libx.so: failed to map segment from shared object"
ERRORS = [
    (KeyboardInterrupt(), 130, ""),
    (MemoryError(), 2, NO_MEMORY),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, NO_MEMORY),
    (ImportError(UNLOADED), 2, NO_MEMORY),
    (OSError(f"Could not load 'libllvmlite.so': {UNLOADED}"), 2, NO_MEMORY),
    (OSError(errno.EIO, "Input/output error"), 2, "assay: a file cannot be read: Input/output error\n"),
    (OSError(errno.EIO, "Input/output error", "x"), 2, "assay: [Errno 5] Input/output error: 'x'\n"),
    (OSError("no such model in the hub"), 2, "assay: no such model in the hub\n"),
    (OSError(errno.ENOSPC, "No space left"), 2, "assay: the output cannot be written: No space left\n"),
]


def failing_with(error, monkeypatch, out):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(reference, "forward", fail)
    monkeypatch.setattr(app, "drop", lambda stream: None)  # there is no file beneath what a test captures
    return run("record", LLAMA, "--tokens", "1,2", "--out", out)


@pytest.mark.parametrize(("error", "status", "message"), ERRORS)
def test_what_ends_a_command_is_one_message_and_writes_nothing(tmp_path, monkeypatch, error, status, message):
    result = failing_with(error, monkeypatch, tmp_path / "g.safetensors")
    assert (result.status, result.out, result.err) == (status, "", message)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_of_ours_does_not_say_that_a_backend_diverges(tmp_path, monkeypatch):
    result = failing_with(RuntimeError("never"), monkeypatch, tmp_path / "g.safetensors")
    assert result.status == 2
    assert "RuntimeError: never" in result.err
    assert result.err.endswith("please report it\n")


def test_out_of_memory_names_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (5 * 10**10, 10**11))
    message = failing_with(MemoryError(), monkeypatch, tmp_path / "g.safetensors").err
    assert "got: 50.00 GB, set by `ulimit -v`" in message
    assert "what to do: raise that limit, or run fewer tokens" in message


def limited(nbytes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`assay ARGUMENTS` with one thread and at most so many bytes of addresses."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes)),
        env=os.environ | {"NUMBA_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere addresses cannot be limited")
@pytest.mark.parametrize("megabytes", [150, 400])
def test_too_few_addresses_to_start(megabytes):
    """OpenBLAS would say so and exit 1, LLVM abort: neither is a verdict."""
    done = limited(megabytes * 10**6, "generate", LLAMA, "--tokens", "1,2", "--max-tokens", 1)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "assay: memory is limited too tightly to start\n  expected: at least 1.03 GB for 1 threads\n"
        f"  got: 0.{megabytes // 10} GB, set by `ulimit -v`\n"
        "  what to do: raise that limit, or give fewer threads in NUMBA_NUM_THREADS\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere addresses cannot be limited")
def test_a_file_larger_than_what_may_be_mapped(tmp_path):
    file = tmp_path / "large.gguf"
    with file.open("wb") as sparse:
        sparse.write(b"GGUF")
        sparse.truncate(4 << 30)
    done = limited(1500 * 10**6, "inspect", file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"assay: {file}: cannot be read: Cannot allocate memory\n"
        "  what to do: raise the limit that `ulimit -v` shows: a file is mapped as a whole\n"
    )


IN_A_PROCESS = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

class Finder:
    def find_spec(name, *_):
        if name == "numpy":
            {{}}

sys.meta_path.insert(0, Finder)
from assay.cli.main import main
main(["inspect", {str(LLAMA)!r}])
"""


def test_ctrl_c_while_modules_are_imported():
    script = IN_A_PROCESS.format("os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_library_that_memory_has_no_room_for():
    script = IN_A_PROCESS.format(f"raise ImportError({UNLOADED!r})")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", NO_MEMORY)


def test_the_entry_imports_next_to_nothing():
    script = "import sys, assay.cli.main; print({'numpy', 'typer', 'rich', 'assay.loaders'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_message_that_nobody_can_be_told(stderr, unbuffered):
    """Python exits 120 where what is left of a message in a buffer cannot be written either."""
    command, env = f'"{sys.executable}" -m assay.cli inspect nothing {stderr}', {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, env=os.environ | env, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")


def test_as_a_program():
    """The installed entry point's module, in a process of its own."""
    good = subprocess.run([*COMMAND, "inspect", LLAMA], capture_output=True, text=True, timeout=60)
    assert (good.returncode, good.stderr) == (0, "")
    assert "Llama" in good.stdout
    bad = subprocess.run([*COMMAND, "inspect", "nothing"], capture_output=True, text=True, timeout=60)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("assay: nothing: cannot be read")


LONG = ["generate", LLAMA, "--tokens", "1,2,3", "--max-tokens", "400", "--backend", "reference"]
OUTPUTS = [LONG, ["inspect", LLAMA, "--json"], ["inspect", LLAMA], ["--help"]]  # written by print, and by rich


@pytest.mark.parametrize("arguments", OUTPUTS)
def test_nobody_reads_the_output(arguments):
    """Neither a match nor a divergence, whatever the verb: `| head` with pipefail must not say so."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert result.returncode == 141
    assert "Error" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("arguments", OUTPUTS)
def test_output_that_cannot_be_written(arguments):
    with open("/dev/full", "w") as full:
        result = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == "assay: the output cannot be written: No space left on device\n"


def test_text_that_the_output_s_encoding_lacks():
    arguments = ["generate", LLAMA, "--prompt", "The river", "--max-tokens", "12", "--temperature", "3", "--seed", "2"]
    out = [
        subprocess.run(
            [*COMMAND, *arguments, "--backend", "reference"],
            env=os.environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout.decode(encoding)
        for encoding in ("utf-8", "ascii")
    ]
    assert not out[0].isascii()
    assert out[1] == out[0].encode("ascii", "replace").decode()


def test_utf_8_in_a_locale_that_has_none():
    """Its bytes are the prompt's all the same; only what is no UTF-8 is refused."""
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [*COMMAND, "generate", LLAMA, "--backend", "reference", "--max-tokens", "4", "--prompt"]
    prompt = "Flu\u00df".encode()
    utf8, other = (
        subprocess.run([*command, prompt], env=env, capture_output=True, timeout=60)
        for env in (os.environ | {"PYTHONUTF8": "1"}, ascii_only)
    )
    assert utf8.returncode == other.returncode == 0
    assert other.stdout == utf8.stdout.decode().encode("ascii", "replace")
    bad = subprocess.run([*command, b"caf\xe9"], env=ascii_only, capture_output=True, timeout=60)
    assert bad.stderr == b"assay: --prompt is not UTF-8: unexpected end of data at position 3\n"
