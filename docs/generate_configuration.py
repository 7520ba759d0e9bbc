#!/usr/bin/env python3
"""Write docs/configuration.md from the settings' schema: `python docs/generate_configuration.py`."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_vcr1.config.schema import entry_class, section_classes
from megatron_vcr1.config.section import Section

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """# Configuration

Every setting with its type, default and meaning. This page is generated from the schema
(`python docs/generate_configuration.py`); `vcr1 config` prints the same as a TOML file.

A run reads one TOML file. Every setting can be overridden on the command line as `--SECTION.KEY VALUE`, for example
`--optimizer.learning_rate 2e-6`. Tables in double brackets, such as `[[data.sources]]`, of which a file may have
several, are numbered from 0: `--data.sources.0.manifest mine.jsonl`. The number after the last table adds one, and
`--data.sources=` with nothing after it removes them all.

A file may extend another one, and then contains only what differs. This is the whole file of a run without a KL term:

```toml
extends = "examples/configs/grpo_joint.toml"

[grpo]
kl_coef = 0

[train]
run_dir = "runs/joint_without_kl"
```

The path of `extends` is relative to the folder of the file that contains it. Tables are merged; lists, and with them
all tables `[[data.sources]]`, are replaced. The extended file cannot extend a third one. `vcr1 config FILE` prints the
settings that result, and the run directory's `config.toml` contains them.

An unknown key, a value of the wrong type or an impossible combination is an error that names the key. `~` and
environment variables in paths (`"~/runs/x"`, `"$SCRATCH/x"`) are expanded. All other paths are relative to the folder
in which the command is run, also those of an extended file.
"""


def render() -> str:
    """Return the whole page as Markdown."""
    parts = [INTRODUCTION]
    for name, section in section_classes().items():
        parts.append(_section(f"[{name}]", section))
        for key, field in section.model_fields.items():
            if (table := entry_class(field)) is not None:
                parts.append(_section(f"[[{name}.{key}]]", table))
    return "\n".join(parts)


def _section(title: str, section: type[Section]) -> str:
    rows = [
        f"| `{key}` | {_type_name(field.annotation)} | {_default(field)} | {_cell(field.description or '')} |"
        for key, field in section.model_fields.items()
        if entry_class(field) is None
    ]
    introduction = " ".join((section.__doc__ or "").split())
    return "\n".join(
        [f"## {title}", "", introduction, "", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.default
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(_quoted(entry) for entry in value)}]`"
    return f"`{_quoted(value)}`"


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str | Path) else str(value)


def _type_name(annotation: Any) -> str:
    """Return the type of a setting as a reader of TOML knows it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{_quoted(value)}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(argument) for argument in arguments if argument is not NoneType)
    if origin is dict:
        return f"table of {_type_name(arguments[1])}s"
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    names = {bool: "boolean", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(annotation) or _type_name(arguments[0] if arguments else str)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
