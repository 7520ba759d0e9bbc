"""Base class of all sections, and the list types that their fields use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from megatron_vcr1.user_paths import expand_path

Name = TypeVar("Name")
Entry = TypeVar("Entry", bound="Section")


def _split_at_commas(value: Any) -> Any:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _wrap_in_list(value: Any) -> Any:
    return ([value] if value else []) if isinstance(value, str) else value


def _parse_assignments(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    pairs = (item.rpartition("=") for item in value.split(",") if item.strip())
    return {name.strip(): number.strip() for name, _, number in pairs}


# A list of names or numbers. A TOML list, or `a,b` on the command line; an empty value there gives an empty list.
Names = Annotated[tuple[Name, ...], BeforeValidator(_split_at_commas)]
# A list of texts, which may contain commas. A TOML list, or on the command line a single text; an empty value there
# gives an empty list.
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_wrap_in_list)]


# Numbers by name. A TOML table, or `name=1.0,other=2.0` on the command line.
Weights = Annotated[dict[str, float], BeforeValidator(_parse_assignments)]


class Section(BaseModel):
    """A table of the TOML file. Immutable; unknown keys, infinities and NaN are errors.

    `~` and environment variables in paths are expanded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _expand_paths(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, str | Path) and Path in (annotation, *get_args(annotation)):
            return expand_path(str(value))
        return value


def with_default_thinking(entries: tuple[Entry, ...], info: ValidationInfo) -> tuple[Entry, ...]:
    """Give the entries that do not set `thinking` the value of their section, so that every entry has its final value.

    Args:
        entries: the entries of an array of tables.
        info: pydantic's record of the section's fields that come before the array.
    """
    # Not in `data` if it is invalid itself: pydantic reports that.
    default = info.data.get("thinking", True)
    return tuple(
        entry if "thinking" in entry.model_fields_set else entry.model_copy(update={"thinking": default})
        for entry in entries
    )
