"""Finding a chat template, and refusing one that fails or does not end."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.data import processor as processor_module
from megatron_vcr1.data.chat_template import check_chat_template, read_chat_template
from megatron_vcr1.data.messages import MessageError
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import CaptionTarget
from megatron_vcr1.types import Image, Sample, Video
from tests.data.model_dirs import CHAT_TEMPLATE
from tests.data.tiny_processor import CHAT_TEMPLATE as TINY_CHAT_TEMPLATE
from tests.data.tiny_processor import tiny_processor

ENDLESS_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
NAMED = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "text"}]


@pytest.mark.parametrize("value", ["text", NAMED, {"tool_use": "tool", "default": "text"}])
@pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json"])
def test_the_default_template_is_taken(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / name).write_text(json.dumps({"chat_template": value}))
    assert read_chat_template(tmp_path) == ("text", tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text("of its own")
    assert read_chat_template(tmp_path) == ("of its own", tmp_path / "chat_template.jinja")


@pytest.mark.parametrize(
    "value, message",
    [
        (7, "chat_template is 7; it must be a template"),
        ([], "chat_template has no template named 'default'"),
        (NAMED[:1], "chat_template has no template named 'default', only 'tool_use'; rename the one to use"),
        (["text"], r"chat_template\[0\]: expected a JSON object, got a text"),
        ([{"name": "default"}], r"chat_template\[0\]: lacks 'template'"),
        ([{"name": 1, "template": "x"}], r"chat_template\[0\]: name is 1; it must be a string"),
        ({"default": ["x"]}, "chat_template is .*; it must be a template"),
    ],
)
def test_a_malformed_template_is_named(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(UserError, match=rf"chat_template\.json: {message}"):
        read_chat_template(tmp_path)


def test_a_missing_template_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no chat template; add the model's chat_template\.jinja"):
        read_chat_template(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        TINY_CHAT_TEMPLATE,
        "{{ messages | tojson }}{% generation %}x{% endgeneration %}{{ strftime_now('%Y') }}{{ eos_token + 'x' }}",
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages }}",
        "{% for message in messages %}{{ message }}{% break %}{% endfor %}",
    ],
)
def test_harmless_templates_are_accepted(template: str) -> None:
    check_chat_template(template, {"eos_token": "<|im_end|>"}, PADS, Path("t"))


@pytest.mark.parametrize(
    "template, message",
    [
        ("line\n{% for %}", "line 2: "),
        ("{{ messages", "line 1: "),
        ("{% for message in messages %}{{ message.role }}{% endfor %}", "it does not write the text of a message"),
        ("{{ raise_exception('not this model') }}", "TemplateError: not this model"),
        ("{{ messages.nothing.at_all }}", "UndefinedError: "),
        ("{{ 'text' + 1 }}", "TypeError: "),
        ("{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError: "),
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "RecursionError: "),
    ],
)
def test_a_template_that_fails_is_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^t: the chat template fails: {message}"):
        check_chat_template(template, {}, PADS, Path("t"))


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS_LOOP,
        "{% if messages | length > 1 %}" + ENDLESS_LOOP + "{% endif %}",
        "{{ 'x' * 10000000000 }}",
        "{{ (9 ** 9 ** 9) ** 99999999 }}",
    ],
)
def test_a_template_that_does_not_end_is_refused(template: str) -> None:
    start = time.thread_time()
    with pytest.raises(UserError, match=r"^t: the chat template does not end within 5 s, or needs too much memory"):
        check_chat_template(template, {}, PADS, Path("t"))
    assert time.thread_time() - start < 5  # the work is done, and ended, in another process


@pytest.mark.parametrize(
    "template, kinds",
    [
        (CHAT_TEMPLATE, {"image", "video"}),
        (TINY_CHAT_TEMPLATE, {"image", "video"}),
        (TINY_CHAT_TEMPLATE.replace("<|image_pad|>", ""), {"video"}),
        ("{% for message in messages %}{{ message.role }}{{ message.content }}{% endfor %}", set()),
    ],
)
def test_the_kinds_of_parts_that_a_template_supports_are_found(template: str, kinds: set[str]) -> None:
    assert check_chat_template(template, {}, PADS, Path("t")) == kinds


def test_a_template_for_text_only_is_refused_for_videos_at_the_start() -> None:
    processor = replace(tiny_processor(), template_kinds=frozenset())
    sample = Sample("a", (Video("a.mp4"),), CaptionTarget("x"))
    with pytest.raises(UserError, match=r"writes no <\|video_pad\|>, and the samples have videos"):
        processor.check_samples([sample])
    with pytest.raises(UserError, match=r"writes no <\|image_pad\|>, and the samples have images"):
        processor.check_samples([replace(sample, media=(Image("a.png"),))])
    processor.check_samples([])
    tiny_processor().check_samples([sample])


def test_a_template_that_begins_responses_with_think_is_refused_for_training() -> None:
    processor = tiny_processor()
    processor.check_response_start()
    template = processor.chat_template.replace("assistant ", "assistant\n<think>\n")
    with pytest.raises(UserError, match=r"writes <think> before every response.*take the Instruct edition"):
        replace(processor, chat_template=template).check_response_start()


ENDLESS_FOR_ONE_WORD = "{% if 'now' in messages[0].content[0].text %}" + ENDLESS_LOOP + "{% endif %}ok"


def test_a_template_that_does_not_end_for_certain_texts_costs_its_own_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor_module, "_RENDER_LIMIT_S", 0.2)
    processor = replace(tiny_processor(), chat_template=ENDLESS_FOR_ONE_WORD)
    for text in ("later", "now", "later"):
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        if text == "now":
            with pytest.raises(MessageError, match=r"the chat template does not end within 0\.2 s"):
                processor.render(messages)
        else:
            assert processor.render(messages) == "ok"


def test_a_template_that_refuses_a_conversation_names_the_reason() -> None:
    processor = replace(tiny_processor(), chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(MessageError, match="the chat template fails for this conversation: roles must alternate"):
        processor.render([{"role": "user", "content": "x"}])
