"""One stage of distillation on `transformers.Trainer`: batches, schedule, checkpoints, precision, held-out loss.

Knows how a stage is run and resumed; what it learns is the objective's business (`stages.py`), which parts of the
student learn that of `parameters.py`, what is reported that of `progress.py`, which stages there are the pipeline's.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subquad.config import Recipe, Stage
from subquad.data.packing import LOSS_IGNORED_LABEL, next_labels
from subquad.distill.param_groups import EMA, add_lora, merge_lora, parameter_groups
from subquad.distill.progress import Progress, tensorboard
from subquad.distill.stages import Batch, Objective
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}
AVERAGE = "average.safetensors"


@dataclass
class StageRun:
    """Everything that one stage of a run needs."""

    recipe: Recipe
    stage: Stage
    objective: Objective
    rows: Dataset
    """As many rows as the steps consume, in their order."""
    held_out: Dataset
    directory: Path
    """Of its checkpoints."""
    report: Callable[[dict[str, Any]], None]
    """Is called with a mapping (stage, step, tokens, loss, lr, tokens_per_second) at every logged step."""

    @property
    def steps(self) -> int:
        return total_steps(self.stage, self.recipe.data.seq_len)


class StageTrainer(Trainer):
    """`transformers.Trainer` whose loss is an objective's and whose rows come in the order of the data set.

    Losses are means over the tokens that count. Where those are not alike in all micro-batches of a step (padding,
    conversations), each weighs by its own: the Trainer divides by the number of micro-batches, and here their shares
    are put right, over all processes.
    """

    def __init__(self, run: StageRun, student: SubquadForCausalLM, groups: list[dict[str, Any]], **kwargs: Any):
        super().__init__(model=student, **kwargs)
        self.run = run
        self.student: SubquadForCausalLM = student
        self.groups = groups
        self.average = None if run.stage.ema_decay is None else EMA(student, run.stage.ema_decay)
        self.loss_weights: list[float] = []
        self.plain_clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self.clip

    # ------------------------------------------------------------------ the loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], None]:  # type: ignore[override]
        """The micro-batches of a step, and beside them the share that each has in its mean."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        counts = torch.stack([self.run.objective.count(batch) for batch in samples]).float()
        total = counts.sum()
        if self.accelerator.num_processes > 1:
            total = self.accelerator.gather(total.to(self.args.device)).sum().cpu()
        self.loss_weights = (counts * len(samples) * self.accelerator.num_processes / total.clamp_min(1)).tolist()
        return samples, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        share = self.loss_weights.pop(0) if model.training and self.loss_weights else 1.0
        loss = self.objective_loss(model, inputs)
        return (loss * share, {"loss": loss}) if return_outputs else loss * share

    def objective_loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        objective = self.run.objective
        with self.autocast():
            targets = objective.targets(batch)
            outputs = model(objective=objective, **targets)
        if not torch.isfinite(outputs.loss):
            self.raise_non_finite(outputs.layers, targets)
        return outputs.loss

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.run.recipe.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, torch.bfloat16)

    def raise_non_finite(self, layers: torch.Tensor | None, targets: dict[str, Any]) -> None:
        """A loss that is not finite, with where it began."""
        if layers is not None:
            bad = [i for i, value in enumerate(layers.tolist()) if not math.isfinite(value)]
        else:
            bad = not_finite(self.student, targets["input_ids"], targets.get("positions"))
        where = f"layer {bad[0]}" if bad else "the head or the loss itself"
        raise UserError(
            f"stage {self.run.objective.name}, step {self.state.global_step + 1}: the loss is not finite, from {where} "
            f"on; the checkpoint before it is kept in {self.run.directory}. Lower the rate, or raise the warm-up"
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Of held-out text the stage's loss, and that of the student as a language model."""
        batch = self._prepare_inputs(inputs)
        labels, count = batch.get("labels", batch["input_ids"]), (next_labels(batch) != LOSS_IGNORED_LABEL).sum()
        with torch.no_grad():
            loss = self.objective_loss(model, batch)
            given = {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids")}
            with self.autocast():
                text = model(**given, labels=labels, use_cache=False).loss
        self.text_loss += torch.stack([text.double().nan_to_num() * count, count.double()]).cpu()
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        self.text_loss = torch.zeros(2, dtype=torch.float64)
        out = super().evaluation_loop(*args, **kwargs)
        total = self.text_loss
        if self.accelerator.num_processes > 1:
            total = self.accelerator.gather(total.to(self.args.device)[None]).sum(0).cpu()
        return out._replace(metrics={**(out.metrics or {}), "eval_text_loss": float(total[0] / total[1])})

    # ------------------------------------------------------------------ what learns, in which order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rate = self.run.stage.lr
            self.optimizer = torch.optim.AdamW(self.groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
        return self.optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def clip(self, *args: Any, **kwargs: Any) -> Any:
        """As accelerate's; a norm that is not finite would make every weight so."""
        norm = self.plain_clip(*args, **kwargs)
        if norm is not None and not math.isfinite(float(norm)):
            bad = [n for n, p in self.student.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            raise UserError(
                f"stage {self.run.objective.name}, step {self.state.global_step + 1}: the gradient is not finite, in "
                f"{', '.join(bad[:3])}; the checkpoint before it is kept in {self.run.directory}. Lower the rate, or "
                "raise the warm-up"
            )
        return norm

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, which writes its state behind everything else: the average must be there before it."""
        if self.average is not None and self.args.should_save:
            folder = self.run.directory / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.average.state(), folder / AVERAGE)
        super()._save_checkpoint(model, trial)


def not_finite(student: SubquadForCausalLM, input_ids: torch.Tensor, positions: torch.Tensor | None) -> list[int]:
    """The layers whose mixer or attention gives something that is not finite."""
    bad: list[int] = []

    def look(index: int, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if not output.isfinite().all():
            bad.append(index)

    hooks = [b.register_forward_hook(lambda _m, _a, out, i=i: look(i, out)) for i, b in enumerate(student.mixer_layers)]
    try:
        with torch.no_grad():
            student.last_hidden_state(input_ids, positions)
    finally:
        for hook in hooks:
            hook.remove()
    return bad


def total_steps(stage: Stage, context: int) -> int:
    return math.ceil(stage.tokens / (stage.batch_size * context))


def run_stage(run: StageRun, student: SubquadForCausalLM) -> None:
    """Trains `student` in place, continuing from the newest whole checkpoint in the run's directory."""
    if run.stage.lora is not None:
        add_lora(student, run.stage.lora, run.recipe.seed)
    groups = parameter_groups(student, run.objective.trained(student), run.stage)
    last = newest_checkpoint(run.directory)
    trainer = StageTrainer(
        run,
        student,
        groups,
        args=training_arguments(run),
        train_dataset=run.rows,
        eval_dataset=run.held_out,
        callbacks=callbacks(run),
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    if trainer.average is not None:
        if last is not None:
            trainer.average.load(load_file(last / AVERAGE))
        trainer.add_callback(AverageEachStep(trainer.average, student))
    switch_checkpointing(student, run.stage.gradient_checkpointing)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if trainer.average is not None:
        trainer.average.put_into(student)
    if run.stage.lora is not None:
        merge_lora(student)
    switch_checkpointing(student, False)
    student.requires_grad_(True)
    student.zero_grad()


def callbacks(run: StageRun) -> list[TrainerCallback]:
    found: list[TrainerCallback] = [Progress(run.stage.batch_size * run.recipe.data.seq_len, run.report, label(run))]
    if run.recipe.report_to == "tensorboard" and PartialState().is_main_process:
        found.append(tensorboard(run.directory.parents[1] / "tensorboard" / run.objective.name))
    return found


def label(run: StageRun) -> str:
    """The run, by its directory, and the stage."""
    return f"{run.directory.parents[1].name} {run.objective.name}"


def training_arguments(run: StageRun) -> TrainingArguments:
    stage, recipe, steps = run.stage, run.recipe, run.steps
    processes = PartialState().num_processes
    share, micro = rows_of_a_process(stage, processes)
    every, cuda = recipe.evaluation.eval_steps, torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run.directory),
        run_name=label(run),
        report_to="none" if recipe.report_to == "tensorboard" else recipe.report_to,
        disable_tqdm=True,
        logging_strategy="steps",
        logging_steps=max(1, min(10, steps // 20)),
        logging_nan_inf_filter=False,
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=stage.lr,
        lr_scheduler_type=SCHEDULES[stage.lr_scheduler],
        lr_scheduler_kwargs={"num_decay_steps": math.ceil(stage.decay * steps), "decay_type": "linear"}
        if stage.lr_scheduler == "wsd"
        else {},
        warmup_steps=math.ceil(stage.warmup * steps),
        max_grad_norm=stage.max_grad_norm,
        eval_strategy="no" if every is None else "steps",
        eval_steps=every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=recipe.checkpoint.save_steps,
        save_total_limit=max(2, recipe.checkpoint.save_total_limit),
        load_best_model_at_end=recipe.evaluation.load_best_model_at_end,
        metric_for_best_model="loss" if recipe.evaluation.load_best_model_at_end else None,
        greater_is_better=False if recipe.evaluation.load_best_model_at_end else None,
        remove_unused_columns=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=not cuda,
        ddp_backend="gloo" if processes > 1 and not cuda else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
    )


def rows_of_a_process(stage: Stage, processes: int) -> tuple[int, int]:
    """Rows that a process has in a step, and at a time."""
    if stage.batch_size % processes:
        raise UserError(f"batch_size: got {stage.batch_size}, expected a multiple of the {processes} processes")
    share = stage.batch_size // processes
    micro = min(share, stage.micro_batch_size or share)
    if share % micro:
        raise UserError(f"micro_batch_size: got {micro}, expected a divisor of the {share} rows of a process in a step")
    return share, micro


def switch_checkpointing(student: SubquadForCausalLM, on: bool) -> None:
    """Gradient checkpointing, by the name that this release of `transformers` has for it."""
    name = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(student, f"{name}_checkpointing_enable")({"use_reentrant": False})
    elif any(getattr(module, "gradient_checkpointing", False) for module in student.modules()):
        getattr(student, f"{name}_checkpointing_disable")()


class AverageEachStep(TrainerCallback):
    def __init__(self, average: EMA, student: SubquadForCausalLM):
        self.average, self.student = average, student

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.average.update(self.student)


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end; those cut off by a kill are removed.

    `Trainer` writes its state last: a checkpoint is whole where that can be read.
    """
    with PartialState().main_process_first():
        for path in sorted(directory.glob("checkpoint-*"), key=_step, reverse=True):
            try:
                state = json.loads((path / "trainer_state.json").read_text())
                if state["global_step"] == _step(path):
                    return path
            except (OSError, ValueError, KeyError):
                pass
            shutil.rmtree(path, ignore_errors=True)
    return None


def _step(path: Path) -> int:
    suffix = path.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1
