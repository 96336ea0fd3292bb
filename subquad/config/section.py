"""What the sections of a recipe have in common."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

from subquad.config.yaml_tree import KeyPath

NonEmptyStr = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def raise_mistakes(mistakes: Iterable[tuple[KeyPath, object]]) -> None:
    """Raises one ValidationError for all mistakes, if any: their paths below the validated value, and messages."""
    details = [
        InitErrorDetails(type=PydanticCustomError("value_error", "{error}", {"error": str(m)}), loc=path, input=None)
        for path, m in mistakes
    ]
    if details:
        raise ValidationError.from_exception_data("recipe", details)


class Section(BaseModel, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """A mapping in the recipe. No boolean or text stands for a number, and a validated section is immutable."""

    model_config = ConfigDict(frozen=True)  # as a class argument, mypy takes it for a dataclass's
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
