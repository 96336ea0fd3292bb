"""`distill`: from a recipe to a saved and evaluated student. Finished stages are skipped, unfinished ones resumed."""

import json
import logging
import math
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from subquad.config import Recipe, different_keys, load_recipe
from subquad.data import StreamedDataset, check_data, spread_rows, token_rows
from subquad.distill.checkpoints import discard_damaged, seal
from subquad.distill.logging_callbacks import draw_curves, read_jsonl
from subquad.distill.objective import Objective
from subquad.distill.processes import on_first_process, start_processes
from subquad.distill.recipe_stages import StageCache, epoch_tokens, recipe_stages, stage_keys, stage_rows, stage_tokens
from subquad.distill.teacher_checks import check_teacher, teacher_placement
from subquad.distill.trainer import StageTrainer, stream_states
from subquad.distill.training_arguments import rows_per_process
from subquad.evaluate.efficiency import timed_decoding
from subquad.evaluate.perplexity import UNIGRAM_TOKENS, compare, recovered_share, unigram_loss
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.budget import calibration_shape
from subquad.modeling.linearize import linearize
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.placement import find_device
from subquad.modeling.summary import model_card
from subquad.modeling.teachers import ModelAndTokenizer, check_reference, load_placed
from subquad.registry import STAGES
from subquad.selection.ranking import top_groups
from subquad.selection.texts import HAYSTACK
from subquad.utils import (
    UserError,
    exclusive,
    lock_of,
    probe_output,
    run_info,
    saving,
    write_json_atomic,
    write_text_atomic,
)

logger = logging.getLogger(__name__)
MAX_DIFFERENCES = 6
"""Differences of two recipes in a message."""
SAMPLE_TOKENS = 48
"""The end of a prompt that is shown with its continuations."""
SCALE_TOKENS = 1024
"""Training tokens on which the scales of the teacher's outputs are measured."""


def distill(
    recipe: Recipe,
    output: str | os.PathLike,
    loaded: ModelAndTokenizer | None = None,
    stage_cache: StageCache | None = None,
    parallel: str = "ddp",
) -> dict[str, Any]:
    """Runs a recipe in the directory `output` and returns its result, also if the run was finished before.

    At the end the directory is the loadable student, with its model card `README.md`, `recipe.yaml`, `metrics.jsonl`,
    `loss.svg` and `result.json`.

    Args:
        loaded: the recipe's teacher and tokenizer, if they are loaded already.
        stage_cache: finished stages that this run shares with others; it takes them from there and stores its own.
        parallel: what the processes of `torchrun` share while a stage trains. "ddp": the rows of a batch. "fsdp": also
            weights, gradients and optimizer states. "layers", "layers+fsdp": in stages 1 and 2 the layers, each trained
            in one process; the other stages are trained with DDP or FSDP.

    Raises:
        UserError: the directory holds other files or the run of another recipe; another process is executing its run;
            the teacher cannot read `data.seq_len` tokens or does not mask documents.
    """
    directory = Path(output)
    check_reference(recipe.teacher, "teacher")
    check_data(recipe.data)
    if (result := load_finished_result(recipe, directory)) is None:
        start_processes(recipe, parallel)
        # by now all processes have looked into the directory, which they share
        on_first_process(probe_output, "output", directory)
        with ExitStack() as held:
            on_first_process(lambda: held.enter_context(exclusive(lock_of(directory), "run", directory)))
            result = load_finished_result(recipe, directory)  # another run may have finished it meanwhile
            PartialState().wait_for_everyone()
            return result or execute_stages(DistillationRun(recipe, directory, loaded, parallel), stage_cache)
    logger.info("%s is finished; nothing to do", directory)
    return result


def execute_stages(run: "DistillationRun", stage_cache: StageCache | None) -> dict[str, Any]:
    """Trains the stages that are not finished, evaluates the student and saves it; returns the result."""
    on_first_process(run.start, stage_cache)
    run.build_or_resume_student()
    for name, key in stage_keys(run.recipe).items():
        if name not in run.finished_stages:
            run.train_stage(name)
            if stage_cache is not None:
                on_first_process(stage_cache.save, key, run.checkpoints / f"{name}-done")
    result = run.evaluate_student()
    on_first_process(run.save, result)
    return result


