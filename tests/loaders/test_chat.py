"""Chat templates filled in by hand, found in every container, and kept inside the sandbox."""

from pathlib import Path

import pytest

from assay.loaders import CheckpointError, open_checkpoint
from assay.loaders.chat import chat_tokens, render
from assay.loaders.convert import convert
from tests.checkpoint_files import copied, edit_json

HELLO = [{"role": "user", "content": "Hello <b>"}]
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {% if message.role == 'user' %}
[{{ message['content'] | trim }}]
    {% endif %}
{%- endfor %}
{% if add_generation_prompt %}
>
{% endif %}"""
FILLED = "<s>[Hello <b>]\n>\n"  # block tags leave neither the white space before them nor the line's end behind


def filled(template: str, messages=HELLO) -> str:
    return render(template, messages, {"bos_token": "<s>"}, Path("model"))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (TEMPLATE, FILLED),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello <b>"}]'),
        ("{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}{% endfor %}x", "x"),
        ("{{ eos_token }}{{ tools is defined }}", "False"),
    ],
)
def test_render(template, text):
    assert filled(template) == text


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "the chat template fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
    ],
)
def test_what_a_template_cannot_do(template, part):
    with pytest.raises(CheckpointError, match=part):
        filled(template)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "named"])
def test_every_container(where, tmp_path):
    """The template in its two places, and in a GGUF made of either."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    directory = copied("llama/hf", tmp_path / "hf")
    if where == "chat_template.jinja":
        (directory / where).write_text(template)
    else:
        value = template if where != "named" else [{"name": "default", "template": template}]
        edit_json(directory / "tokenizer_config.json", lambda config: config.update(chat_template=value))
    first = open_checkpoint(directory)
    convert(first, tmp_path / "a.gguf", "gguf")
    for checkpoint in (first, open_checkpoint(tmp_path / "a.gguf")):
        bos = checkpoint.tokenizer.encode("").ids
        want = checkpoint.tokenizer.encode("user: Hello <b>\nassistant:", add_special_tokens=False).ids
        assert chat_tokens(checkpoint, HELLO) == [*bos, *want]
        assert len(want) > 5


def test_without_a_template(tmp_path):
    directory = copied("llama/hf", tmp_path / "hf")
    edit_json(directory / "tokenizer_config.json", lambda config: config.pop("chat_template", None))
    with pytest.raises(CheckpointError, match=r"no chat template here(.|\n)*--prompt"):
        chat_tokens(open_checkpoint(directory), HELLO)
