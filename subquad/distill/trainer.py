"""Training of one stage on `transformers.Trainer`: batches, learning rates, checkpoints, precision, validation."""

import contextlib
import json
import math
import shutil
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
from subquad.data.packing import IGNORE_INDEX, next_labels
from subquad.distill.logging_callbacks import MetricsCallback, append_jsonl, tensorboard
from subquad.distill.objective import Batch, Objective
from subquad.distill.param_groups import EMA, add_lora, merge_lora, parameter_groups
from subquad.distill.recipe_stages import total_steps
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError

LR_SCHEDULERS = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}
"""The names in recipes and those of `transformers`."""
EMA_FILE = "ema.safetensors"


@dataclass
class StageRun:
    """One stage of a run."""

    recipe: Recipe
    objective: Objective
    train: Dataset
    """As many rows as the stage consumes, in order."""
    validation: Dataset
    run_directory: Path

    @property
    def name(self) -> str:
        return self.objective.name

    @property
    def stage(self) -> Stage:
        return getattr(self.recipe.stages, self.name)

    @property
    def steps(self) -> int:
        return total_steps(self.stage, self.recipe.data.seq_len)

    @property
    def directory(self) -> Path:
        """The directory of the stage's checkpoints."""
        return self.run_directory / "checkpoints" / self.name

    @property
    def label(self) -> str:
        return f"{self.run_directory.name} {self.name}"

    def report(self, record: dict[str, Any]) -> None:
        """Appends a record (step, tokens, seconds, loss, lr ...) to the run's `metrics.jsonl`."""
        append_jsonl(self.run_directory / "metrics.jsonl", {"stage": self.name, **record})


