"""The chat template of a model directory: finding it, and trying it out before it is used.

A template is a program in the language Jinja. A damaged or hostile one can raise an error, run for ever or fill the
memory, so it renders a first conversation in a process of its own, whose CPU time and memory are limited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vcr1.data.signals import block_job_signals_in_children
from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields
from megatron_vcr1.text_files import read_text

JINJA_FILE = "chat_template.jinja"
JSON_FILES = ("chat_template.json", "tokenizer_config.json")
MAX_TEMPLATE_BYTES = 2**20

# The wall-clock limit is much longer than the CPU limit: on a busy machine, a harmless template may wait for its turn.
_CPU_LIMIT_S = 5
_WALL_LIMIT_S = 120
_MEMORY_LIMIT_BYTES = 2**30
_OUT_OF_MEMORY = 75  # exit status of the child


def read_chat_template(model_dir: Path) -> tuple[str, Path]:
    """Read a model's chat template.

    The processor's template (chat_template.jinja or chat_template.json) is preferred to the tokenizer's, which may
    support text only. Of several named templates, the one named "default" is taken.

    Returns:
        The template and the file that it comes from.

    Raises:
        UserError: there is no template, or its file is damaged.
    """
    jinja = model_dir / JINJA_FILE
    if jinja.exists():
        return read_text(jinja, max_bytes=MAX_TEMPLATE_BYTES), jinja
    for name in JSON_FILES:
        path = model_dir / name
        if path.exists() and "chat_template" in (fields := Fields.from_file(path)):
            return _default_template(fields), path
    raise UserError(f"{model_dir}: no chat template; add the model's {JINJA_FILE} or {JSON_FILES[0]}")


def _default_template(fields: Fields) -> str:
    """Return the template of the key chat_template: a string, or a list of {"name": ..., "template": ...}."""
    value = fields.values["chat_template"]
    named: Any = {"default": value}
    if isinstance(value, dict):
        named = value
    elif isinstance(value, list):
        entries = [Fields(entry, f"{fields.where}: chat_template[{index}]") for index, entry in enumerate(value)]
        named = {entry.text("name"): entry.text("template") for entry in entries}
    if "default" not in named:
        raise UserError(
            f"{fields.where}: chat_template has no template named 'default', only {', '.join(map(repr, named))}; "
            "rename the one to use"
        )
    template = named["default"]
    if not isinstance(template, str):
        raise fields.error("chat_template", "must be a template, or a list of named templates")
    return template


def check_chat_template(
    template: str, special_tokens: Mapping[str, Any], pads: Mapping[str, str], file: Path
) -> frozenset[str]:
    """Render a conversation with a text, an image and a video in a subprocess with limited CPU time and memory.

    This takes about 0.2 s: the subprocess imports Jinja, but neither torch nor transformers.

    Args:
        template: the template.
        special_tokens: the tokenizer's special tokens by their names in templates, such as eos_token.
        pads: the vision pad of each kind of part, "image" and "video".
        file: the file that it comes from, for error messages.

    Returns:
        The kinds of parts for which the template writes a pad. A template may support text only.

    Raises:
        UserError: the template has a syntax error, fails, or does not end.
    """
    request = {
        "template": template,
        "special_tokens": dict(special_tokens),
        "pads": dict(pads),
        "cpu_limit_s": _CPU_LIMIT_S,
        "memory_limit_bytes": _MEMORY_LIMIT_BYTES,
    }
    # -I: the child takes no code from the working directory or the environment.
    command = [sys.executable, "-I", str(Path(__file__).with_name("chat_template_probe.py"))]
    try:
        with block_job_signals_in_children():
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        with process:
            try:
                output, errors = process.communicate(json.dumps(request), timeout=_WALL_LIMIT_S)
            except BaseException:  # also Ctrl-C: leaving the with-block waits for the child
                process.kill()
                raise
    except subprocess.TimeoutExpired:
        raise UserError(_endless(file)) from None
    if process.returncode == 0:
        result = json.loads(output)
        if result["error"]:
            raise UserError(
                f"{file}: the chat template fails: {result['error']}; take the file of the model's publisher"
            )
        return frozenset(result["kinds"])
    if process.returncode == _OUT_OF_MEMORY or process.returncode < 0:  # ended by a signal of the resource limits
        raise UserError(_endless(file))
    raise RuntimeError(f"the subprocess that tries out the chat template failed:\n{errors}")


def _endless(file: Path) -> str:
    return (
        f"{file}: the chat template does not end within {_CPU_LIMIT_S} s, or needs too much memory, for a short "
        "conversation; take the file of the model's publisher"
    )
