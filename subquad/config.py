"""The recipe: everything that decides what a student becomes, as one typed, validated tree; YAML in and out.

    recipe = load_recipe("recipes/smollm2-135m.yaml", ["stages.hidden.lr=1e-3"])

A study is a recipe in which any key holds a list: `load_study` gives the product. Nothing here loads a model or reads a
corpus; whatever is wrong with a recipe is a `UserError` of one line that names file, line and key.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from subquad import yaml_tree
from subquad.errors import UserError, nearest
from subquad.yaml_tree import Node


def _whole(value: Any) -> Any:
    """`1e6` is a whole number to whoever writes it, a float to YAML."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Positive = Annotated[Whole, Field(gt=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Rate = Annotated[Number, Field(gt=0)]
Weight = Annotated[Number, Field(ge=0)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Switch = Annotated[bool, Field(strict=True)]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused and nothing changes afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Corpus(Section):
    source: Text
    """`python-stdlib`, a text file (.txt, .jsonl with the key `text`, a source file; also .gz, .xz), a directory of
    such files, or the id of a data set on the Hugging Face hub. Paths are relative to the working directory."""
    context: Annotated[Whole, Field(ge=2)] = 512
    """Tokens in a row of training or held-out text."""
    valid: Text | None = None
    """A source of held-out text; without one, about a twentieth of `source` is held out."""


class Student(Section):
    mixer: Text = "gated_deltanet"
    """What replaces the teacher's attention: one of `subquad mixers`."""
    copy_qkv: Switch = True
    """Start from the teacher's query, key, value and output projections; false: from random ones."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the mixer by name, such as `half_life: 64`."""

    @field_validator("mixer")
    @classmethod
    def _mixer_exists(cls, name: str) -> str:
        from subquad import mixers

        if name not in mixers.names():
            raise UserError(f"unknown mixer {name!r}{nearest(name, mixers.names())}")
        return name

    @field_validator("options")
    @classmethod
    def _options_exist(cls, options: dict[str, Any], info: Any) -> dict[str, Any]:
        from subquad import mixers

        mixer = info.data.get("mixer")
        if mixer == mixers.SOFTMAX and options:
            raise UserError(f"{mixer} has no options; got {', '.join(options)}")
        if mixer in mixers.REGISTRY:
            mixers.get(mixer).Options.create(options)
        return options


class Stage(Section):
    tokens: Positive
    """Tokens to train on; rounded up to whole steps."""
    lr: Rate
    """Peak learning rate."""
    batch_size: Positive = 8
    """Rows of `corpus.context` tokens in a step."""
    warmup: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises from 0 to its peak."""
    weight_decay: Weight = 0.0
    """AdamW's decoupled weight decay, on weight matrices."""
    max_grad_norm: Rate = 1.0
    """Gradients are scaled down to this norm."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the rate goes on after the warm-up: down to 0 on a line or half a cosine, or not at all."""
    copied_lr: Rate | None = None
    """Peak rate of the projections copied from the teacher; null: `lr`."""


class EndToEnd(Stage):
    ce_weight: Weight = 1.0
    """Weight of the cross-entropy with the text, a mean per token."""
    kl_weight: Weight = 1.0
    """Weight of the KL divergence from the teacher's distribution, a mean per token."""
    temperature: Rate = 1.0
    """Softens both distributions of the KL divergence."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> "EndToEnd":
        if self.ce_weight == self.kl_weight == 0:
            raise UserError("ce_weight and kl_weight are both 0; expected one of them above 0")
        return self


class Stages(Section):
    matrix: Stage | None = None
    """Stage 1: each layer's mixing matrix towards the teacher's attention matrix."""
    hidden: Stage | None = None
    """Stage 2: each layer's output towards the teacher's."""
    end_to_end: EndToEnd | None = None
    """Stage 3: the whole student, on cross-entropy and the teacher's distribution."""

    @model_validator(mode="after")
    def _one_at_least(self) -> "Stages":
        if self.matrix is self.hidden is self.end_to_end is None:
            raise UserError("no stage is left; expected at least one of matrix, hidden, end_to_end")
        return self


class Checkpoint(Section):
    every: Positive = 50
    """Steps between checkpoints."""
    keep: Positive = 2
    """Checkpoints kept; older ones are removed."""


class Evaluation(Section):
    tokens: Positive = 16_384
    """Held-out tokens on which the finished student is measured."""


class Recipe(Section):
    teacher: Text
    """`nano`, `smollm2-135m`, a model directory, a .gguf file or the id of a model on the Hugging Face hub."""
    corpus: Corpus
    """The text to learn from."""
    student: Student = Student()
    """What the teacher is turned into."""
    stages: Stages
    """The training, in this order; a stage that is left out or null is skipped."""
    checkpoint: Checkpoint = Checkpoint()
    """How often an unfinished run is saved."""
    evaluation: Evaluation = Evaluation()
    """What is measured at the end."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Of everything drawn at random: fresh weights and the order of the text."""

    def to_yaml(self) -> str:
        """The recipe with every default written out; `load_recipe` reads it back as an equal one."""
        return yaml_tree.dump(self.model_dump(mode="json"))

    def digest(self) -> str:
        """SHA-256 of the resolved recipe: the same for the same content, however it was written."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `overrides` like "stages.hidden.lr=1e-3" put over it.

    Raises:
        UserError: whatever is wrong with file, overrides or values; also a list, which makes it a study.
    """
    tree = _load(path, overrides)
    listed = tree.first_list()
    if listed is not None:
        raise UserError(
            f"{tree.origin(listed)}: {'.'.join(listed)} is a list, which makes this a study of several students; "
            f"run it with `subquad study`, or give one value"
        )
    return _validate(tree)


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> list[Recipe]:
    """One recipe for each combination of the lists in a YAML file, in order, each once.

    Any key may hold a list: `seed: [0, 1]`, or `student:` a list of mappings where not every combination is wanted.
    """
    variants = [_validate(tree) for tree in _load(path, overrides).product()]
    return list({recipe.digest(): recipe for recipe in variants}.values())


def run_name(recipe: Recipe, recipes: Sequence[Recipe]) -> str:
    """The directory of a student within a study: its mixer, and behind it the keys in which the study's students of
    this mixer differ, as in `gla-copy_qkv=false-seed=1`."""
    variants = [r.model_dump(mode="json") for r in recipes if r.student.mixer == recipe.student.mixer]
    parts = [recipe.student.mixer]
    for path, value in _differences(recipe.model_dump(mode="json"), variants):
        text = json.dumps(value) if not isinstance(value, str) else value
        parts.append(f"{'.'.join(path[1:] or path)}={text}")
    name = "-".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "_", name)[:100]
    return name if safe == name else f"{safe}-{recipe.digest()[:8]}"


