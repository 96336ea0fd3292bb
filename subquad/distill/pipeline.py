"""From a recipe to a saved, measured student: runs the stages in order, skips what is finished, resumes what is not.

A run owns its directory. While it lasts, `checkpoints/` holds a directory a stage; at the end the directory itself is
the loadable student, with `recipe.yaml`, `metrics.jsonl` and `result.json` beside the weights.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.config import EndToEnd, Hidden, Matrix, Recipe, Stage
from subquad.data import PackedDataset, check_data, token_rows
from subquad.distill.progress import append_jsonl, draw_curves, read_jsonl
from subquad.distill.stage_cache import ORDER, StageCache, stage_key, write_lines
from subquad.distill.stages import (
    EndToEndDistillation,
    HiddenAlignment,
    MatrixMixing,
    Objective,
    respects_document_boundaries,
)
from subquad.distill.trainer import StageRun, newest_checkpoint, run_stage, total_steps
from subquad.evaluate.efficiency import decode_speed
from subquad.evaluate.perplexity import compare, recovered_share, unigram_loss
from subquad.modeling.linearize import linearize
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.teachers import ModelAndTokenizer, check_reference, load_teacher
from subquad.utils import UserError, run_info, write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)
CALIBRATION_TOKENS = 1024
UNIGRAM_TOKENS = 200_000


@dataclass
class RunContext:
    """What a run works with: the teacher, its tokenizer, and the text as rows of tokens."""

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: PackedDataset
    valid: PackedDataset

    @classmethod
    def prepare(cls, recipe: Recipe, loaded: ModelAndTokenizer | None = None) -> "RunContext":
        """Loads the teacher (unless a study has it already) and tokenises as much of the corpus as the recipe uses."""
        teacher, tokenizer = loaded or load_teacher(recipe.teacher)
        teacher.requires_grad_(False)
        if torch.cuda.is_available():
            teacher.to("cuda")  # type: ignore[arg-type]
        context, limit = recipe.data.seq_len, getattr(teacher.config, "max_position_embeddings", None)
        if limit is not None and context > limit:
            raise UserError(f"data.seq_len: got {context}; teacher {recipe.teacher!r} reads at most {limit} tokens")
        if recipe.data.document_masking and not respects_document_boundaries(teacher):
            raise UserError(
                f"teacher {recipe.teacher!r} lets documents in one row see each other, whatever their positions; "
                "expected data.document_masking: false"
            )
        tokens = epoch_tokens(recipe)
        return cls(
            teacher,
            tokenizer,
            train=token_rows(recipe.data, tokenizer, "train", limit=tokens, seed=recipe.seed),
            valid=token_rows(
                recipe.data, tokenizer, "validation", limit=recipe.evaluation.eval_tokens + context, seed=0
            ),
        )

    def held_out(self, recipe: Recipe, rows_a_batch: int = 4) -> list[dict[str, Tensor]]:
        """The batches on which students are measured: the same for every student and seed."""
        rows = self.valid.take(min(held_out_rows(recipe), len(self.valid)))
        return list(DataLoader(rows, batch_size=rows_a_batch))

    def sample(self, recipe: Recipe, tokens: int) -> Tensor:
        """About so many tokens of the training text, `[rows, context]`."""
        return first_rows(self.train, max(1, tokens // recipe.data.seq_len))


def held_out_rows(recipe: Recipe) -> int:
    return max(1, math.ceil(recipe.evaluation.eval_tokens / recipe.data.seq_len))


def first_rows(rows: PackedDataset, count: int) -> Tensor:
    """`[count, context]`"""
    return torch.stack([rows[i]["input_ids"] for i in range(count)])


def stages(recipe: Recipe) -> list[tuple[str, Stage]]:
    """The stages that a recipe has, in their order."""
    return [(name, stage) for name in ORDER if (stage := getattr(recipe.stages, name)) is not None]


def stage_tokens(recipe: Recipe) -> dict[str, int]:
    """The tokens that each stage reads, in whole steps."""
    context = recipe.data.seq_len
    return {name: total_steps(stage, context) * stage.batch_size * context for name, stage in stages(recipe)}


def epoch_tokens(recipe: Recipe) -> int:
    """The most tokens of the corpus that a run goes through before it begins anew."""
    return max(UNIGRAM_TOKENS, sum(stage_tokens(recipe).values()))


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """What tells of each stage, by name, whether another run has it too."""
    return {name: stage_key(recipe, name, epoch_tokens(recipe)) for name, _ in stages(recipe)}


def distill(
    recipe: Recipe,
    output: str | os.PathLike,
    loaded: ModelAndTokenizer | None = None,
    shared: StageCache | None = None,
) -> dict[str, Any]:
    """Runs a recipe in the directory `output` and returns its row of results (also where it was finished before).

    loaded: the recipe's teacher and tokenizer, where they are at hand.
    shared: finished stages of other runs, from which this one takes what it has in common with them, and to which it
        gives.

    Raises:
        UserError: the directory holds something else, or the run of another recipe.
    """
    output = Path(output)
    check_reference(recipe.teacher)
    check_data(recipe.data)
    finished = load_finished_result(recipe, output)
    if finished is not None:
        logger.info("%s is finished; nothing to do", output)
        return finished
    materials = RunContext.prepare(recipe, loaded)
    # Only now is the directory this run's: one refused for its recipe leaves none behind.
    with on_first_process() as first:
        if first:
            output.mkdir(parents=True, exist_ok=True)
            write_text_atomic(output / "recipe.yaml", recipe.to_yaml())
            if shared is not None:
                shared.restore(stage_keys(recipe), output)
    held_out = materials.held_out(recipe)
    student, done, spent = build_or_resume_student(recipe, output, materials, held_out)
    offset = 0
    for name, stage in stages(recipe):
        count = total_steps(stage, recipe.data.seq_len) * stage.batch_size
        if name not in done:
            before = time.perf_counter()
            train_stage(name, stage, recipe, output, student, materials, offset)
            spent += time.perf_counter() - before
            with on_first_process() as first:
                if first:
                    save_atomically(student, output / "checkpoints" / f"{name}-done", {"seconds": spent})
                    shutil.rmtree(output / "checkpoints" / name, ignore_errors=True)
                    if shared is not None:
                        shared.save(stage_keys(recipe)[name], name, output)
        offset += count
    row = evaluate_student(recipe, output, student, materials, held_out, offset * recipe.data.seq_len, spent)
    with on_first_process() as first:
        if first:
            save_run(recipe, output, student, materials, row)
    return row


@contextmanager
def on_first_process() -> Iterator[bool]:
    """True in the first of the processes that train together; the others wait until it is through."""
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():
        yield state.is_main_process


def save_run(
    recipe: Recipe, output: Path, student: SubquadForCausalLM, materials: RunContext, row: dict[str, Any]
) -> None:
    """Makes the run's directory the loadable student, with its papers beside the weights."""
    student.save_pretrained(output)
    materials.tokenizer.save_pretrained(output)
    draw_curves(read_jsonl(output / "metrics.jsonl"), output / "loss.svg", f"{row['mixer']}, seed {recipe.seed}")
    write_json_atomic(
        output / "result.json", {"digest": recipe.digest(), "seed": recipe.seed, **run_info(), "row": row}
    )
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def load_finished_result(recipe: Recipe, output: Path) -> dict[str, Any] | None:
    """The row of results if `output` holds this recipe's finished run; UserError if it cannot hold this run."""
    written = output / "recipe.yaml"
    if output.exists() and not output.is_dir():
        raise UserError(f"output {str(output)!r} is a file; expected a directory, new or of this run")
    if written.exists():
        if written.read_text() != recipe.to_yaml():
            raise UserError(
                f"{output} holds the run of another recipe (see its recipe.yaml); expected another directory, or the "
                "same recipe to continue it"
            )
    elif output.exists() and any(output.iterdir()):
        raise UserError(f"output {str(output)!r} is not empty and holds no run; expected a new directory")
    result = output / "result.json"
    return json.loads(result.read_text())["row"] if result.exists() else None


