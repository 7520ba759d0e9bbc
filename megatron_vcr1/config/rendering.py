"""A RunConfig as TOML text: documented for people, bare for a run's record of its settings."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from megatron_vcr1.config.schema import RunConfig, Section, section_types, table_type

LINE_WIDTH = 100


def default_config() -> RunConfig:
    """Every key at its default; the required ones at their documented example."""
    return RunConfig.model_validate({name: _required_keys(section) for name, section in section_types().items()})


def render_toml(config: RunConfig, *, documented: bool) -> str:
    """TOML that `load_config` reads back to an equal RunConfig.

    Args:
        config: what to write.
        documented: put the section's and every key's description above it, unset keys as comments, and an example of
            each list of tables.
    """
    tables = ["\n".join(_render_section(name, section, documented)) for name, section in config]
    return "\n\n".join(tables) + "\n"


def _required_keys(section: type[Section]) -> dict[str, Any]:
    return {key: (field.examples or [None])[0] for key, field in section.model_fields.items() if field.is_required()}


def _render_section(name: str, section: Section, documented: bool) -> Iterator[str]:
    if documented:
        yield from _comment(type(section).__doc__ or "")
    yield f"[{name}]"
    yield from _render_keys(section, documented)
    for key, field in type(section).model_fields.items():
        if (entry_type := table_type(field)) is None:
            continue
        if documented:
            yield ""
            yield from _comment(_description(field))
            example = entry_type.model_validate(_required_keys(entry_type))
            yield from (
                line if line.startswith("#") else f"# {line}" for line in _render_entry(name, key, example, True)
            )
        for entry in getattr(section, key):
            yield from ("", *_render_entry(name, key, entry, False))


def _render_entry(name: str, key: str, entry: Section, documented: bool) -> Iterator[str]:
    yield f"[[{name}.{key}]]"
    yield from _render_keys(entry, documented)


def _render_keys(section: Section, documented: bool) -> Iterator[str]:
    """The keys that are values, not lists of tables."""
    for key, field in type(section).model_fields.items():
        if table_type(field) is not None:
            continue
        value = getattr(section, key)
        if documented:
            yield from _comment(_description(field))
        if value is not None:
            yield f"{key} = {_toml_value(value)}"
        elif documented:
            yield f"# {key} ="


def _description(field: FieldInfo) -> str:
    return f"{field.description} Required." if field.is_required() else f"{field.description}"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, LINE_WIDTH, initial_indent="# ", subsequent_indent="# ")


def _toml_value(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists of them are TOML's too.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
