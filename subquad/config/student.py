"""The section of a recipe that defines the student before training."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic.types import PositiveInt

from subquad.config.section import NonEmptyStr, Section, raise_mistakes
from subquad.mixers.options import ATTENTION, SOFTMAX, find_options
from subquad.utils import UserError


class Student(Section):
    SHORTHAND = "mixer"
    mixer: NonEmptyStr = "gated_deltanet"
    """The mixer that replaces attention in every layer; `subquad mixers` lists them."""
    copy_qkv: bool = True
    """True: initialize the query, key, value and output projections from the teacher's. False: at random."""
    calibration_tokens: PositiveInt | None = 2048
    """Tokens of the training text on which `qk_activation`, `rotary`, half-lives, beta and output scales are fitted to
    the teacher's attention; null: the default initialization. Without effect if `copy_qkv` is false."""
    mixer_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of the mixer, such as `{half_life: 64}`; `subquad mixers` lists them. Calibration keeps them as given.
    With `window` and `sinks` the mixer remembers what has left a window of the teacher's attention."""
    layer_types: dict[str, Any] | None = None
    """The mixer or attention of each layer, counted from 0, in place of `mixer` and `mixer_kwargs`, such as
    `{default: gla, "1,3": attention, 4-6: {mixer: gla, short_conv: 4}}`; null: `mixer` in every layer."""
    budget: NonEmptyStr | PositiveInt | None = None
    """Bytes of the cache of one sequence, as a number of the teacher's tokens (96, to which four sinks are added) or of
    bytes (`4MB`): keeps the teacher's attention with a window for each key/value head, in place of a mixer."""
    budget_context: PositiveInt | None = None
    """With `budget`, heads may keep all tokens, at the price of as many tokens as given here; null: none does."""
    budget_memory: NonEmptyStr | None = None
    """With `budget`, a mixer that remembers, for the heads where it is worth its bytes, what has left their windows;
    null: windows only."""
    keep_groups: PositiveInt | None = None
    """Number of key/value groups that keep all tokens, those that come first in the ranking `keep_by`; the others have
    the windows of `layer_types` or of the budget. null: none."""
    keep_by: Literal["retrieval", "kl", "halo"] = "retrieval"
    """How groups are ranked: the criteria of `subquad select`."""
    export_target: NonEmptyStr | None = None
    """Restrict the student to layers of Qwen3.5 or Granite 4, so that it can be exported; null: no restriction."""

    @field_validator("mixer")
    @classmethod
    def _check_mixer(cls, name: str) -> str:
        if name != SOFTMAX:
            find_options(name)
        return name

    @field_validator("mixer_kwargs")
    @classmethod
    def _check_mixer_kwargs(cls, options: dict[str, Any], info: Any) -> dict[str, Any]:
        from subquad.modeling.layer_types import mixer_mistakes

        mixer = info.data.get("mixer")
        if mixer == SOFTMAX:
            mistakes = dict.fromkeys(options, f"unknown option; {mixer} has none")
        else:
            mistakes = {} if mixer is None else mixer_mistakes(mixer, options)
        raise_mistakes(((name,), message.removeprefix(f"{name}: ")) for name, message in mistakes.items())
        return options

    @field_validator("layer_types")
    @classmethod
    def _check_layer_types(cls, layer_types: dict[str, Any] | None, info: Any) -> dict[str, Any] | None:
        from subquad.modeling.layer_types import find_mistakes

        if layer_types is not None and info.data.get("mixer_kwargs"):
            raise UserError("got layer_types and mixer_kwargs, expected the options inside layer_types")
        if layer_types == {}:
            raise UserError("got an empty mapping, expected layer types such as `default: gla`")
        raise_mistakes(((key,), message) for key, message in find_mistakes(layer_types or {}))
        return layer_types

    @field_validator("export_target")
    @classmethod
    def _check_export_target(cls, target: str | None, info: Any) -> str | None:
        from subquad.modeling.export_target import check_mixers, find_target

        found = None if target is None else find_target(target)
        if found is not None and {"mixer", "layer_types"} <= info.data.keys():
            layer_types = info.data["layer_types"] or {"default": info.data["mixer"]}
            names = [spec if isinstance(spec, str) else spec["mixer"] for spec in layer_types.values()]
            check_mixers(names, found)
        return target

    @field_validator("budget_context", "budget_memory")
    @classmethod
    def _check_budget_options(cls, value: int | str | None, info: Any) -> int | str | None:
        if value is not None and info.data.get("budget", value) is None:
            raise UserError(f"got {value} without student.budget, expected both")
        if isinstance(value, str):
            find_options(value)
        return value

    @field_validator("budget")
    @classmethod
    def _check_budget(cls, budget: str | int | None, info: Any) -> str | int | None:
        given = [key for key in ("mixer_kwargs", "layer_types") if info.data.get(key)]
        if info.data.get("mixer") != cls.model_fields["mixer"].default:
            given.append("mixer")
        if budget is not None and given:
            raise UserError(f"got {budget!r} and {', '.join(given)}, expected a budget alone: it chooses all windows")
        return budget

    @field_validator("keep_groups")
    @classmethod
    def _check_keep_groups(cls, count: int | None, info: Any) -> int | None:
        from subquad.modeling.layer_types import keep_groups_mistake

        if count is not None and {"mixer", "layer_types", "budget"} <= info.data.keys() and not info.data["budget"]:
            mistake = keep_groups_mistake(info.data["layer_types"] or {"default": info.data["mixer"]})
            if mistake is not None:
                raise UserError(mistake)
        return count

    @staticmethod
    def has_memory(student: Any) -> bool:
        """Whether a student, as a recipe writes it, has a mixer's memory beside windows; also if a wrong value hides
        that."""
        if not isinstance(student, Mapping):
            return False
        specs = (student.get("layer_types") or {"": {"mixer": None, **(student.get("mixer_kwargs") or {})}}).values()
        written = [spec for spec in specs if not isinstance(spec, str)]
        return student.get("budget_memory") is not None or any(
            spec is None or ("window" in spec and spec.get("mixer") != ATTENTION) for spec in written
        )

    @property
    def name(self) -> str:
        """The student's name in tables: its mixer, "hybrid" if it has layer types, or its budget; and what it keeps."""
        name = self.mixer if self.layer_types is None else "hybrid"
        name = name if self.budget is None else f"budget-{self.budget}"
        return name if self.keep_groups is None else f"{name}-keep-{self.keep_groups}"
