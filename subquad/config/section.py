"""The base class of the recipe's sections, and the types that their fields share."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from subquad.registry import STAGES

KeyPath = tuple[str, ...]
NonEmptyStr = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def format_value(value: Any) -> str:
    """A value as JSON or YAML writes it, cut to 60 characters."""
    text = repr(value) if isinstance(value, str | float) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def raise_validation_error(mistakes: list[tuple[KeyPath, object, Any]]) -> NoReturn:
    """Raises one ValidationError for all mistakes: (path below the validated value, message, value)."""
    details = [
        InitErrorDetails(type=PydanticCustomError("value_error", "{error}", {"error": str(m)}), loc=path, input=value)
        for path, m, value in mistakes
    ]
    raise ValidationError.from_exception_data("recipe", details)


class Section(BaseModel):
    """A mapping in the recipe. Types are strict (no boolean or text for a number, no nan or inf), unknown keys are
    refused, and a validated section is immutable."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    SHORTHAND: ClassVar[str | None] = None
    """The key that a bare value in place of the mapping stands for."""

    @model_validator(mode="before")
    @classmethod
    def _expand_shorthand(cls, value: Any) -> Any:
        is_bare = value is not None and not isinstance(value, Mapping | BaseModel)
        return {cls.SHORTHAND: value} if cls.SHORTHAND is not None and is_bare else value

    @field_validator("*", mode="before")
    @classmethod
    def _read_integral_floats(cls, value: Any) -> Any:
        """Reads `1e6`, which is a float in YAML, as an integer; fields of floats convert it back."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


def read_stage(named: tuple[str, Any]) -> Section:
    """The section of a stage of another package, from its name and its value."""
    name, value = named
    if name not in STAGES:
        raise PydanticCustomError("extra_forbidden", "unknown stage")
    return STAGES[name].Options.model_validate(value)
