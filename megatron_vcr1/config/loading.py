"""Load a RunConfig from a TOML file and `--section.key VALUE` options.

A file may extend another one, and options take precedence over both. Errors name the key, where its value came from,
and what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_vcr1.config.overrides import Key, apply_overrides, option_name, parse_overrides, suggest
from megatron_vcr1.config.schema import RunConfig, entry_class, section_classes
from megatron_vcr1.config.section import Section
from megatron_vcr1.errors import UserError
from megatron_vcr1.text_files import read_toml
from megatron_vcr1.user_paths import expand_path

Tables = Mapping[str, Any]  # a parsed TOML file, for example {"parallel": {"tensor": 2}}

EXTENDS = "extends"
"""Top-level key that names the file whose settings a file extends."""


@dataclass(frozen=True, slots=True)
class _File:
    """A TOML file of settings, without its `extends` key."""

    path: Path
    tables: Tables


def load_config(path: Path, options: Sequence[str] = ()) -> RunConfig:
    """Load the settings of a run. Options take precedence over the file, and the file over the one that it extends.

    Args:
        path: the TOML file. Its key `extends` may name another file, relative to the file's own folder. Tables are
            merged, lists and arrays of tables are replaced. Paths in both files are relative to the working directory.
        options: command-line options, for example `["--parallel.tensor", "2", "--data.sources.0.thinking=false"]`.

    Raises:
        UserError: a file cannot be read, or a key is unknown, missing or has an invalid value. All problems with
            keys are reported at once, one per line.
    """
    overrides = parse_overrides(options)
    files = _read_files(path)
    tables = apply_overrides(_merge(files), overrides)
    try:
        return _with_python_path(RunConfig.model_validate(tables), files)
    except ValidationError as error:
        lines = [_explain(detail, files, overrides) for detail in error.errors()]
        raise UserError("\n".join(lines)) from None


def _with_python_path(config: RunConfig, files: Sequence[_File]) -> RunConfig:
    """Fill in data.python_path, so that the copy of the settings in a run directory also finds the user's modules."""
    data = config.data
    if data.python_path is not None or not (data.tasks or any(source.rewards for source in data.sources)):
        return config
    # Modules lie beside the file that names them, which may be the one that the other file extends.
    key = "tasks" if data.tasks else "sources"
    naming = [file.path for file in files if key in file.tables.get("data", {})]
    folder = (naming or [files[0].path])[0].absolute().parent
    return config.model_copy(update={"data": data.model_copy(update={"python_path": folder})})


def _read_files(path: Path) -> list[_File]:
    """Read a file and the file that it extends, the extended file last."""
    if not path.exists():
        raise UserError(f"{path}: no such file; `vcr1 config` prints one to start from")
    tables = read_toml(path)
    if EXTENDS not in tables:
        return [_File(path, tables)]
    name = tables.pop(EXTENDS)
    if not isinstance(name, str) or not name:
        raise UserError(f'{path}: {EXTENDS}: must be the path of a TOML file, not {name!r}; write {EXTENDS} = "a.toml"')
    try:
        base_path = path.parent / expand_path(name)
    except UserError as error:
        raise UserError(f"{path}: {EXTENDS}: {error}") from None
    if not base_path.exists():
        raise UserError(f"{path}: {EXTENDS}: {base_path}: no such file; the path is relative to {path.parent}")
    base = read_toml(base_path)
    if EXTENDS in base:
        raise UserError(
            f"{path}: {EXTENDS}: {base_path} extends another file itself, and only one level is possible; extend a "
            "file that is complete"
        )
    return [_File(path, tables), _File(base_path, base)]


def _merge(files: Sequence[_File]) -> dict[str, Any]:
    """Merge the tables of the files section by section; the first file takes precedence."""
    merged: dict[str, Any] = {}
    for file in reversed(files):
        for section, table in file.tables.items():
            below = merged.get(section)
            is_merged = isinstance(table, dict) and isinstance(below, dict)
            merged[section] = {**below, **table} if is_merged else table  # type: ignore[dict-item]
    return merged


def _explain(detail: Mapping[str, Any], files: Sequence[_File], overrides: Mapping[Key, str]) -> str:
    """Turn one of pydantic's error details into a line that says where the value came from and what to do."""
    loc: Key = detail["loc"]
    if not loc:  # raised by a validator of RunConfig: its message names the keys of all sections that it compares
        return f"{_origins(files[0].path, overrides)}: {detail['ctx']['error']}"
    section, *keys = (str(part) for part in loc)
    name = ".".join([section, *keys])
    path = _origin(loc, files)
    # `--data.sources= --data.sources.0.manifest x` sets a list and its entry: the longest key is the most precise.
    option = max((key for key in overrides if loc[: len(key)] == key), key=len, default=None)
    source = option_name(option) if option else f"{path}: {name}"
    match detail["type"]:
        case "missing":
            return f"{source}: missing; add it to the file" + (
                f" or give --{name} VALUE" if keys else f" as a table [{section}]"
            )
        case "extra_forbidden" if keys:
            return f"{source}: unknown key; {suggest(keys[-1], _fields_of(section, keys[:-1]))}"
        case "extra_forbidden":
            return f"{source}: unknown section; {suggest(section, [*section_classes(), EXTENDS])}"
        case "value_error" if not keys:  # raised by a section's own validator, whose message names the keys
            where = _origins(path, [key for key in overrides if key[0] == section])
            return f"{where}: {section}: {detail['ctx']['error']}"
        case "value_error":
            return f"{source}: {detail['ctx']['error']}"
        case "tuple_type":
            return f"{source}: must be a list, not {detail['input']!r}; {_list_advice(section, keys[0])}"
    return f"{source}: {detail['msg'][0].lower()}{detail['msg'][1:]}, not {detail['input']!r}"


def _origins(path: Path, overrides: Collection[Key]) -> str:
    """Return where values come from that do not fit together: the file, and options if any are given."""
    return f"{path} and the command line" if overrides else str(path)


def _origin(loc: Key, files: Sequence[_File]) -> Path:
    """Return the file that sets a value; the first file if none does."""
    for file in files:
        table: Any = file.tables.get(str(loc[0]))
        is_set = table is not None if len(loc) == 1 else isinstance(table, dict) and str(loc[1]) in table
        if is_set:
            return file.path
    return files[0].path


def _fields_of(section: str, keys: Sequence[str]) -> Iterable[str]:
    """Return the known keys of a section, or of an entry of its array of tables.

    Args:
        section: the section's name.
        keys: empty for the section itself; for an entry, the array's key and the entry's index.
    """
    section_class: type[Section] = section_classes()[section]
    entry = entry_class(section_class.model_fields[keys[0]]) if keys else None
    return (entry or section_class).model_fields


def _list_advice(section: str, key: str) -> str:
    """Explain how a list is written: plainly, or as one table for each entry."""
    if entry_class(section_classes()[section].model_fields[key]) is None:
        return "write it in square brackets"
    return f"write one table [[{section}.{key}]] for each entry, or give --{section}.{key}.INDEX.KEY VALUE"
