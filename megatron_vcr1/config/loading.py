"""Load a RunConfig from a TOML file and `--section.key VALUE` options.

Errors name the key, where its value came from, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_vcr1.config.schema import RunConfig, entry_class, section_classes
from megatron_vcr1.config.section import Section
from megatron_vcr1.errors import UserError
from megatron_vcr1.text_files import read_toml

Tables = Mapping[str, Any]  # a parsed TOML file, for example {"parallel": {"tensor": 2}}
Key = tuple[str, str]  # section and key, for example ("parallel", "tensor")


def load_config(path: Path, options: Sequence[str] = ()) -> RunConfig:
    """Load the settings of a run. Options take precedence over the file.

    Args:
        path: the TOML file.
        options: command-line options, for example `["--parallel.tensor", "2", "--model.freeze=vision_tower"]`.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing or has an invalid value. All problems with
            keys are reported at once, one per line.
    """
    overrides = parse_overrides(options)
    tables = _merge(_read_toml(path), overrides)
    try:
        return RunConfig.model_validate(tables)
    except ValidationError as error:
        lines = [_explain(detail, path, overrides) for detail in error.errors()]
        raise UserError("\n".join(lines)) from None


def parse_overrides(options: Sequence[str]) -> dict[Key, str]:
    """Parse `--section.key VALUE` and `--section.key=VALUE` options. If a key is given twice, the last value wins.

    Raises:
        UserError: an option has another form, has no value, or names an unknown section.
    """
    overrides: dict[Key, str] = {}
    remaining = iter(options)
    for option in remaining:
        name, equals, value = option.partition("=")
        section, dot, key = name.removeprefix("--").partition(".")
        if not (name.startswith("--") and dot and section and key):
            raise UserError(
                f"{option}: unknown option; settings are given as --section.key VALUE (`vcr1 config` lists them)"
            )
        if section not in section_classes():
            raise UserError(f"{name}: unknown section; {_suggest(section, section_classes())}")
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise UserError(f"{name} needs a value: {name} VALUE")
        overrides[section, key] = value  # pydantic converts the text to a number, boolean or list
    return overrides


def _read_toml(path: Path) -> Tables:
    if not path.exists():
        raise UserError(f"{path}: no such file; `vcr1 config` prints one to start from")
    return read_toml(path)


def _merge(tables: Tables, overrides: Mapping[Key, str]) -> dict[str, Any]:
    merged = dict(tables)
    for (section, key), value in overrides.items():
        table = merged.get(section, {})
        # If the file sets the section to something that is not a table, leave it: validation reports it.
        if isinstance(table, dict):
            merged[section] = {**table, key: value}
    return merged


def _explain(detail: Mapping[str, Any], path: Path, overrides: Mapping[Key, str]) -> str:
    """Turn one of pydantic's error details into a line that says where the value came from and what to do."""
    section, *keys = (str(part) for part in detail["loc"])
    name = ".".join([section, *keys])
    source = f"--{section}.{keys[0]}" if keys and (section, keys[0]) in overrides else f"{path}: {name}"
    match detail["type"]:
        case "missing":
            return f"{source}: missing; add it to the file" + (
                f" or give --{name} VALUE" if keys else f" as a table [{section}]"
            )
        case "extra_forbidden" if keys:
            return f"{source}: unknown key; {_suggest(keys[-1], _fields_of(section, keys[:-1]))}"
        case "extra_forbidden":
            return f"{source}: unknown section; {_suggest(section, section_classes())}"
        case "value_error":  # raised by a section's own validator, whose message names the key
            return f"{source}: {detail['ctx']['error']}"
        case "tuple_type":
            tables = f" as one table [[{name}]] for each" if isinstance(detail["input"], dict) else f" in {path}"
            return f"{source}: must be a list, not {detail['input']!r}; write it{tables}"
    return f"{source}: {detail['msg'][0].lower()}{detail['msg'][1:]}, not {detail['input']!r}"


def _fields_of(section: str, keys: Sequence[str]) -> Iterable[str]:
    """Return the known keys of a section, or of an entry of its array of tables.

    Args:
        section: the section's name.
        keys: empty for the section itself; for an entry, the array's key and the entry's index.
    """
    section_class: type[Section] = section_classes()[section]
    entry = entry_class(section_class.model_fields[keys[0]]) if keys else None
    return (entry or section_class).model_fields


def _suggest(unknown: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(unknown, known, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"
