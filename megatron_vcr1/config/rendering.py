"""Render a RunConfig as TOML: with descriptions for people, or bare as the record in a run directory."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from megatron_vcr1.config.schema import RunConfig, entry_class, section_classes
from megatron_vcr1.config.section import Section

LINE_WIDTH = 100  # characters


def default_config() -> RunConfig:
    """Return a RunConfig of default values; required keys get the first example of their documentation."""
    return RunConfig.model_validate({name: _required_values(section) for name, section in section_classes().items()})


def render_toml(config: RunConfig, *, documented: bool) -> str:
    """Render TOML that `load_config` reads back to an equal RunConfig.

    Args:
        config: the settings.
        documented: also render the docstring of each section and the description of each key as comments, unset keys
            as commented-out keys, and a commented-out example entry for each array of tables.
    """
    tables = ["\n".join(_render_section(name, section, documented)) for name, section in config]
    return "\n\n".join(tables) + "\n"


def _required_values(section: type[Section]) -> dict[str, Any]:
    return {key: (field.examples or [None])[0] for key, field in section.model_fields.items() if field.is_required()}


def _render_section(name: str, section: Section, documented: bool) -> Iterator[str]:
    """Yield the lines of a section: its plain values first, then its arrays of tables, as TOML requires."""
    if documented:
        yield from _comment(type(section).__doc__ or "")
    yield f"[{name}]"
    yield from _render_values(section, documented)
    for key, field in type(section).model_fields.items():
        if (entry_type := entry_class(field)) is None:
            continue
        if documented:
            yield ""
            yield from _comment(_description(field))
            example = entry_type.model_validate(_required_values(entry_type))
            for line in _render_entry(name, key, example, documented=True):
                yield line if line.startswith("#") else f"# {line}"
        for entry in getattr(section, key):
            yield ""
            yield from _render_entry(name, key, entry, documented=False)


def _render_entry(name: str, key: str, entry: Section, *, documented: bool) -> Iterator[str]:
    """Yield the lines of one entry of an array of tables."""
    yield f"[[{name}.{key}]]"
    yield from _render_values(entry, documented)


def _render_values(section: Section, documented: bool) -> Iterator[str]:
    """Yield the lines of the keys with plain values, leaving out arrays of tables."""
    for key, field in type(section).model_fields.items():
        if entry_class(field) is not None:
            continue
        value = getattr(section, key)
        if documented:
            yield from _comment(_description(field))
        if value is not None:
            yield f"{key} = {_toml_value(value)}"
        elif documented:
            yield f"# {key} ="  # TOML has no null: an unset key is left out


def _description(field: FieldInfo) -> str:
    return f"{field.description} Required." if field.is_required() else f"{field.description}"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, LINE_WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    # Strings, numbers, booleans and lists of them are written the same way in JSON and TOML.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