def _differences(mine: Any, all_values: list[Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths at which `all_values` differ, with the value of `mine` there; "on" for a stage that others skip."""
    if all(value == mine for value in all_values):
        return
    if not isinstance(mine, dict):
        yield path, "off" if any(isinstance(value, dict) for value in all_values) else mine
        return
    mappings = [value for value in all_values if isinstance(value, dict)]
    if len(mappings) < len(all_values):
        yield path, "on"
    for key, value in mine.items():
        yield from _differences(value, [other.get(key) for other in mappings], (*path, key))


def _load(path: str | Path, overrides: Iterable[str]) -> Node:
    tree = yaml_tree.read(Path(path).expanduser())
    for override in overrides:
        where = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
        name, equals, text = override.partition("=")
        keys = tuple(key.strip() for key in name.split("."))
        if not equals or not all(keys):
            raise UserError(f"{where}: expected key=value, such as stages.hidden.lr=1e-3")
        tree = tree.put(keys, yaml_tree.parse(text, lambda _line, where=where: where, keys))  # type: ignore[misc]
    return tree


def _validate(tree: Node) -> Recipe:
    try:
        return Recipe.model_validate(tree.plain())
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # A misspelt key is also a missing one: what was written says more than what was not.
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    path = tuple(str(key) for key in problem["loc"])
    raise UserError(f"{tree.origin(path)}: {_explain(path, problem)}")


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "dict_type": "a mapping of names to values",
}


def _explain(path: tuple[str, ...], problem: Any) -> str:
    """One pydantic error in words: the key, what came, what was expected."""
    dotted, kind, context = ".".join(path), problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {dotted!r}{_nearest_key(path)}"
    if kind == "missing":
        section = _section(path[:-1])
        return f"{dotted} is missing; expected: {_first_sentence(section.model_fields[path[-1]])}"
    if kind == "value_error":
        return f"{dotted}: {context['error']}"
    got = f"{dotted}: got {_shown(problem['input'])}, expected"
    if kind == "literal_error":
        names = re.findall(r"'([^']+)'", context["expected"])
        return f"{got} one of {', '.join(names)}{nearest(problem['input'], names).partition('; expected')[0]}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{got} a mapping with the keys {', '.join(_section(path).model_fields)}"
    if kind in _EXPECTED:
        return f"{got} {_EXPECTED[kind]}"
    return f"{got} a number {problem['msg'].removeprefix('Input should be ')}"


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | float) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_sentence(field: FieldInfo) -> str:
    return re.split(r"\.(?:\s|$)", " ".join((field.description or "").split()))[0]


def _section(path: Sequence[str]) -> type[Section]:
    """The part of the recipe at a path."""
    section: type[Section] = Recipe
    for key in path:
        section = _subsection(section.model_fields[key]) or section
    return section


def _subsection(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds (also where it may be null); None for a plain value."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if (inner := _subsection(field)) is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _nearest_key(path: tuple[str, ...]) -> str:
    """The key that was meant: one with that name elsewhere in the recipe, else the nearest beside it."""
    prefix = "".join(f"{key}." for key in path[:-1])
    siblings = list(_section(path[:-1]).model_fields)
    beside = nearest(path[-1], siblings)
    elsewhere = [key for key in _keys() if key.rpartition(".")[2] == path[-1]]
    if "did you mean" not in beside and elsewhere:
        return f"; did you mean {' or '.join(map(repr, elsewhere))}?"
    return beside.replace("did you mean '", f"did you mean '{prefix}")