def load_finished_result(recipe: Recipe, directory: Path) -> dict[str, Any] | None:
    """The result of the finished run in `directory`, or None.

    Raises:
        UserError: the directory cannot hold this run.
    """
    written = directory / "recipe.yaml"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output: {str(directory)!r} is a file; expected a new directory, or that of this run")
    if written.exists():
        if different := different_keys(load_recipe(written), recipe):
            values = [f"{key} is {there} there and {here} here" for key, (there, here) in different.items()]
            more = [f"{len(values) - MAX_DIFFERENCES} more keys differ"] if len(values) > MAX_DIFFERENCES else []
            raise UserError(
                f"output: {str(directory)!r} holds the run of another recipe: "
                f"{', '.join(values[:MAX_DIFFERENCES] + more)}; expected another directory, or the same recipe to "
                "continue its run"
            )
    elif directory.exists() and any(directory.iterdir()):
        raise UserError(f"output: {str(directory)!r} is not empty and holds no run; expected a new directory")
    path = directory / "result.json"
    return json.loads(path.read_text())["result"] if path.exists() else None


class DistillationRun:
    """What a run works with, and what it does.

    Its directory holds `recipe.yaml`, `metrics.jsonl` and, until the run is finished, `checkpoints/`: the checkpoints
    of the current stage in `NAME/`, the student after each finished stage in `NAME-done/`, and the quality of the
    untrained student in `initial.json`.

    `student` exists after `build_or_resume_student`.
    """

    student: SubquadForCausalLM

    def __init__(self, recipe: Recipe, directory: Path, loaded: ModelAndTokenizer | None = None, parallel: str = "ddp"):
        """Loads the teacher, unless `loaded` has it and its tokenizer, and tokenizes as much of the text as needed: of
        streamed text its beginning."""
        self.recipe, self.directory, self.parallel = recipe, directory, parallel
        self.checkpoints, self.metrics = directory / "checkpoints", directory / "metrics.jsonl"
        self.finished_stages: list[str] = []
        self.seconds = 0.0
        """Time to build and train the student so far, over all sessions."""
        self.teacher, self.tokenizer = loaded or load_placed(recipe.teacher, teacher_placement(recipe))
        self.teacher.to(find_device(recipe.device)).requires_grad_(False)  # type: ignore[arg-type]
        check_teacher(self.teacher, recipe)
        data, eval_tokens = recipe.data, recipe.evaluation.eval_tokens
        limit = epoch_tokens(recipe) if data.shuffle_buffer is None else UNIGRAM_TOKENS
        self.train = token_rows(data, self.tokenizer, "train", limit=limit, seed=recipe.seed)
        self.stream = None if data.shuffle_buffer is None else self.open_stream()
        validation = token_rows(data, self.tokenizer, "validation", limit=eval_tokens + data.seq_len, seed=0)
        count = max(1, math.ceil(eval_tokens / data.seq_len))
        self.validation = validation.take(min(count, len(validation)))
        """The rows of `evaluation.eval_tokens`, the same for every student and seed."""
        self.validation_batches = list(DataLoader(self.validation, batch_size=4))
        self.attention_layers = discover_attention(self.teacher)

    def open_stream(self) -> StreamedDataset:
        state = PartialState()
        place = {"process": state.process_index, "processes": state.num_processes}
        return StreamedDataset(self.recipe.data, self.tokenizer, self.train, seed=self.recipe.seed, **place)

    def stage_text(self, name: str) -> Dataset:
        """The rows of a stage, which follow those of the stages before it."""
        rows = stage_rows(self.recipe)
        names = list(rows)
        count, start = rows[name], sum(rows[earlier] for earlier in names[: names.index(name)])
        if self.stream is None:
            return self.train.take(count, start)
        processes = self.stream.processes
        return self.stream.take(count, start, rows_per_process(getattr(self.recipe.stages, name), processes)[1])

    def training_ids(self, tokens: int) -> Tensor:
        """The first rows of the training text, about `tokens` tokens: `[rows, seq_len]`."""
        count = max(1, tokens // self.recipe.data.seq_len)
        return torch.stack([self.train[i]["input_ids"] for i in range(count)])

    # ------------------------------------------------------------------ the steps of a run

    def start(self, stage_cache: StageCache | None) -> None:
        """Creates the directory: after the checks of the teacher, so that a refused recipe leaves none."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.directory / "recipe.yaml", self.recipe.to_yaml())
        if stage_cache is not None:
            stage_cache.restore(stage_keys(self.recipe), self.directory)

    def build_or_resume_student(self) -> None:
        """Loads the student after the last finished stage, or builds a new one and measures it."""
        names = list(recipe_stages(self.recipe))
        done = [i for i, name in enumerate(names) if self.is_done(name)]
        if done:
            self.finished_stages = names[: max(done) + 1]
            last = self.checkpoints / f"{self.finished_stages[-1]}-done"
            logger.info("%s: resuming after stage %s", self.directory, self.finished_stages[-1])
            self.student = SubquadForCausalLM.from_pretrained(last).to(self.teacher.device)
            done_record = json.loads((last / "done.json").read_text())
            self.seconds = done_record["seconds"]
            if self.stream is not None:
                self.stream.load_state(done_record["stream"])
            return
        start = time.perf_counter()
        try:
            self.student = self.build_student()
        except KeyboardInterrupt as error:
            error.hint = "; the same command builds the student anew"  # type: ignore[attr-defined]
            raise
        self.seconds = time.perf_counter() - start
        on_first_process(self.measure_untrained_student)

    def build_student(self) -> SubquadForCausalLM:
        options = self.recipe.student
        return linearize(
            self.teacher,
            options.mixer,
            copy_qkv=options.copy_qkv,
            layer_types=options.layer_types,
            scale_ids=self.training_ids(SCALE_TOKENS),
            calibration_ids=self.calibration_ids(),
            seed=self.recipe.seed,
            export_target=options.export_target,
            attention_layers=self.attention_layers,
            budget=options.budget,
            budget_context=options.budget_context,
            budget_memory=options.budget_memory,
            keep_groups=self.kept_groups(),
            **options.mixer_kwargs,
        ).float()

    def is_done(self, name: str) -> bool:
        """Whether the student after stage `name` is saved."""
        directory = self.checkpoints / f"{name}-done"
        with PartialState().main_process_first():
            return directory.exists() and discard_damaged(directory, "done.json")

    def calibration_ids(self) -> Tensor | None:
        """Training text on which the student is calibrated, `[rows, T]`."""
        options = self.recipe.student
        if options.budget is not None:
            return spread_rows(self.recipe.data, self.tokenizer, *calibration_shape(self.teacher))
        tokens = options.calibration_tokens if options.copy_qkv else None
        return None if tokens is None else self.training_ids(tokens)

    def kept_groups(self) -> list[tuple[int, int]]:
        """Layer and key/value head of the groups that the student keeps whole."""
        options = self.recipe.student
        if options.keep_groups is None:
            return []
        given = {"by": options.keep_by, "seed": self.recipe.seed, "attention_layers": self.attention_layers}
        haystack = spread_rows(self.recipe.data, self.tokenizer, *HAYSTACK).flatten()
        return top_groups(self.teacher, self.tokenizer, haystack, options.keep_groups, **given)

    def measure_untrained_student(self) -> None:
        if not (self.checkpoints / "initial.json").exists():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            initial = compare(self.student, self.teacher, self.validation_batches)
            write_json_atomic(self.checkpoints / "initial.json", initial)

    def prepare_stage(self, name: str) -> tuple[Objective, Dataset]:
        """The prepared objective of a stage, and the rows that it trains on."""
        objective: Objective = STAGES[name](
            self.teacher,
            getattr(self.recipe.stages, name),
            scale_ids=self.training_ids(SCALE_TOKENS),
            attention_layers=self.attention_layers,
        )
        train = self.stage_text(name)
        if self.stream is None:
            evaluated = [] if self.recipe.evaluation.eval_steps is None else [self.validation]
            device, enabled = self.teacher.device.type, self.recipe.precision == "bfloat16"
            with PartialState().main_process_first(), torch.autocast(device, torch.bfloat16, enabled=enabled):
                objective.prepare(ConcatDataset([train, *evaluated]))
        return objective, train

    def train_stage(self, name: str) -> None:
        """Trains a stage, from its newest checkpoint if there is one, and saves the student after it."""
        start = time.perf_counter()
        objective, train = self.prepare_stage(name)
        data = train, self.validation
        trainer = StageTrainer(self.recipe, objective, self.student, *data, self.directory, self.parallel)
        trainer.train_stage()
        self.seconds += time.perf_counter() - start
        self.finished_stages.append(name)
        on_first_process(self.save_stage, name, stream_states(train, stage_rows(self.recipe)[name]))

    def save_stage(self, name: str, stream: list[dict[str, Any]]) -> None:
        """Saves the student after stage `name`, completely or not at all, and removes the stage's checkpoints."""
        target = self.checkpoints / f"{name}-done"
        partial = target.with_name(target.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        with saving(partial, f"the student after stage {name}"):
            self.student.save_pretrained(partial)
            for path in (self.checkpoints / "initial.json", self.metrics):
                shutil.copy(path, partial)
            write_json_atomic(partial / "done.json", {"seconds": self.seconds, "stream": stream})
            seal(partial)
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
        initial = json.loads((self.checkpoints / "initial.json").read_text())
        prompt = self.validation_batches[0]["input_ids"][:1]
        (text, speed), (of_teacher, teacher_speed) = (timed_decoding(one, prompt) for one in (student, self.teacher))
        pieces = {"prompt": prompt[:, -SAMPLE_TOKENS:], "student": text, "teacher": of_teacher}
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
            **{f"teacher_{name}": value for name, value in teacher_speed.items()},
            "sample": {name: self.tokenizer.decode(ids[0]) for name, ids in pieces.items()},
        }

    def save(self, result: dict[str, Any]) -> None:
        """Saves the student, its tokenizer, loss curves and `result.json` to the directory, and removes checkpoints."""
        with saving(self.directory, "the student", remove=False):
            self.save_files(result)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def save_files(self, result: dict[str, Any]) -> None:
        self.student.save_pretrained(self.directory)
        self.tokenizer.save_pretrained(self.directory)
        title = f"{result['mixer']}, seed {self.recipe.seed}"
        draw_curves(read_jsonl(self.metrics), self.directory / "loss.svg", title)
        head = {"digest": self.recipe.digest(), "seed": self.recipe.seed, **run_info(self.student.device)}
        notes = training_notes(self.recipe, result)
        card = model_card(self.student.config, self.recipe.teacher, notes, trained=True)  # type: ignore[arg-type]
        (self.directory / "README.md").write_text(card, encoding="utf-8")
        write_json_atomic(self.directory / "result.json", {**head, "result": result})


def training_notes(recipe: Recipe, result: dict[str, Any]) -> str:
    """Of a model card: how the student was trained, and what was measured."""
    tokens = ", ".join(f"{name} {count:,}" for name, count in stage_tokens(recipe).items())
    scores = {
        "perplexity": f"{result['perplexity']:.2f} (teacher {result['teacher_perplexity']:.2f})",
        "KL from the teacher, nats per token": f"{result['kl']:.3f}",
        "equal most likely tokens": f"{result['top1_agreement']:.1%}",
    }
    lines = [
        f"Training tokens by stage: {tokens}; the recipe is in `recipe.yaml`.",
        f"On {recipe.evaluation.eval_tokens:,} tokens of held-out text of the same source:",
        "| measure | value |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in scores.items()),
    ]
    return "\n" + "\n\n".join(lines) + "\n"
