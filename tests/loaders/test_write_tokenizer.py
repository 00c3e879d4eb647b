"""Tokenizers and chat templates carried along: the same ids in every container, or an error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.loaders.chat import templates_of
from assay.loaders.checkpoint import open_checkpoint
from assay.loaders.convert import convert
from assay.loaders.errors import CheckpointError
from assay.loaders.gguf_file import read_gguf
from assay.loaders.tokenizer import tokenizer_from_gguf
from tests.checkpoint_files import copied, edit_json, opened

TEXT = "The river's 1953 mill: WHAT YOU WATCH, \"isn't it\"?\n\n  caf\u00e9 \u4f60\u597d <|end|>"


@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_tokenizer_gives_the_same_ids_in_every_container(family: str, tmp_path: Path) -> None:
    source = opened(f"{family}/hf")
    wanted = source.tokenizer.encode(TEXT).ids
    convert(source, tmp_path / "a.gguf", "gguf")
    convert(open_checkpoint(tmp_path / "a.gguf"), tmp_path / "b", "mlx")
    convert(open_checkpoint(tmp_path / "b"), tmp_path / "c.gguf", "gguf")
    for path in ("a.gguf", "b", "c.gguf"):
        assert open_checkpoint(tmp_path / path).tokenizer.encode(TEXT).ids == wanted
    first, last = (read_gguf(tmp_path / name).metadata for name in ("a.gguf", "c.gguf"))
    for key in (key for key in first if key.startswith("tokenizer.")):
        np.testing.assert_array_equal(last[key], first[key], key)  # type: ignore[call-overload]


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_is_carried_along(where: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|start|>{{ m.role }}{{ m.content }}{% endfor %}"
    directory = copied("llama/hf", tmp_path / "hf")
    if where == "chat_template.jinja":
        (directory / where).write_text(template)
    else:
        edit_json(directory / where, lambda config: config.update(chat_template=template))
    convert(open_checkpoint(directory), tmp_path / "a.gguf", "gguf")
    assert read_gguf(tmp_path / "a.gguf").metadata["tokenizer.chat_template"] == template
    convert(open_checkpoint(tmp_path / "a.gguf"), tmp_path / "b", "mlx")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"] == template


@pytest.mark.parametrize("where", ["additional_chat_templates", "tokenizer_config.json"])
def test_several_chat_templates_are_carried_along(where: str, tmp_path: Path) -> None:
    templates = {"default": "A", "rag": "B", "tool_use": "C"}
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    directory = copied("llama/hf", tmp_path / "hf")
    if where == "additional_chat_templates":
        (directory / "chat_template.jinja").write_text("A")
        (directory / where).mkdir()
        for name in ("rag", "tool_use"):
            (directory / where / f"{name}.jinja").write_text(templates[name])
    else:
        edit_json(directory / where, lambda config: config.update(chat_template=listed))
    convert(open_checkpoint(directory), tmp_path / "a.gguf", "gguf")
    metadata = read_gguf(tmp_path / "a.gguf").metadata
    assert {key: value for key, value in metadata.items() if "template" in key} == {
        "tokenizer.chat_template": "A",
        "tokenizer.chat_template.rag": "B",
        "tokenizer.chat_template.tool_use": "C",
        "tokenizer.chat_templates": ["rag", "tool_use"],
    }
    convert(open_checkpoint(tmp_path / "a.gguf"), tmp_path / "b", "mlx")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"] == listed
    convert(open_checkpoint(directory), tmp_path / "c", "mlx")
    assert templates_of(tmp_path / "c") == templates_of(directory)


@pytest.mark.parametrize("entry", [5, ["A"], [{"name": "default"}], [{"name": 1, "template": "A"}], {"default": "A"}])
def test_chat_templates_that_are_none(entry: object, tmp_path: Path) -> None:
    directory = copied("llama/hf", tmp_path / "hf")
    edit_json(directory / "tokenizer_config.json", lambda config: config.update(chat_template=entry))
    with pytest.raises(CheckpointError, match="chat_template is neither a text nor a list"):
        convert(open_checkpoint(directory), tmp_path / "a.gguf", "gguf")
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="the chat template cannot be read"):
        convert(open_checkpoint(directory), tmp_path / "a.gguf", "gguf")


def test_ends_of_generation_that_a_gguf_has_no_room_for_are_noted(tmp_path: Path) -> None:
    directory = copied("llama/hf", tmp_path / "hf")
    assert open_checkpoint(directory).stop_tokens == (378, 382, 383)
    notes = convert(open_checkpoint(directory), tmp_path / "a.gguf", "gguf").notes
    assert notes == ("a GGUF has room for one end of generation, here 383; left out: 378, 382",)
    edit_json(directory / "generation_config.json", lambda config: config.update(eos_token_id=383))
    assert convert(open_checkpoint(directory), tmp_path / "b.gguf", "gguf").notes == ()


def test_unknown_pre_tokenizer_is_an_error_unless_named(tmp_path: Path) -> None:
    directory = copied("llama/hf", tmp_path / "hf")

    def only_spaces(content: dict[str, Any]) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": " +"}

    edit_json(directory / "tokenizer.json", only_spaces)
    with pytest.raises(CheckpointError, match="give --pre NAME"):
        convert(open_checkpoint(directory), tmp_path / "a.gguf", "gguf")
    convert(open_checkpoint(directory), tmp_path / "a.gguf", "gguf", pre="llama-bpe")
    assert read_gguf(tmp_path / "a.gguf").metadata["tokenizer.ggml.pre"] == "llama-bpe"


@pytest.mark.parametrize(
    ("rules", "name"),
    [  # as the published tokenizer.json of GPT-2, SmolLM2 and Qwen 2 have it
        ([{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}], "gpt-2"),
        (
            [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
            "smollm",
        ),
        (
            [
                {
                    "type": "Split",
                    "pattern": {
                        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                    },
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
            "qwen2",
        ),
    ],
)
def test_pre_tokenizer_is_found_by_what_it_does(rules: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    directory = copied("gpt_oss/hf", tmp_path / "hf")
    edit_json(
        directory / "tokenizer.json",
        lambda content: content.update(pre_tokenizer={"type": "Sequence", "pretokenizers": rules}),
    )
    convert(open_checkpoint(directory), tmp_path / "a.gguf", "gguf")
    assert read_gguf(tmp_path / "a.gguf").metadata["tokenizer.ggml.pre"] == name


def test_sentencepiece_keeps_its_ids(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581t", "he", "\u2581the", "\u2581", "t", "h", "e", "r", "er", "ther"]
    scores = [0.0] * 259 + [-1.0, -2.0, -3.0, -20.0, -21.0, -22.0, -23.0, -24.0, -4.0, -5.0]
    values = {
        "model": "llama",
        "tokens": pieces,
        "scores": np.array(scores, np.float32),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 10, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    tokenizer = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in values.items()})
    directory = copied("llama/hf", tmp_path / "hf")
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    convert(open_checkpoint(directory), tmp_path / "a.gguf", "gguf")
    metadata = read_gguf(tmp_path / "a.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    np.testing.assert_array_equal(metadata["tokenizer.ggml.token_type"][: len(pieces)], values["token_type"])  # type: ignore[index]
    for text in ("the other there", "ether th", "caf\u00e9 the"):
        assert open_checkpoint(tmp_path / "a.gguf").tokenizer.encode(text).ids == tokenizer.encode(text).ids


def test_a_checkpoint_without_tokenizer_says_so(tmp_path: Path) -> None:
    directory = copied("llama/hf", tmp_path / "hf")
    (directory / "tokenizer.json").unlink()
    done = convert(open_checkpoint(directory), tmp_path / "a.gguf", "gguf")
    assert done.notes == ("the source has no tokenizer.json, so no tokenizer was written",)
    done = convert(open_checkpoint(tmp_path / "a.gguf"), tmp_path / "b", "mlx")
    assert done.notes == ("the source has no tokenizer, so none was written",)


def test_a_tokenizer_that_gguf_cannot_say_is_an_error(tmp_path: Path) -> None:
    directory = copied("llama/hf", tmp_path / "hf")
    edit_json(directory / "tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(CheckpointError, match="cannot be said in GGUF: token 1 of a test text changes"):
        convert(open_checkpoint(directory), tmp_path / "a.gguf", "gguf")
    assert not (tmp_path / "a.gguf").exists()
