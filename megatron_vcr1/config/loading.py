"""A TOML file and `--section.key VALUE` options become a RunConfig, or an error that names the key and its origin."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_vcr1.config.schema import RunConfig, Section, section_types, table_type
from megatron_vcr1.errors import UserError

# {"parallel": {"tensor": 2}}: what a TOML file parses to.
Tables = Mapping[str, Any]
Key = tuple[str, str]  # section, key


def load_config(path: Path, options: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration; options win over the file.

    Args:
        path: the TOML file.
        options: what the command line adds, for example `["--parallel.tensor", "2", "--model.freeze=vision_tower"]`.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing or has an impossible value.
    """
    overrides = parse_overrides(options)
    tables = _merge(_read_toml(path), overrides)
    try:
        return RunConfig.model_validate(tables)
    except ValidationError as error:
        lines = [_explain(detail, path, overrides) for detail in error.errors()]
        raise UserError("\n".join(lines)) from None


def parse_overrides(options: Sequence[str]) -> dict[Key, str]:
    """`--section.key VALUE` and `--section.key=VALUE` pairs; of two for the same key the later one wins.

    Raises:
        UserError: an option has another form, no value, or an unknown section.
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
        if section not in section_types():
            raise UserError(f"{name}: unknown section; {_nearest(section, section_types())}")
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise UserError(f"{name} needs a value: {name} VALUE")
        overrides[section, key] = value  # the schema makes numbers, booleans and lists of the text
    return overrides


def _read_toml(path: Path) -> Tables:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `vcr1 config` prints one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from None


def _merge(tables: Tables, overrides: Mapping[Key, str]) -> dict[str, Any]:
    merged = dict(tables)
    for (section, key), value in overrides.items():
        table = merged.get(section, {})
        if isinstance(table, dict):  # anything else is the file's mistake, which validation names
            merged[section] = {**table, key: value}
    return merged


def _explain(detail: Mapping[str, Any], path: Path, overrides: Mapping[Key, str]) -> str:
    """One of pydantic's error details as a line: where the value came from, what is wrong, what to do."""
    section, *keys = (str(part) for part in detail["loc"])
    name = ".".join([section, *keys])
    source = f"--{section}.{keys[0]}" if keys and (section, keys[0]) in overrides else f"{path}: {name}"
    match detail["type"]:
        case "missing":
            return f"{source}: missing; add it to the file" + (
                f" or give --{name} VALUE" if keys else f" as a table [{section}]"
            )
        case "extra_forbidden" if keys:
            return f"{source}: unknown key; {_nearest(keys[-1], _table(section, keys[:-1]).model_fields)}"
        case "extra_forbidden":
            return f"{source}: unknown section; {_nearest(section, section_types())}"
        case "value_error":  # raised by the schema's own checks, which name the key
            return f"{source}: {detail['ctx']['error']}"
        case "tuple_type":
            tables = f" as one table [[{name}]] for each" if isinstance(detail["input"], dict) else f" in {path}"
            return f"{source}: must be a list, not {detail['input']!r}; write it{tables}"
    return f"{source}: {detail['msg'][0].lower()}{detail['msg'][1:]}, not {detail['input']!r}"


def _table(section: str, keys: Sequence[str]) -> type[Section]:
    """The settings of a section, or, with keys (a list's name, a number), those of a table in its list."""
    table = section_types()[section]
    return (table_type(table.model_fields[keys[0]]) if keys else None) or table


def _nearest(wrong: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
