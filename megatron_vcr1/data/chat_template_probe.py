"""Renders short conversations with a chat template, within limits of CPU time and memory. Run as a script.

Standard input is a JSON object with the template, the tokenizer's special tokens, the vision pads and the limits.
Standard output is {"error": null, "kinds": [...]} with the kinds of parts for which the template writes a pad, or the
template's error. The script imports Jinja only, so that it starts quickly; its environment has the extensions, filters
and functions that transformers gives to chat templates.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_OUT_OF_MEMORY = 75
_MAX_ERROR_CHARACTERS = 500
_TEXT = "Question?"
_PROMPT = [
    {
        "role": "user",
        "content": [
            {"type": "video", "video": "video.mp4"},
            {"type": "image", "image": "image.png"},
            {"type": "text", "text": _TEXT},
        ],
    }
]
_TURNS = [
    {"role": "system", "content": "Be brief."},
    *_PROMPT,
    {"role": "assistant", "content": "Answer."},
    {"role": "user", "content": "Why?"},
]


class _GenerationBlocks(jinja2.ext.Extension):
    """The tag {% generation %}, with which transformers marks an assistant's turn; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def try_out(template: str, special_tokens: Mapping[str, Any], pads: Mapping[str, str]) -> dict[str, Any]:
    """Render two conversations and return the template's error, or None, and the kinds of parts that it supports.

    A template need not support several turns, or a system message. So an error in the second conversation does not
    matter; it is rendered because a loop without end may be there.
    """
    try:
        compiled = _environment().from_string(template)
        prompt = compiled.render(messages=_PROMPT, add_generation_prompt=True, **special_tokens)
        for add_generation_prompt in (True, False):
            with contextlib.suppress(jinja2.TemplateError):
                compiled.render(messages=_TURNS, add_generation_prompt=add_generation_prompt, **special_tokens)
    except jinja2.TemplateSyntaxError as error:
        return _failure(f"line {error.lineno}: {error.message}")
    except MemoryError:
        raise
    except Exception as error:  # a template can raise anything
        return _failure(f"{type(error).__name__}: {error}")
    if _TEXT not in prompt:
        return _failure("it does not write the text of a message")
    return {"error": None, "kinds": [kind for kind, pad in pads.items() if pad in prompt]}


def _failure(error: str) -> dict[str, Any]:
    return {"error": error[:_MAX_ERROR_CHARACTERS], "kinds": []}


def main() -> int:
    request = json.load(sys.stdin)
    # The kernel ends the process with SIGXCPU at the CPU limit. A core dump would only cost disk space.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_limit_s"], request["cpu_limit_s"] + 1))
    resource.setrlimit(resource.RLIMIT_AS, (request["memory_limit_bytes"],) * 2)
    try:
        result = try_out(request["template"], request["special_tokens"], request["pads"])
    except MemoryError:
        return _OUT_OF_MEMORY
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
