"""The schema of a recipe: one pydantic model for each section, with every check that needs no file and no model."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, field_validator, model_validator
from pydantic.types import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError

from subquad.config.section import Fraction, NonEmptyStr, Section, raise_mistakes
from subquad.config.student import Student
from subquad.config.yaml_tree import KeyPath, dump, format_value
from subquad.registry import STAGES
from subquad.utils import UserError


class MixtureSource(Section):
    """A source within a mixture. A bare number is its weight."""

    SHORTHAND = "weight"

    weight: PositiveFloat = 1.0
    """Share of the rows, relative to the sum of all weights."""
    column: NonEmptyStr | None = None
    """Column of the text or conversations; null: `data.column`."""
    chat: bool | None = None
    """Whether the column holds conversations; null: `data.chat`, or where `column` is given, if it is `messages`."""
    split: NonEmptyStr | None = None
    """Split of a dataset of the hub; null: `data.split`."""
    subset: NonEmptyStr | None = None
    """Subset of a dataset of the hub; null: `data.subset`."""


_MIXTURE = TypeAdapter(dict[str, MixtureSource])


def _read_source(value: Any) -> Any:
    """Validates a mixture, so that pydantic reports the mistakes of one alternative of the union only."""
    if isinstance(value, Mapping) and value and all(value):
        return _MIXTURE.validate_python(dict(value))
    if isinstance(value, str) and value:
        return value
    raise UserError(f"got {format_value(value)}, expected the name of a source, or a mapping of names to weights")


Source = Annotated[str | dict[str, MixtureSource], BeforeValidator(_read_source)]


class Data(Section):
    SHORTHAND = "source"

    source: Source
    """`python-stdlib`, a text file (.txt, .jsonl, .parquet or source code; also compressed as .gz, .xz or .zst), a
    directory of such files, or the id of a dataset on the Hugging Face hub. A mixture maps such names to weights:
    `{books.txt: 0.7, python-stdlib: 0.3}`. Paths are relative to the working directory."""
    seq_len: Annotated[int, Field(ge=2)] = 512
    """Tokens in each row of training and validation text."""
    validation: Source | None = None
    """A source of validation text; null: about 5% of the documents of `source`."""
    document_masking: bool = True
    """True: no attention and no state crosses a document boundary within a row. False: each row is one text."""
    column: NonEmptyStr = "text"
    """Column of the text or conversations in .jsonl files, .parquet files and datasets of the hub."""
    chat: bool = False
    """The column holds conversations (lists of messages with `role` and `content`), formatted with the teacher's chat
    template. `column: messages` implies `chat: true` and vice versa."""
    assistant_only_loss: bool = False
    """True: the loss of conversations covers the assistant's tokens only. False: all tokens."""
    split: NonEmptyStr = "train"
    """Split of a dataset of the hub."""
    subset: NonEmptyStr | None = None
    """Subset (configuration) of a dataset of the hub; null: its default."""
    streaming: bool = True
    """True: read only the needed part of a dataset of the hub. False: download the whole dataset first."""
    shuffle_buffer: PositiveInt | None = None
    """Stream the training text: read and tokenize it while training, and shuffle it in blocks of so many rows per
    process; null: tokenize it once into a cache on disk, and shuffle all rows."""

    @model_validator(mode="before")
    @classmethod
    def _link_column_and_chat(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        column = data.get("column", "messages" if data.get("chat") is True else "text")
        return {**data, "column": column, "chat": data.get("chat", column == "messages")}

    @field_validator("assistant_only_loss")
    @classmethod
    def _check_conversations(cls, enabled: bool, info: Any) -> bool:
        if enabled and {"source", "validation", "chat"} <= info.data.keys():
            mixtures = [info.data[key] for key in ("source", "validation") if isinstance(info.data[key], dict)]
            sources = [source for mixture in mixtures for source in mixture.values()]
            if not info.data["chat"] and not any(source.chat or source.column == "messages" for source in sources):
                raise UserError("got true without chat, expected also `chat: true` or `column: messages`")
        return enabled


class ParamGroup(Section):
    lr: PositiveFloat | None = None
    """Peak learning rate; null: the stage's."""
    weight_decay: NonNegativeFloat | None = None
    """AdamW's weight decay; null: the stage's."""
    frozen: bool = False
    """True: these parameters are not trained in this stage."""


class ParamGroups(Section):
    mixer: ParamGroup = ParamGroup()
    """New parameters of the mixers: gates, decays, norms and convolutions."""
    attention_projections: ParamGroup = ParamGroup()
    """Query, key, value and output projections."""
    backbone: ParamGroup = ParamGroup()
    """MLPs and norms outside the mixers."""
    embeddings: ParamGroup = ParamGroup()
    """Token and position embeddings, and the language modeling head unless `head` is given."""
    head: ParamGroup | None = None
    """The language modeling head where it is not tied to the embeddings; null: as `embeddings`."""


class Lora(Section):
    rank: PositiveInt = 16
    """Rank of the update of each attention projection (arXiv 2106.09685)."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / rank."""


class Stage(Section):
    tokens: PositiveInt
    """Training tokens, rounded up to whole steps."""
    lr: PositiveFloat
    """Peak learning rate of AdamW."""
    batch_size: PositiveInt = 8
    """Rows of `data.seq_len` tokens in each step, over all processes."""
    micro_batch_size: PositiveInt | None = None
    """Rows in each forward pass of a process, a divisor of `batch_size`; null: all rows of the process at once."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of the steps in which the learning rate rises linearly from 0 to `lr`."""
    lr_scheduler: Literal["linear", "cosine", "constant", "wsd"] = "cosine"
    """Learning rate after the warmup: linear or cosine decay to 0, constant, or warmup-stable-decay (constant, then
    linear to 0 over the last steps)."""
    decay: Fraction = 0.2
    """Fraction of the steps in which `wsd` decays."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay of weight matrices."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to this norm."""
    param_groups: ParamGroups = ParamGroups()
    """Learning rate and weight decay of groups of parameters, or which of them are frozen."""
    lora: Lora | None = None
    """Train low-rank updates of the attention projections, merged at the end of the stage; null: train the weights."""
    ema_decay: Fraction | None = None
    """Decay per step of an exponential moving average of the weights, which replaces them at the end of the stage;
    null: no average."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    @field_validator("micro_batch_size")
    @classmethod
    def _check_divisor(cls, rows: int | None, info: Any) -> int | None:
        total = info.data.get("batch_size")
        if rows is not None and total is not None and total % rows:
            raise UserError(f"got {rows}, expected a divisor of batch_size ({total})")
        return rows


MEMORY_OPTIONS = ("far_weight", "window_dropout")
"""Options of stages that need a student with a memory beside windows."""


def _read_schedule(value: Any) -> Any:
    def is_probability(p: Any) -> bool:
        return isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1

    if isinstance(value, list) and len(value) == 2 and all(map(is_probability, value)):
        return [float(p) for p in value]
    expected = "two probabilities, of the first and the last step, such as [0.9, 0.5]; in a study [[0.9, 0.5]]"
    raise UserError(f"got {format_value(value)}, expected {expected}")


Schedule = Annotated[list[float], BeforeValidator(_read_schedule)]


class MatrixStage(Stage):
    row_chunk_size: PositiveInt = 1024
    """Rows of the mixing matrices compared at once; smaller values need less memory at long `data.seq_len`."""


class HiddenStage(Stage):
    target: Literal["mixer", "decoder_layer"] = "mixer"
    """Outputs that are compared: the mixer's with the attention's, or those of the whole decoder layers."""
    far_weight: NonNegativeFloat = 0.0
    """Weight of a second loss, of memories beside windows: the distance of what the memory gives from what the
    teacher's attention has of the tokens outside the window, relative to the same norm as the distance of outputs."""
    window_dropout: Schedule | None = None
    """Probabilities, of the first and the last step (linear in between), with which a step trains without windows: the
    outputs of layers with a memory are the memory's alone where a token has left the window; null: never."""

    @field_validator("far_weight")
    @classmethod
    def _check_target(cls, far_weight: float, info: Any) -> float:
        if far_weight and info.data.get("target") == "decoder_layer":
            raise UserError(f"got {format_value(far_weight)} with target: decoder_layer, expected target: mixer")
        return far_weight


class EndToEndStage(Stage):
    ce_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropy of the text, a mean per token in nats."""
    kl_weight: NonNegativeFloat = 1.0
    """Weight of the divergence from the teacher's distribution, a mean per token in nats."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature of both distributions in the divergence."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """KL(teacher || student), KL(student || teacher), or generalized Jensen-Shannon divergence (arXiv 2306.13649)."""
    jsd_beta: Fraction = 0.5
    """Weight of the teacher in the mixture distribution of `jsd`."""
    data: Literal["corpus", "teacher_generated"] = "corpus"
    """Train on the text of `data`, or on text that the teacher generates from the first tokens of each row."""
    prompt_fraction: Fraction = 0.125
    """Fraction of a row's tokens given to the teacher as a prompt if `data` is teacher_generated."""
    teacher_targets: Literal["full", "sampled", "top_k"] = "full"
    """full: the teacher computes its distribution in each step. sampled, top_k: a sparse form of it is read from a
    cache on disk, which the teacher fills once: `target_size` draws from it, or its `target_size` largest
    probabilities. They need the forward divergence at temperature 1 and the text of `data`."""
    target_size: Annotated[int, Field(ge=1, le=2**15)] = 64
    """Draws, or tokens, for each position of sparse `teacher_targets`."""
    window_dropout: Schedule | None = None
    """Probabilities, of the first and the last step (linear in between), with which a step trains without windows: the
    outputs of layers with a memory are the memory's alone where a token has left the window; null: never."""

    untie_head: bool = False
    """Of a teacher whose head is tied to its embeddings: train them apart in this stage, then drop the head's weights
    and tie it to the embeddings again."""

    @field_validator("kl_weight")
    @classmethod
    def _check_loss(cls, kl_weight: float, info: Any) -> float:
        if kl_weight == 0 == info.data.get("ce_weight"):
            raise UserError("got 0 for kl_weight and ce_weight, expected one of them above 0")
        return kl_weight

    @field_validator("teacher_targets")
    @classmethod
    def _check_targets(cls, targets: str, info: Any) -> str:
        if targets == "full":
            return targets
        for key, needed in {"divergence": "forward", "temperature": 1, "data": "corpus"}.items():
            if (value := info.data.get(key, needed)) != needed:
                raise UserError(f"got {targets} with {key}: {format_value(value)}, expected {key}: {needed}")
        if info.data.get("kl_weight") == 0:
            raise UserError(f"got {targets} with kl_weight: 0, expected a kl_weight above 0")
        return targets


def _read_stage(named: tuple[str, Any]) -> Section:
    """The section of a stage of another package, from its name and its value."""
    name, value = named
    if name not in STAGES:
        raise PydanticCustomError("extra_forbidden", "unknown stage")
    return STAGES[name].Options.model_validate(value)


class Stages(Section, extra="allow"):
    __pydantic_extra__: dict[str, Annotated[Any, BeforeValidator(_read_stage)]]

    matrix: MatrixStage | None = None
    """Stage 1: match each layer's mixing matrix to the teacher's attention matrix; null: skip."""
    hidden: HiddenStage | None = None
    """Stage 2: match each layer's output to the teacher's; null: skip."""
    end_to_end: EndToEndStage | None = None
    """Stage 3: train the whole student on cross-entropy and on the teacher's distribution; null: skip."""

    @model_validator(mode="before")
    @classmethod
    def _name_registered(cls, stages: Any) -> Any:
        """Gives `_read_stage` the names, and leaves out stages that are null."""
        if not isinstance(stages, Mapping):
            return stages
        given = {name: stage for name, stage in stages.items() if stage is not None or name not in STAGES}
        return {name: stage if name in cls.model_fields else (name, stage) for name, stage in given.items()}

    @model_validator(mode="after")
    def _check_any(self) -> "Stages":
        if all(stage is None for _, stage in self):
            raise UserError("got no stage, expected at least one of matrix, hidden, end_to_end")
        return self


class Checkpoint(Section):
    save_steps: PositiveInt = 50
    """Training steps between checkpoints, from which an interrupted run is resumed."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Number of checkpoints kept, at least 2; older ones are deleted."""


class Evaluation(Section):
    eval_tokens: PositiveInt = 16_384
    """Validation tokens on which the finished student is evaluated."""
    eval_steps: PositiveInt | None = None
    """Training steps between evaluations of the stage's loss on validation text; null: none."""
    load_best_model_at_end: bool = False
    """End each stage with the checkpoint of the lowest validation loss; false: with the last weights."""

    @field_validator("load_best_model_at_end")
    @classmethod
    def _check_eval_steps(cls, enabled: bool, info: Any) -> bool:
        if enabled and info.data.get("eval_steps", 1) is None:
            raise UserError("got true without evaluation.eval_steps, expected a number of steps there")
        return enabled


class Recipe(Section):
    teacher: NonEmptyStr
    """`nano`, `smollm2-135m`, a model directory, a .gguf file, or the id of a model on the Hugging Face hub."""
    data: Data
    """Training and validation text. A bare name is its `source`."""
    student: Student = Student()
    """The student's layers and their initialization. A bare name is its `mixer`."""
    stages: Stages
    """Training stages, run in the order matrix, hidden, end_to_end, others; null or a missing key skips a stage."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints of unfinished runs."""
    evaluation: Evaluation = Evaluation()
    """Evaluation during and after training."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix multiplications in training. Weights, optimizer states, decays, norms and losses are float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of teacher and student; auto: the GPU of the process, or the CPU where there is none. Of several GPUs one
    process uses the first in `CUDA_VISIBLE_DEVICES`, and each process of `torchrun` its own."""
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the teacher's weights; auto: bfloat16 on a GPU with `precision: bfloat16`, else float32. The student's
    are float32. bfloat16 needs `precision: bfloat16`."""
    attn_implementation: NonEmptyStr | None = None
    """The teacher's attention in `transformers`: sdpa, eager, flash_attention_2 ...; null: its default."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Experiment tracker that receives training curves in addition to `metrics.jsonl`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of random initializations and of the order of the text."""

    @model_validator(mode="after")
    def _check_sections(self) -> "Recipe":
        raise_mistakes(conflicts(self.model_dump()))
        return self

    def to_yaml(self) -> str:
        """The recipe with every default written out; `load_recipe` reads it back as an equal one."""
        return dump(self.model_dump(mode="json"))

    def without_defaults(self) -> dict[str, Any]:
        """The values that differ from the defaults. They identify a run, so that a key added later changes no run."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def digest(self) -> str:
        """SHA-256 of `without_defaults`: the same for the same content, however it was written."""
        text = json.dumps(self.without_defaults(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def conflicts(recipe: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Mistakes between sections, as paths and messages. A key whose own value is wrong is None in `recipe`."""
    yield from _options_without_memory(recipe)
    if recipe.get("teacher_dtype") == "bfloat16" and recipe.get("precision") == "float32":
        yield ("teacher_dtype",), "got bfloat16 with precision float32, expected precision bfloat16"
    stage, data = (recipe.get("stages") or {}).get("end_to_end"), recipe.get("data")
    targets = stage.get("teacher_targets") if isinstance(stage, Mapping) else None
    if targets in ("sampled", "top_k") and isinstance(data, Mapping) and data.get("shuffle_buffer") is not None:
        message = f"got {targets} with data.shuffle_buffer, expected text that is not streamed"
        yield ("stages", "end_to_end", "teacher_targets"), message
    evaluation = Evaluation.model_construct(**recipe.get("evaluation") or {})
    if not evaluation.load_best_model_at_end:
        return
    steps, save_steps = evaluation.eval_steps, Checkpoint.model_construct(**recipe.get("checkpoint") or {}).save_steps
    if steps and save_steps and save_steps % steps:
        yield ("checkpoint", "save_steps"), f"got {save_steps}, expected a multiple of evaluation.eval_steps ({steps})"
    if any(stage and stage.get("ema_decay") is not None for stage in (recipe.get("stages") or {}).values()):
        message = "got true with the ema_decay of a stage, expected one of them: no checkpoint holds the average"
        yield ("evaluation", "load_best_model_at_end"), message


def _options_without_memory(recipe: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Options of stages that train memories beside windows, of a student that has none."""
    if Student.has_memory(recipe.get("student")):
        return
    for name, stage in (recipe.get("stages") or {}).items():
        for key in MEMORY_OPTIONS if isinstance(stage, Mapping) else ():
            if stage.get(key):
                expected = "expected a student with a memory: a mixer with `window`, or `budget_memory`"
                yield ("stages", name, key), f"got {format_value(stage[key])}, {expected}"