def build_or_resume_student(
    recipe: Recipe, output: Path, materials: RunContext, held_out: list[dict[str, Tensor]]
) -> tuple[SubquadForCausalLM, set[str], float]:
    """The student as far as finished stages brought it, those stages, and the seconds that they took."""
    folder = output / "checkpoints"
    names = [name for name, _ in stages(recipe)]
    reached = [i + 1 for i, name in enumerate(names) if (folder / f"{name}-done" / "done.json").exists()]
    if reached:
        done = names[: max(reached)]
        last = folder / f"{done[-1]}-done"
        logger.info("%s: resuming after stage %s", output, done[-1])
        student = SubquadForCausalLM.from_pretrained(last)
        return student, set(done), json.loads((last / "done.json").read_text())["seconds"]
    before = time.perf_counter()
    spec = recipe.student
    student = linearize(
        materials.teacher,
        spec.mixer,
        copy_qkv=spec.copy_qkv,
        layer_types=spec.layer_types,
        scale_ids=materials.sample(recipe, CALIBRATION_TOKENS),
        calibration_ids=materials.sample(recipe, spec.calibration_tokens)
        if spec.calibration_tokens and spec.copy_qkv
        else None,
        seed=recipe.seed,
        export_target=spec.export_target,
        **spec.mixer_kwargs,
    )
    seconds = time.perf_counter() - before
    with on_first_process() as first:
        if first and not (folder / "initial.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(folder / "initial.json", compare(student, materials.teacher, held_out))
    return student, set(), seconds


def train_stage(
    name: str,
    stage: Stage,
    recipe: Recipe,
    output: Path,
    student: SubquadForCausalLM,
    materials: RunContext,
    offset: int,
) -> None:
    """Runs one stage on the rows from `offset` on, or what is left of it."""
    folder, metrics = output / "checkpoints" / name, output / "metrics.jsonl"
    last = newest_checkpoint(folder)
    reached = 0 if last is None else int(last.name.rpartition("-")[2])
    if reached:
        logger.info("%s: resuming stage %s from step %d", output, name, reached)
    with on_first_process() as first:
        if first and metrics.exists():
            kept = [row for row in read_jsonl(metrics) if row["stage"] != name or row["step"] <= reached]
            write_lines(metrics, kept)
    count = total_steps(stage, recipe.data.seq_len) * stage.batch_size
    run = StageRun(
        recipe,
        stage,
        objective(name, stage, recipe, materials),
        rows=materials.train.take(count, start=offset),
        held_out=materials.valid.take(min(held_out_rows(recipe), len(materials.valid))),
        directory=folder,
        report=lambda row: append_jsonl(metrics, [{"stage": name, **row}]),
    )
    run_stage(run, student)


def objective(name: str, stage: Stage, recipe: Recipe, materials: RunContext) -> Objective:
    if isinstance(stage, Matrix):
        return MatrixMixing(materials.teacher, stage)
    if isinstance(stage, Hidden):
        return HiddenAlignment(materials.teacher, stage, materials.sample(recipe, CALIBRATION_TOKENS))
    assert isinstance(stage, EndToEnd), name
    return EndToEndDistillation(materials.teacher, stage)


def evaluate_student(
    recipe: Recipe,
    output: Path,
    student: SubquadForCausalLM,
    materials: RunContext,
    held_out: list[dict[str, Tensor]],
    tokens: int,
    seconds: float,
) -> dict[str, Any]:
    """The student's row of results."""
    quality = compare(student, materials.teacher, held_out)
    some = first_rows(materials.train, max(1, UNIGRAM_TOKENS // recipe.data.seq_len))
    unigram = unigram_loss(some, held_out, student.config.vocab_size)
    speed = decode_speed(student, held_out[0]["input_ids"][:1])
    initial = json.loads((output / "checkpoints" / "initial.json").read_text())
    return {
        "mixer": recipe.student.name,
        "copy_qkv": recipe.student.copy_qkv,
        "seed": recipe.seed,
        "parameters": student.num_parameters(),
        "tokens": tokens,
        "perplexity": quality["perplexity"],
        "teacher_perplexity": quality["teacher_perplexity"],
        "unigram_perplexity": math.exp(unigram),
        "perplexity_at_init": initial["perplexity"],
        "kl_at_init": initial["kl"],
        "kl": quality["kl"],
        "top1_agreement": quality["top1_agreement"],
        "recovered_share": recovered_share(quality["loss"], quality["teacher_loss"], unigram),
        "seconds": seconds,
        **speed,
    }


def save_atomically(student: SubquadForCausalLM, target: Path, done: dict[str, Any]) -> None:
    """Saves into a directory beside `target` and moves it there whole."""
    work = target.with_name(target.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    student.save_pretrained(work)
    write_json_atomic(work / "done.json", done)
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)
