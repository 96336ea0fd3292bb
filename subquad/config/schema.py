"""The recipe's tree: everything that decides what a student becomes, typed and validated, a section a part of it.

Nothing here loads a model or reads a corpus. How recipes are read from files, and how their mistakes are told, is
`config.py`'s business, from which all of this is imported.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from subquad.config import yaml_tree
from subquad.utils import UserError, nearest

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "dict_type": "a mapping of names to values",
}
"""What a type of pydantic's errors expects, in words."""


def shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | float) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


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


class MixtureSource(Section):
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


def _share(name: str, value: Any) -> float | MixtureSource:
    if isinstance(value, MixtureSource) or (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
    ):
        return value
    if not isinstance(value, dict):
        raise UserError(f"got {shown(value)} for {name!r}, expected a weight above 0")
    for key in value:
        if key not in MixtureSource.model_fields:
            raise UserError(f"unknown key {key!r} of {name!r}{nearest(key, MixtureSource.model_fields)}")
    try:
        return MixtureSource.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    key, got = problem["loc"][0], shown(problem["input"])
    raise UserError(f"got {got} for {key} of {name!r}, expected {EXPECTED.get(problem['type'], 'a weight above 0')}")


def _sources(value: Any) -> Any:
    """Says what is wrong with a mixture in words, before pydantic lists what is wrong with each alternative."""
    if isinstance(value, dict):
        if not value or not all(value):
            raise UserError("got a mixture without a source, expected names of sources, each with its weight")
        return {name: _share(name, share) for name, share in value.items()}
    if not isinstance(value, str) or not value:
        raise UserError(f"got {shown(value)}, expected the name of a source, or names with weights")
    return value


Sources = Annotated[str | dict[str, float | MixtureSource], BeforeValidator(_sources)]


class Data(Section):
    source: Sources
    """`python-stdlib`, a text file (.txt, .jsonl, .parquet, a source file; also .gz, .xz, .zst), a directory of such
    files, or the id of a data set on the Hugging Face hub; or a mixture of them with weights, such as
    `{books.txt: 0.7, python-stdlib: 0.3}`. Paths are relative to the working directory."""
    seq_len: Annotated[Whole, Field(ge=2)] = 512
    """Tokens in a row of training or held-out text."""
    validation: Sources | None = None
    """A source of held-out text; without one, about a twentieth of `source` is held out."""
    document_masking: Switch = True
    """No attention and no state crosses a document boundary within a row; false: each row is read as one text."""
    column: Text = "text"
    """Where .jsonl, .parquet and data sets of the hub have their text (or, with `chat`, their conversations)."""
    chat: Switch = False
    """The column holds conversations, lists of messages with `role` and `content`, to be written out by the teacher's
    chat template; `column: messages` says so by itself, and the other way round."""
    assistant_only_loss: Switch = False
    """Compute the loss of conversations on the assistant's tokens only; false: on all tokens."""
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
    def _assistants_are_in_conversations(self) -> "Data":
        mixtures = [source for source in (self.source, self.validation) if isinstance(source, dict)]
        shares = [share for mixture in mixtures for share in mixture.values() if isinstance(share, MixtureSource)]
        if self.assistant_only_loss and not self.chat and not any(s.chat or s.column == "messages" for s in shares):
            raise UserError(
                "assistant_only_loss: got true without chat, expected `chat: true` or `column: messages` too"
            )
        return self


class Student(Section):
    mixer: Text = "gated_deltanet"
    """What replaces the teacher's attention: one of `subquad mixers`."""
    copy_qkv: Switch = True
    """Start from the teacher's query, key, value and output projections; false: from random ones."""
    calibration_tokens: Positive | None = 2048
    """Tokens of the corpus by which half-lives, write strengths, activations and scales are set, in closed form, to
    follow the teacher's attention; null: a neutral start. Only with `copy_qkv`: random projections tell nothing."""
    mixer_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of the mixer by name, such as `half_life: 64`; calibration leaves them as they are."""
    layer_types: dict[str, Any] | None = None
    """A plan in place of `mixer` and `options`, such as `{default: gla, "1,3": attention}`."""
    export_target: Literal["qwen3_5", "bamba"] | None = None
    """Keep the student within what Qwen3.5 or Bamba computes, so that it can be exported; null: no bounds."""

    @field_validator("mixer")
    @classmethod
    def _mixer_exists(cls, name: str) -> str:
        from subquad import mixers

        if name not in mixers.names():
            raise UserError(f"unknown mixer {name!r}{nearest(name, mixers.names())}")
        return name

    @field_validator("mixer_kwargs")
    @classmethod
    def _options_exist(cls, options: dict[str, Any], info: Any) -> dict[str, Any]:
        from subquad import mixers

        mixer = info.data.get("mixer")
        if mixer == mixers.SOFTMAX and options:
            raise UserError(f"{mixer} has no options; got {', '.join(options)}")
        if mixer in mixers.OPTIONS:
            mixers.OPTIONS[mixer].from_dict(options)
        return options

    @field_validator("layer_types")
    @classmethod
    def _plan_is_one(cls, layers: dict[str, Any] | None, info: Any) -> dict[str, Any] | None:
        from subquad.modeling.layer_types import resolve_layer_type

        if layers is None:
            return None
        if info.data.get("mixer_kwargs"):
            raise UserError("options stand beside a plan; expected them inside its entries")
        if not layers:
            raise UserError("an empty plan; expected entries such as default: gla")
        for key, entry in layers.items():
            resolve_layer_type(entry, key)
        return layers

    @field_validator("export_target")
    @classmethod
    def _plan_can_go(cls, export: str | None, info: Any) -> str | None:
        from subquad.modeling.export_target import check_mixers, find_target

        if export is not None:
            layers = info.data.get("layer_types")
            entries = [info.data.get("mixer", "gated_deltanet")] if layers is None else list(layers.values())
            names = (entry if isinstance(entry, str) else entry["mixer"] for entry in entries)
            check_mixers(names, find_target(export))
        return export

    @property
    def name(self) -> str:
        """What a table calls it: the mixer, or "hybrid" for a plan."""
        return self.mixer if self.layer_types is None else "hybrid"


class ParamGroup(Section):
    lr: Rate | None = None
    """Peak rate; null: the stage's."""
    weight_decay: Weight | None = None
    """AdamW's decay; null: the stage's."""
    frozen: Switch = False
    """Does not learn in this stage."""


