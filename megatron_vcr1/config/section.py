"""What all settings are made of."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

Name = TypeVar("Name")


def _split(value: Any) -> Any:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


# A TOML list of names, or on the command line `a,b` (nothing: the empty list).
Names = Annotated[tuple[Name, ...], BeforeValidator(_split)]


class Section(BaseModel):
    """A table of the TOML file. Unknown keys are errors; values never change once loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")