class StageTrainer(Trainer):
    """A `transformers.Trainer` whose loss is that of an objective and whose rows come in the order of the dataset.

    A loss is a mean over the tokens that are not ignored. The Trainer averages over the micro-batches of a step. Where
    they differ in these tokens (padding, conversations), each is weighted by its number of tokens, over all processes.
    """

    def __init__(self, run: StageRun, student: SubquadForCausalLM, groups: list[dict[str, Any]], **kwargs: Any):
        super().__init__(model=student, **kwargs)
        self.run = run
        self.student: SubquadForCausalLM = student
        self.groups = groups
        self.ema = None if run.stage.ema_decay is None else EMA(student, run.stage.ema_decay)
        self.loss_weights: list[float] = []
        self.accelerate_clip_grad_norm_ = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self.clip_grad_norm_

    # ------------------------------------------------------------------ the loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], None]:  # type: ignore[override]
        """The micro-batches of a step, as the objective reads them; also sets the weight of each in the step's mean."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        with self.autocast():
            samples = [self.run.objective.training_batch(batch) for batch in samples]
        counts = torch.stack([self.run.objective.count_tokens(batch) for batch in samples]).float()
        total = counts.sum()
        if self.accelerator.num_processes > 1:
            total = self.accelerator.gather(total.to(self.args.device)).sum().cpu()
        self.loss_weights = (counts * len(samples) * self.accelerator.num_processes / total.clamp_min(1)).tolist()
        return samples, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        weight = self.loss_weights.pop(0) if model.training and self.loss_weights else 1.0
        loss = self.objective_loss(model, inputs)
        return (loss * weight, {"loss": loss}) if return_outputs else loss * weight

    def objective_loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        objective = self.run.objective
        with self.autocast():
            targets = objective.forward_kwargs(batch)
            outputs = model(objective=objective, **targets)
        if not torch.isfinite(outputs.loss):
            self.raise_non_finite_loss(outputs.layer_losses, targets)
        return outputs.loss

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.run.recipe.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, torch.bfloat16)

    def raise_non_finite_loss(self, layer_losses: torch.Tensor | None, targets: dict[str, Any]) -> None:
        if layer_losses is not None:
            bad = [i for i, value in enumerate(layer_losses.tolist()) if not math.isfinite(value)]
        else:
            bad = non_finite_layers(self.student, targets["input_ids"], targets.get("positions"))
        origin = f"layer {bad[0]}" if bad else "the head or the loss itself"
        raise self.non_finite_error(f"the loss is not finite, starting at {origin}")

    def non_finite_error(self, problem: str) -> UserError:
        return UserError(
            f"stage {self.run.name}, step {self.state.global_step + 1}: {problem}; lower lr or raise warmup (the last "
            f"checkpoint is in {self.run.directory})"
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The stage's loss on a validation batch; also sums the student's cross-entropy."""
        batch = self._prepare_inputs(inputs)
        labels, count = batch.get("labels", batch["input_ids"]), (next_labels(batch) != IGNORE_INDEX).sum()
        with torch.no_grad():
            with self.autocast():
                text = self.run.objective.training_batch(batch)
            loss = self.objective_loss(model, text)
            with self.autocast():
                ce = model(
                    input_ids=batch["input_ids"],
                    position_ids=batch.get("position_ids"),
                    labels=labels,
                    use_cache=False,
                ).loss
        self.validation_ce += torch.stack([ce.double() * count if count else count.double(), count.double()]).cpu()
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        # the sum over tokens in nats, and the number of tokens
        self.validation_ce = torch.zeros(2, dtype=torch.float64)
        out = super().evaluation_loop(*args, **kwargs)
        total = self.validation_ce
        if self.accelerator.num_processes > 1:
            total = self.accelerator.gather(total.to(self.args.device)[None]).sum(0).cpu()
        return out._replace(metrics={**(out.metrics or {}), "eval_ce": float(total[0] / total[1])})

    # ------------------------------------------------------------------ optimizer and order of rows

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rate = self.run.stage.lr
            self.optimizer = torch.optim.AdamW(self.groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
        return self.optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def clip_grad_norm_(self, *args: Any, **kwargs: Any) -> Any:
        """Accelerate's; raises UserError for a norm that is not finite, which would make all weights so."""
        norm = self.accelerate_clip_grad_norm_(*args, **kwargs)
        if norm is not None and not math.isfinite(float(norm)):
            bad = [n for n, p in self.student.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            raise self.non_finite_error(f"the gradient is not finite, in {', '.join(bad[:3])}")
        return norm

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves the average before the Trainer saves the rest: its own state, which it writes last, marks a checkpoint
        as complete."""
        if self.ema is not None and self.args.should_save:
            checkpoint = self.run.directory / f"checkpoint-{self.state.global_step}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            save_file(self.ema.state_dict(), checkpoint / EMA_FILE)
        super()._save_checkpoint(model, trial)


def non_finite_layers(
    student: SubquadForCausalLM, input_ids: torch.Tensor, positions: torch.Tensor | None
) -> list[int]:
    """The layers whose mixer or attention has an output that is not finite."""
    bad: list[int] = []

    def check(index: int, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if not output.isfinite().all():
            bad.append(index)

    hooks = [
        x.register_forward_hook(lambda _m, _a, out, i=i: check(i, out)) for i, x in enumerate(student.mixer_layers)
    ]
    try:
        with torch.no_grad():
            student.last_hidden_state(input_ids, positions)
    finally:
        for hook in hooks:
            hook.remove()
    return bad


def run_stage(run: StageRun, student: SubquadForCausalLM) -> None:
    """Trains `student` in place, from the newest complete checkpoint of the stage if there is one."""
    if run.stage.lora is not None:
        add_lora(student, run.stage.lora, run.recipe.seed)
    groups = parameter_groups(student, run.objective.trained_parameters(student), run.stage)
    checkpoint = newest_checkpoint(run.directory)
    trainer = StageTrainer(
        run,
        student,
        groups,
        args=training_arguments(run),
        train_dataset=run.train,
        eval_dataset=run.validation,
        callbacks=callbacks(run),
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    if trainer.ema is not None:
        if checkpoint is not None:
            trainer.ema.load_state_dict(load_file(checkpoint / EMA_FILE))
        trainer.add_callback(EMACallback(trainer.ema, student))
    set_gradient_checkpointing(student, run.stage.gradient_checkpointing)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.ema is not None:
        trainer.ema.copy_to(student)
    if run.stage.lora is not None:
        merge_lora(student)
    set_gradient_checkpointing(student, False)
    student.requires_grad_(True)
    student.zero_grad()


def callbacks(run: StageRun) -> list[TrainerCallback]:
    tokens_per_step = run.stage.batch_size * run.recipe.data.seq_len
    result: list[TrainerCallback] = [MetricsCallback(tokens_per_step, run.report, run.label)]
    if run.recipe.report_to == "tensorboard" and PartialState().is_main_process:
        result.append(tensorboard(run.run_directory / "tensorboard" / run.name))
    return result


def training_arguments(run: StageRun) -> TrainingArguments:
    stage, recipe, steps = run.stage, run.recipe, run.steps
    processes = PartialState().num_processes
    rows, micro_batch = rows_per_process(stage, processes)
    eval_steps, best = recipe.evaluation.eval_steps, recipe.evaluation.load_best_model_at_end
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run.directory),
        run_name=run.label,
        report_to="none" if recipe.report_to == "tensorboard" else recipe.report_to,
        disable_tqdm=True,
        logging_strategy="steps",
        logging_steps=max(1, min(10, steps // 20)),
        logging_nan_inf_filter=False,
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        learning_rate=stage.lr,
        lr_scheduler_type=LR_SCHEDULERS[stage.lr_scheduler],
        lr_scheduler_kwargs={"num_decay_steps": math.ceil(stage.decay * steps), "decay_type": "linear"}
        if stage.lr_scheduler == "wsd"
        else {},
        warmup_steps=math.ceil(stage.warmup * steps),
        max_grad_norm=stage.max_grad_norm,
        eval_strategy="no" if eval_steps is None else "steps",
        eval_steps=eval_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=recipe.checkpoint.save_steps,
        save_total_limit=recipe.checkpoint.save_total_limit,
        load_best_model_at_end=best,
        metric_for_best_model="loss" if best else None,
        greater_is_better=False if best else None,
        remove_unused_columns=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=not cuda,
        ddp_backend="gloo" if processes > 1 and not cuda else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
    )


def rows_per_process(stage: Stage, processes: int) -> tuple[int, int]:
    """The rows of a process in a step and in a micro-batch.

    Raises:
        UserError: `batch_size` or `micro_batch_size` cannot be divided so.
    """
    if stage.batch_size % processes:
        raise UserError(f"batch_size: got {stage.batch_size}, expected a multiple of the {processes} processes")
    rows = stage.batch_size // processes
    micro_batch = min(rows, stage.micro_batch_size or rows)
    if rows % micro_batch:
        raise UserError(
            f"micro_batch_size: got {micro_batch}, expected a divisor of the {rows} rows that a process has in a step"
        )
    return rows, micro_batch


def set_gradient_checkpointing(student: SubquadForCausalLM, on: bool) -> None:
    """Switches gradient checkpointing, whose methods have other names in newer releases of `transformers`."""
    name = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(student, f"{name}_checkpointing_enable")({"use_reentrant": False})
    elif any(getattr(module, "gradient_checkpointing", False) for module in student.modules()):
        getattr(student, f"{name}_checkpointing_disable")()


class EMACallback(TrainerCallback):
    def __init__(self, ema: EMA, student: SubquadForCausalLM):
        self.ema, self.student = ema, student

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.ema.update(self.student)


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint; removes those that a kill left incomplete.

    `Trainer` writes its state last, so that a checkpoint with a readable state is complete.
    """
    with PartialState().main_process_first():
        for path in sorted(directory.glob("checkpoint-*"), key=checkpoint_step, reverse=True):
            try:
                state = json.loads((path / "trainer_state.json").read_text())
                if state["global_step"] == checkpoint_step(path):
                    return path
            except (OSError, ValueError, KeyError):
                pass
            shutil.rmtree(path, ignore_errors=True)
    return None


def checkpoint_step(path: Path) -> int:
    suffix = path.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1
