"""`DistillationRun`: one run of one recipe, from loading the teacher to saving the result."""

import functools
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader

from subquad.config import Recipe
from subquad.data import PackedDataset, RowSlice, token_rows
from subquad.distill.documents import respects_document_boundaries
from subquad.distill.logging_callbacks import draw_curves, read_jsonl, write_jsonl
from subquad.distill.recipe_stages import UNIGRAM_TOKENS, epoch_tokens, recipe_stages, stage_rows, stage_tokens
from subquad.distill.trainer import StageRun, checkpoint_step, newest_checkpoint, run_stage
from subquad.evaluate.efficiency import decode_speed
from subquad.evaluate.perplexity import compare, recovered_share, unigram_loss
from subquad.modeling.attention.discovery import AttentionInfo, discover_attention
from subquad.modeling.linearize import linearize
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.teachers import ModelAndTokenizer, load_teacher
from subquad.registry import STAGES
from subquad.utils import UserError, run_info, write_json_atomic

logger = logging.getLogger(__name__)
SCALE_TOKENS = 1024


class DistillationRun:
    """What a run works with, and what it does.

    Its directory holds `recipe.yaml`, `metrics.jsonl` and, until the run is finished, `checkpoints/`: the checkpoints
    of the current stage in `NAME/`, the student after each finished stage in `NAME-done/`, and the quality of the
    untrained student in `initial.json`.

    `student` exists after `build_or_resume_student`.
    """

    student: SubquadForCausalLM

    def __init__(self, recipe: Recipe, directory: Path, loaded: ModelAndTokenizer | None = None):
        """Loads the teacher, unless `loaded` has it and its tokenizer, and tokenizes as much of the text as is needed.

        Raises:
            UserError: the teacher cannot read `data.seq_len` tokens or does not mask documents.
        """
        self.recipe, self.directory = recipe, directory
        self.checkpoints, self.metrics = directory / "checkpoints", directory / "metrics.jsonl"
        self.finished_stages: list[str] = []
        self.seconds = 0.0
        """Time to build and train the student so far, over all sessions."""
        self.teacher, self.tokenizer = loaded or load_teacher(recipe.teacher)
        self.teacher.requires_grad_(False)
        if torch.cuda.is_available():
            self.teacher.to("cuda")  # type: ignore[arg-type]
        self.check_teacher()
        data, tokens = recipe.data, recipe.evaluation.eval_tokens + recipe.data.seq_len
        self.train: PackedDataset = token_rows(
            data, self.tokenizer, "train", limit=epoch_tokens(recipe), seed=recipe.seed
        )
        self.validation: PackedDataset = token_rows(data, self.tokenizer, "validation", limit=tokens, seed=0)

    def check_teacher(self) -> None:
        seq_len, limit = self.recipe.data.seq_len, getattr(self.teacher.config, "max_position_embeddings", None)
        if limit is not None and seq_len > limit:
            raise UserError(
                f"data.seq_len: got {seq_len}, expected at most {limit}, the maximum of teacher {self.recipe.teacher!r}"
            )
        if self.recipe.data.document_masking and not respects_document_boundaries(self.teacher):
            raise UserError(
                f"data.document_masking: got true, expected false for teacher {self.recipe.teacher!r}, whose attention "
                "crosses documents in one row whatever their position_ids"
            )

    # ------------------------------------------------------------------ teacher and data

    @functools.cached_property
    def attention_layers(self) -> list[AttentionInfo]:
        """The teacher's attention, discovered once in a run."""
        return discover_attention(self.teacher)

    @functools.cached_property
    def validation_rows(self) -> RowSlice:
        """The rows of `evaluation.eval_tokens`, the same for every student and seed."""
        count = max(1, math.ceil(self.recipe.evaluation.eval_tokens / self.recipe.data.seq_len))
        return self.validation.take(min(count, len(self.validation)))

    @functools.cached_property
    def validation_batches(self) -> list[dict[str, Tensor]]:
        return list(DataLoader(self.validation_rows, batch_size=4))

    def training_ids(self, tokens: int) -> Tensor:
        """The first rows of the training text, about `tokens` tokens: `[rows, seq_len]`."""
        count = max(1, tokens // self.recipe.data.seq_len)
        return torch.stack([self.train[i]["input_ids"] for i in range(count)])

    def scale_ids(self) -> Tensor:
        """The training tokens on which the scales of the teacher's outputs are measured, `[rows, seq_len]`."""
        return self.training_ids(SCALE_TOKENS)

    # ------------------------------------------------------------------ the steps of a run

    def build_or_resume_student(self) -> None:
        """Loads the student after the last finished stage, or builds a new one and measures it."""
        names = list(recipe_stages(self.recipe))
        done = [i for i, name in enumerate(names) if (self.checkpoints / f"{name}-done" / "done.json").exists()]
        if done:
            self.finished_stages = names[: max(done) + 1]
            last = self.checkpoints / f"{self.finished_stages[-1]}-done"
            logger.info("%s: resuming after stage %s", self.directory, self.finished_stages[-1])
            self.student = SubquadForCausalLM.from_pretrained(last)
            self.seconds = json.loads((last / "done.json").read_text())["seconds"]
            return
        start = time.perf_counter()
        options = self.recipe.student
        calibration_tokens = options.calibration_tokens if options.copy_qkv else None
        self.student = linearize(
            self.teacher,
            options.mixer,
            copy_qkv=options.copy_qkv,
            layer_types=options.layer_types,
            scale_ids=self.scale_ids(),
            calibration_ids=None if calibration_tokens is None else self.training_ids(calibration_tokens),
            seed=self.recipe.seed,
            export_target=options.export_target,
            attention_layers=self.attention_layers,
            **options.mixer_kwargs,
        )
        self.seconds = time.perf_counter() - start
        with on_first_process() as first:
            if first and not (self.checkpoints / "initial.json").exists():
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                initial = compare(self.student, self.teacher, self.validation_batches)
                write_json_atomic(self.checkpoints / "initial.json", initial)

    def train_stage(self, name: str) -> None:
        """Trains a stage, from its newest checkpoint if there is one, and saves the student after it."""
        start = time.perf_counter()
        checkpoint = newest_checkpoint(self.checkpoints / name)
        step = 0 if checkpoint is None else checkpoint_step(checkpoint)
        if step:
            logger.info("%s: resuming stage %s from step %d", self.directory, name, step)
        with on_first_process() as first:
            if first and self.metrics.exists():
                records = read_jsonl(self.metrics)
                write_jsonl(self.metrics, [r for r in records if r["stage"] != name or r["step"] <= step])
        run_stage(self.stage_run(name), self.student)
        self.seconds += time.perf_counter() - start
        self.finished_stages.append(name)
        with on_first_process() as first:
            if first:
                self.save_stage(name)

    def stage_run(self, name: str) -> StageRun:
        """The stage `name` with its rows, which follow those of the stages before it."""
        rows = stage_rows(self.recipe)
        names = list(rows)
        offset = sum(rows[earlier] for earlier in names[: names.index(name)])
        train = self.train.take(rows[name], start=offset)
        return StageRun(self.recipe, STAGES[name].for_run(self), train, self.validation_rows, self.directory)

    def save_stage(self, name: str) -> None:
        """Saves the student after stage `name`, completely or not at all, and removes the stage's checkpoints."""
        target = self.checkpoints / f"{name}-done"
        partial = target.with_name(target.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        self.student.save_pretrained(partial)
        write_json_atomic(partial / "done.json", {"seconds": self.seconds})
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        shutil.rmtree(self.checkpoints / name, ignore_errors=True)

    def evaluate_student(self) -> dict[str, Any]:
        """The result of the run: one record with the student's quality, speed and size."""
        recipe, student = self.recipe, self.student
        quality = compare(student, self.teacher, self.validation_batches)
        if not math.isfinite(quality["loss"]):
            raise UserError(f"{self.directory}: the student's loss on validation text is {quality['loss']}; lower lr")
        unigram = unigram_loss(self.training_ids(UNIGRAM_TOKENS), self.validation_batches, student.config.vocab_size)
        speed = decode_speed(student, self.validation_batches[0]["input_ids"][:1])
        initial = json.loads((self.checkpoints / "initial.json").read_text())
        return {
            "mixer": recipe.student.name,
            "copy_qkv": recipe.student.copy_qkv,
            "seed": recipe.seed,
            "parameters": student.num_parameters(),
            "tokens": sum(stage_tokens(recipe).values()),
            "perplexity": quality["perplexity"],
            "teacher_perplexity": quality["teacher_perplexity"],
            "unigram_perplexity": math.exp(unigram),
            "perplexity_at_init": initial["perplexity"],
            "kl_at_init": initial["kl"],
            "kl": quality["kl"],
            "top1_agreement": quality["top1_agreement"],
            "recovered_share": recovered_share(quality["loss"], quality["teacher_loss"], unigram),
            "seconds": self.seconds,
            **speed,
        }

    def save(self, result: dict[str, Any]) -> None:
        """Saves the student, its tokenizer, loss curves and `result.json` to the directory, and removes checkpoints."""
        self.student.save_pretrained(self.directory)
        self.tokenizer.save_pretrained(self.directory)
        title = f"{result['mixer']}, seed {self.recipe.seed}"
        draw_curves(read_jsonl(self.metrics), self.directory / "loss.svg", title)
        head = {"digest": self.recipe.digest(), "seed": self.recipe.seed, **run_info()}
        write_json_atomic(self.directory / "result.json", {**head, "result": result})
        shutil.rmtree(self.checkpoints, ignore_errors=True)


@contextmanager
def on_first_process() -> Iterator[bool]:
    """True in the first of the processes that train together; the others wait until it has left the context."""
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():
        yield state.is_main_process
