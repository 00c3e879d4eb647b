"""Chat templates: the text that a checkpoint wants a conversation written as.

A template is a program from a file that anyone may have made: it runs in jinja2's sandbox, where nothing but strings,
lists and what is named here can be reached.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from assay.loaders.checkpoint import Checkpoint
from assay.loaders.errors import CheckpointError
from assay.loaders.gguf_file import read_gguf
from assay.loaders.json_text import read_json

KEY = "tokenizer.chat_template"
ADDITIONAL = "additional_chat_templates"  # transformers' folder of NAME.jinja beside chat_template.jinja


def chat_tokens(checkpoint: Checkpoint, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation, up to where the model's answer begins.

    A message has a `role` (system, user, assistant) and its `content`. Raises CheckpointError where the checkpoint
    has no template, or one that fails.
    """
    if checkpoint.format == "gguf":
        metadata = read_gguf(checkpoint.path).metadata
        ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        special = {f"{name}_token": _token(checkpoint, i) if isinstance(i, int) else "" for name, i in ids.items()}
        template = metadata.get(KEY)
    else:
        template, special = templates_of(checkpoint.path).get(KEY), _special_tokens(checkpoint.path)
    if not isinstance(template, str):
        raise CheckpointError(
            "no chat template here", where=checkpoint.path, remedy="give the whole text with --prompt"
        )
    text = render(template, messages, special, checkpoint.path)
    return list(checkpoint.tokenizer.encode(text, add_special_tokens=False).ids)


def render(template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str], where: Path) -> str:
    """A template filled in, with the settings and names that transformers gives it (utils/chat_template_utils.py)."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    # jinja2's own filter would escape what HTML does not want
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except (TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"the chat template fails: {error}", where=where) from error


def templates_of(directory: Path) -> dict[str, Any]:
    """The chat templates of a directory as a GGUF's metadata: the default one, and others under their names.

    Raises CheckpointError for files that hold no templates.
    """
    jinja, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if jinja.exists():
        named = {path.stem: _text(path) for path in sorted((directory / ADDITIONAL).glob("*.jinja"))}
        named["default"] = _text(jinja)
    else:
        named = _named(read_json(config).get("chat_template") if config.exists() else None, config)
    values: dict[str, Any] = {f"{KEY}.{name}": text for name, text in named.items() if name != "default"}
    if values:
        values["tokenizer.chat_templates"] = sorted(name for name in named if name != "default")
    return values | ({KEY: named["default"]} if "default" in named else {})


def template_entry(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat templates of a GGUF as an entry of tokenizer_config.json."""
    named = {key.removeprefix(f"{KEY}."): text for key, text in metadata.items() if key.startswith(f"{KEY}.")}
    default = metadata.get(KEY)
    if not named:
        return default
    everything = named if default is None else {"default": default, **named}
    return [{"name": name, "template": text} for name, text in everything.items()]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the chat template cannot be read: {error}", where=path) from error


def _named(entry: object, where: Path) -> dict[str, str]:
    """The templates of a tokenizer_config.json by name: a text, or a list of records with a name and a template."""
    if entry is None or isinstance(entry, str):
        return {} if entry is None else {"default": entry}
    records = entry if isinstance(entry, list) and all(isinstance(record, dict) for record in entry) else [{}]
    named = {record.get("name"): record.get("template") for record in records}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise CheckpointError("chat_template is neither a text nor a list of names and templates", where=where)
    return named


def _token(checkpoint: Checkpoint, i: int) -> str:
    return checkpoint.tokenizer.id_to_token(int(i)) or ""


def _special_tokens(directory: Path) -> dict[str, str]:
    """bos_token and eos_token of tokenizer_config.json, each a text or a record with one."""
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    values = {name: config.get(name) for name in ("bos_token", "eos_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
