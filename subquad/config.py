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


class Share(Section):
    """A source within a mixture, where its weight alone does not say enough."""

    weight: Rate = 1.0
    """Share of the rows, in proportion to the other weights."""
    column: Text | None = None
    """Null: the corpus's."""
    chat: Switch | None = None
    """Null: whether `column` here is `messages`; without one, the corpus's."""
    split: Text | None = None
    """Null: the corpus's."""
    subset: Text | None = None
    """Null: the corpus's."""


def _share(name: str, value: Any) -> float | Share:
    if isinstance(value, Share) or (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
    ):
        return value
    if not isinstance(value, dict):
        raise UserError(f"got {_shown(value)} for {name!r}, expected a weight above 0")
    for key in value:
        if key not in Share.model_fields:
            raise UserError(f"unknown key {key!r} of {name!r}{nearest(key, Share.model_fields)}")
    try:
        return Share.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    key, got = problem["loc"][0], _shown(problem["input"])
    raise UserError(f"got {got} for {key} of {name!r}, expected {_EXPECTED.get(problem['type'], 'a weight above 0')}")


def _sources(value: Any) -> Any:
    """Says what is wrong with a mixture in words, before pydantic lists what is wrong with each alternative."""
    if isinstance(value, dict):
        if not value or not all(value):
            raise UserError("got a mixture without a source, expected names of sources, each with its weight")
        return {name: _share(name, share) for name, share in value.items()}
    if not isinstance(value, str) or not value:
        raise UserError(f"got {_shown(value)}, expected the name of a source, or names with weights")
    return value


Sources = Annotated[str | dict[str, float | Share], BeforeValidator(_sources)]


