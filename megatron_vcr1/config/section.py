"""What all settings are made of."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Name = TypeVar("Name")


def _split(value: Any) -> Any:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _alone(value: Any) -> Any:
    return ([value] if value else []) if isinstance(value, str) else value


# A TOML list of names, or on the command line `a,b` (nothing: the empty list).
Names = Annotated[tuple[Name, ...], BeforeValidator(_split)]
# A TOML list of texts, which may hold commas, or on the command line one of them (nothing: the empty list).
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_alone)]


class Section(BaseModel):
    """A table of the TOML file. Unknown keys are errors, and so are inf and nan; values never change once loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
