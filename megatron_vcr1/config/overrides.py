"""The command-line options `--section.key VALUE` and `--section.list.INDEX.key VALUE`, which override a TOML file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_vcr1.config.schema import entry_class, section_classes
from megatron_vcr1.errors import UserError

Key = tuple[str | int, ...]
"""Position of a value: ("parallel", "tensor"), or ("data", "sources", 0, "manifest") in an array of tables."""

_MAX_INDEX_DIGITS = 6


def parse_overrides(options: Sequence[str]) -> dict[Key, str]:
    """Parse `--section.key VALUE` and `--section.key=VALUE` options. If a key is given twice, the last value wins.

    Raises:
        UserError: an option has another form, has no value, or names an unknown section or list.
    """
    overrides: dict[Key, str] = {}
    remaining = iter(options)
    for option in remaining:
        name, equals, value = option.partition("=")
        key = _parse_key(option, name)
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise UserError(f"{name} needs a value: {name} VALUE")
        overrides[key] = value  # pydantic converts the text to a number, boolean or list
    return overrides


def apply_overrides(tables: Mapping[str, Any], overrides: Mapping[Key, str]) -> dict[str, Any]:
    """Return the tables with the overridden values. The index after the last entry of a list adds an entry.

    Raises:
        UserError: an index is too high.
    """
    merged = dict(tables)
    # Sorted, so that an empty list (`--data.sources=`) comes before its new entries, and entries are added in order.
    for (section, key, *entry), value in sorted(overrides.items()):
        table = merged.get(str(section), {})
        # If the file sets the section to something that is not a table, leave it: validation reports it.
        if not isinstance(table, dict):
            continue
        if entry:
            new_value: Any = _with_entry(table.get(str(key), []), (str(section), str(key), *entry), value)
        else:
            new_value = [] if value == "" and _is_list_of_tables(str(section), str(key)) else value
        merged[str(section)] = {**table, key: new_value}
    return merged


def option_name(key: Key) -> str:
    """Return the option that sets a key, such as --data.sources.0.manifest."""
    return f"--{'.'.join(map(str, key))}"


def suggest(unknown: str, known: Iterable[str]) -> str:
    """Suggest the known name that resembles an unknown one most, or list all known names."""
    known = list(known)
    close = difflib.get_close_matches(unknown, known, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"


def _parse_key(option: str, name: str) -> Key:
    section, *keys = name.removeprefix("--").split(".")
    if not (name.startswith("--") and section and keys and all(keys)):
        raise UserError(
            f"{option}: unknown option; settings are given as --section.key VALUE (`vcr1 config` lists them)"
        )
    if section not in section_classes():
        raise UserError(f"{name}: unknown section; {suggest(section, section_classes())}")
    if len(keys) == 1:
        return section, keys[0]
    fields = section_classes()[section].model_fields
    if keys[0] not in fields:
        raise UserError(f"{name}: unknown key; {suggest(keys[0], fields)}")
    if not _is_list_of_tables(section, keys[0]):
        raise UserError(f"{name}: {section}.{keys[0]} has no keys of its own; give --{section}.{keys[0]} VALUE")
    if len(keys) != 3 or not (keys[1].isascii() and keys[1].isdecimal()) or len(keys[1]) > _MAX_INDEX_DIGITS:
        raise UserError(
            f"{name}: {section}.{keys[0]} is a list of tables; give --{section}.{keys[0]}.INDEX.KEY VALUE, with an "
            "index from 0"
        )
    return section, keys[0], int(keys[1]), keys[2]


def _is_list_of_tables(section: str, key: str) -> bool:
    field = section_classes()[section].model_fields.get(key)
    return field is not None and entry_class(field) is not None


def _with_entry(entries: Any, key: Key, value: str) -> Any:
    """Return a list of tables with one value changed, or with one more entry."""
    section, name, index, entry_key = key
    # Validation reports a list or an entry that has another form.
    if not isinstance(entries, list) or not isinstance(index, int):
        return entries
    if index > len(entries):
        raise UserError(
            f"{option_name(key)}: {section}.{name} has {len(entries)} entries, so the index can be at most "
            f"{len(entries)}, which adds one"
        )
    if index < len(entries) and not isinstance(entries[index], dict):
        return entries
    entry = {**(entries[index] if index < len(entries) else {}), entry_key: value}
    return [*entries[:index], entry, *entries[index + 1 :]]