class Corpus(Section):
    source: Sources
    """`python-stdlib`, a text file (.txt, .jsonl, .parquet, a source file; also .gz, .xz, .zst), a directory of such
    files, or the id of a data set on the Hugging Face hub; or a mixture of them with weights, such as
    `{books.txt: 0.7, python-stdlib: 0.3}`. Paths are relative to the working directory."""
    context: Annotated[Whole, Field(ge=2)] = 512
    """Tokens in a row of training or held-out text."""
    valid: Sources | None = None
    """A source of held-out text; without one, about a twentieth of `source` is held out."""
    documents: Literal["separate", "joined"] = "separate"
    """Whether documents in one row are kept apart, without attention or state across them, or read as one text."""
    column: Text = "text"
    """Where .jsonl, .parquet and data sets of the hub have their text (or, with `chat`, their conversations)."""
    chat: Switch = False
    """The column holds conversations, lists of messages with `role` and `content`, to be written out by the teacher's
    chat template; `column: messages` says so by itself, and the other way round."""
    loss_on: Literal["all", "assistant"] = "all"
    """Which tokens of conversations are learned: all, or only what the assistant says."""
    split: Text = "train"
    """Split of a data set of the hub."""
    subset: Text | None = None
    """Subset (configuration) of a data set of the hub; null: its default."""
    streaming: Switch = True
    """Read data sets of the hub as they arrive, no more than is needed; false: download them whole first."""

    @model_validator(mode="before")
    @classmethod
    def _conversations_are_messages(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        column = data.get("column", "messages" if data.get("chat") is True else "text")
        return {**data, "column": column, "chat": data.get("chat", column == "messages")}

    @model_validator(mode="after")
    def _assistants_are_in_conversations(self) -> "Corpus":
        mixtures = [source for source in (self.source, self.valid) if isinstance(source, dict)]
        shares = [share for mixture in mixtures for share in mixture.values() if isinstance(share, Share)]
        if self.loss_on == "assistant" and not self.chat and not any(s.chat or s.column == "messages" for s in shares):
            raise UserError("loss_on: got 'assistant' without chat, expected `chat: true` or `column: messages` too")
        return self


class Student(Section):
    mixer: Text = "gated_deltanet"
    """What replaces the teacher's attention: one of `subquad mixers`."""
    copy_qkv: Switch = True
    """Start from the teacher's query, key, value and output projections; false: from random ones."""
    calibrate: Positive | None = 2048
    """Tokens of the corpus by which half-lives, write strengths, activations and scales are set, in closed form, to
    follow the teacher's attention; null: a neutral start. Only with `copy_qkv`: random projections tell nothing."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the mixer by name, such as `half_life: 64`; calibration leaves them as they are."""
    layers: dict[str, Any] | None = None
    """A plan in place of `mixer` and `options`, such as `{default: gla, "1,3": attention}`."""
    export: Literal["qwen3_5"] | None = None
    """Keep the student within what Qwen3.5 computes, so that `subquad export` can write it; null: no bounds."""

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

    @field_validator("layers")
    @classmethod
    def _plan_is_one(cls, layers: dict[str, Any] | None, info: Any) -> dict[str, Any] | None:
        from subquad.modeling.plan import plan_entry

        if layers is None:
            return None
        if info.data.get("options"):
            raise UserError("options stand beside a plan; expected them inside its entries")
        if not layers:
            raise UserError("an empty plan; expected entries such as default: gla")
        for key, entry in layers.items():
            plan_entry(entry, key)
        return layers

    @field_validator("export")
    @classmethod
    def _plan_can_go(cls, export: str | None, info: Any) -> str | None:
        from subquad.modeling.exportable import check_mixers

        if export is not None:
            layers = info.data.get("layers")
            entries = [info.data.get("mixer", "gated_deltanet")] if layers is None else list(layers.values())
            check_mixers(entry if isinstance(entry, str) else entry["mixer"] for entry in entries)
        return export

    @property
    def name(self) -> str:
        """What a table calls it: the mixer, or "hybrid" for a plan."""
        return self.mixer if self.layers is None else "hybrid"


class Group(Section):
    lr: Rate | None = None
    """Peak rate; null: the stage's."""
    weight_decay: Weight | None = None
    """AdamW's decay; null: the stage's."""
    frozen: Switch = False
    """Does not learn in this stage."""


class Groups(Section):
    new: Group = Group()
    """What the teacher has no weight for: gates, decays, norms and convolutions of the mixers."""
    copied: Group = Group()
    """Query, key, value and output projections."""
    body: Group = Group()
    """MLPs and norms outside the mixers."""
    embeddings: Group = Group()
    """Token (and position) embeddings and the head."""


class Lora(Section):
    rank: Positive = 16
    """Rank of the update that each copied projection gets in place of its own weights (arXiv 2106.09685)."""
    alpha: Positive = 32
    """The update is scaled by alpha / rank."""


class Stage(Section):
    tokens: Positive
    """Tokens to train on; rounded up to whole steps."""
    lr: Rate
    """Peak learning rate."""
    batch_size: Positive = 8
    """Rows of `corpus.context` tokens in a step, over all processes."""
    micro_batch_size: Positive | None = None
    """Rows that a process has in memory at a time, gradients being accumulated over a step; null: its whole share."""
    warmup: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises from 0 to its peak."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "cosine"
    """How the rate goes on after the warm-up: down to 0 on a line or half a cosine, not at all, or (warm-up, stable,
    decay) on a line over the last steps only."""
    decay: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    """Share of the steps over which `wsd` goes down."""
    weight_decay: Weight = 0.0
    """AdamW's decoupled weight decay, on weight matrices."""
    max_grad_norm: Rate = 1.0
    """Gradients are scaled down to this norm."""
    groups: Groups = Groups()
    """Parts of the student with a rate or a weight decay of their own, or frozen."""
    lora: Lora | None = None
    """Teach the copied projections through low-rank updates, merged at the end of the stage; null: themselves."""
    ema: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Decay a step of a running average of the weights, which replaces them at the end of the stage."""
    gradient_checkpointing: Switch = False
    """Compute activations again in the backward pass: less memory, more time."""

    @field_validator("micro_batch_size")
    @classmethod
    def _batches_are_whole(cls, rows: int | None, info: Any) -> int | None:
        whole = info.data.get("batch_size", 0)
        if rows is not None and whole % rows:
            raise UserError(f"got {rows}, expected a divisor of batch_size ({whole})")
        return rows


class Matrix(Stage):
    rows: Positive = 1024
    """Rows of the matrices that are compared at a time: bounds memory where the context is long."""


class Hidden(Stage):
    target: Literal["mixer", "block"] = "mixer"
    """Whose output is compared: the mixer's with the attention's, or the whole layer's, its MLP included."""


class EndToEnd(Stage):
    ce_weight: Weight = 1.0
    """Weight of the cross-entropy with the text, a mean per token."""
    kl_weight: Weight = 1.0
    """Weight of the divergence from the teacher's distribution, a mean per token."""
    temperature: Rate = 1.0
    """Softens both distributions of the divergence."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """KL(teacher, student), KL(student, teacher), or the generalised Jensen-Shannon divergence (arXiv 2306.13649)."""
    jsd_beta: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture that `jsd` compares both with."""
    text: Literal["corpus", "teacher"] = "corpus"
    """Learn on the corpus, or on what the teacher writes behind the first tokens of its rows."""
    prompt: Annotated[Number, Field(gt=0, lt=1)] = 0.125
    """Share of a row that is given where the teacher writes."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> "EndToEnd":
        if self.ce_weight == self.kl_weight == 0:
            raise UserError("ce_weight and kl_weight are both 0; expected one of them above 0")
        return self


class Stages(Section):
    matrix: Matrix | None = None
    """Stage 1: each layer's mixing matrix towards the teacher's attention matrix."""
    hidden: Hidden | None = None
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
    every: Positive | None = None
    """Steps between measurements of a stage's own loss on held-out text; null: none."""
    keep_best: Switch = False
    """A stage ends with its weights of the lowest held-out loss, not with its last."""

    @field_validator("keep_best")
    @classmethod
    def _it_is_measured(cls, best: bool, info: Any) -> bool:
        if best and info.data.get("every") is None:
            raise UserError("got true without evaluation.every, expected a number of steps there")
        return best


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
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix multiplications in training. Weights, optimizer, decays, norms and losses stay in float32."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where curves go besides `metrics.jsonl`."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Of everything drawn at random: fresh weights and the order of the text."""

    @model_validator(mode="after")
    def _what_excludes_each_other(self) -> "Recipe":
        every, save = self.evaluation.every, self.checkpoint.every
        if self.evaluation.keep_best and every is not None and save % every:
            raise UserError(f"checkpoint.every: got {save}, expected a multiple of evaluation.every ({every})")
        stages = [s for s in (self.stages.matrix, self.stages.hidden, self.stages.end_to_end) if s is not None]
        if self.evaluation.keep_best and any(stage.ema is not None for stage in stages):
            raise UserError("evaluation.keep_best beside ema; expected one of them: an average is no checkpoint's")
        return self

    def to_yaml(self) -> str:
        """The recipe with every default written out; `load_recipe` reads it back as an equal one."""
        return yaml_tree.dump(self.model_dump(mode="json"))

    def digest(self) -> str:
        """SHA-256 of the resolved recipe: the same for the same content, however it was written."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, from which editors complete and check: any value may be a list, as in a study."""
    tree = Recipe.model_json_schema()
    for section in (tree, *tree["$defs"].values()):
        for name, value in section.get("properties", {}).items():
            kept = {key: value.pop(key) for key in ("description", "default", "title") if key in value}
            section["properties"][name] = {**kept, "anyOf": [value, {"type": "array", "items": value}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree, "title": "Subquad recipe"}


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
    this mixer differ, as in `gla-copy_qkv=false-seed=1`; what a stage or the options hold only where that is needed."""
    mine = recipe.model_dump(mode="json")
    variants = [r.model_dump(mode="json") for r in recipes if r.student.name == recipe.student.name]
    short = _shallow(mine, variants)
    rivals = [variant for variant in variants if _shallow(variant, variants) == short]
    parts = [recipe.student.name]
    for path, value in [*short, *(found for found in _differences(mine, rivals) if len(found[0]) > 2)]:
        text = json.dumps(value) if not isinstance(value, str) else value
        parts.append(f"{'.'.join(path[1:] or path)}={text}")
    name = "-".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "_", name)[:100]
    return name if safe == name else f"{safe}-{recipe.digest()[:8]}"


def _shallow(mine: Any, variants: list[Any]) -> list[tuple[tuple[str, ...], Any]]:
    return [found for found in _differences(mine, variants) if len(found[0]) <= 2]


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
        return f"{dotted}: {context['error']}" if dotted else str(context["error"])
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
        depth = min(key.count(".") for key in elsewhere)
        return f"; did you mean {' or '.join(repr(key) for key in elsewhere if key.count('.') == depth)}?"
    return beside.replace("did you mean '", f"did you mean '{prefix}")