class ParamGroups(Section):
    mixer: ParamGroup = ParamGroup()
    """What the teacher has no weight for: gates, decays, norms and convolutions of the mixers."""
    attention_projections: ParamGroup = ParamGroup()
    """Query, key, value and output projections."""
    backbone: ParamGroup = ParamGroup()
    """MLPs and norms outside the mixers."""
    embeddings: ParamGroup = ParamGroup()
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
    """Rows of `data.seq_len` tokens in a step, over all processes."""
    micro_batch_size: Positive | None = None
    """Rows that a process has in memory at a time, gradients being accumulated over a step; null: its whole share."""
    warmup: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises from 0 to its peak."""
    lr_scheduler: Literal["linear", "cosine", "constant", "wsd"] = "cosine"
    """How the rate goes on after the warm-up: down to 0 on a line or half a cosine, not at all, or (warm-up, stable,
    decay) on a line over the last steps only."""
    decay: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    """Share of the steps over which `wsd` goes down."""
    weight_decay: Weight = 0.0
    """AdamW's decoupled weight decay, on weight matrices."""
    max_grad_norm: Rate = 1.0
    """Gradients are scaled down to this norm."""
    param_groups: ParamGroups = ParamGroups()
    """Parts of the student with a rate or a weight decay of their own, or frozen."""
    lora: Lora | None = None
    """Teach the copied projections through low-rank updates, merged at the end of the stage; null: themselves."""
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = None
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
    row_chunk_size: Positive = 1024
    """Rows of the matrices that are compared at a time: bounds memory where the context is long."""


class Hidden(Stage):
    target: Literal["mixer", "decoder_layer"] = "mixer"
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
    data: Literal["corpus", "teacher_generated"] = "corpus"
    """Train on the text of `data`, or on text that the teacher generates from the first tokens of each row."""
    prompt_fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.125
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
    save_steps: Positive = 50
    """Steps between checkpoints."""
    save_total_limit: Positive = 2
    """Checkpoints kept; older ones are removed."""


class Evaluation(Section):
    eval_tokens: Positive = 16_384
    """Held-out tokens on which the finished student is measured."""
    eval_steps: Positive | None = None
    """Steps between measurements of a stage's own loss on held-out text; null: none."""
    load_best_model_at_end: Switch = False
    """A stage ends with its weights of the lowest held-out loss, not with its last."""

    @field_validator("load_best_model_at_end")
    @classmethod
    def _it_is_measured(cls, best: bool, info: Any) -> bool:
        if best and info.data.get("eval_steps") is None:
            raise UserError("got true without evaluation.eval_steps, expected a number of steps there")
        return best


class Recipe(Section):
    teacher: Text
    """`nano`, `smollm2-135m`, a model directory, a .gguf file or the id of a model on the Hugging Face hub."""
    data: Data
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
        every, save = self.evaluation.eval_steps, self.checkpoint.save_steps
        if self.evaluation.load_best_model_at_end and every is not None and save % every:
            raise UserError(
                f"checkpoint.save_steps: got {save}, expected a multiple of evaluation.eval_steps ({every})"
            )
        stages = [s for s in (self.stages.matrix, self.stages.hidden, self.stages.end_to_end) if s is not None]
        if self.evaluation.load_best_model_at_end and any(stage.ema_decay is not None for stage in stages):
            raise UserError(
                "evaluation.load_best_model_at_end beside ema; expected one of them: an average is no checkpoint's"
            )
        return self

    def to_yaml(self) -> str:
        """The recipe with every default written out; `load_recipe` reads it back as an equal one."""
        return yaml_tree.dump(self.model_dump(mode="json"))

    def digest(self) -> str:
        """SHA-256 of the resolved recipe: the same for the same content, however it was written."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
