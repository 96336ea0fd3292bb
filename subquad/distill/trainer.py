"""One stage of distillation on `transformers.Trainer`: parameter groups, schedule, checkpoints, metrics, progress.

Knows how a stage is run and resumed; what it learns is the objective's business (`stages.py`), which stages there are
the pipeline's.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subquad.config import Checkpoint, Stage
from subquad.distill.stages import Objective
from subquad.modeling.hub import SubquadForCausalLM

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class StageTrainer(Trainer):
    """`transformers.Trainer` whose loss is an objective's and whose rows come in the order of the data set."""

    def __init__(self, objective: Objective, stage: Stage, student: SubquadForCausalLM, **kwargs: Any):
        super().__init__(model=student, **kwargs)
        self.objective: Objective = objective
        self.stage: Stage = stage
        self.student: SubquadForCausalLM = student

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        targets = self.objective.targets(inputs["input_ids"])
        outputs = model(input_ids=inputs["input_ids"], objective=self.objective, **targets)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.student, self.objective, self.stage)
            self.optimizer = torch.optim.AdamW(groups, lr=self.stage.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
        return self.optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def parameter_groups(student: SubquadForCausalLM, objective: Objective, stage: Stage) -> list[dict[str, Any]]:
    """What learns in a stage, in groups of one rate and one weight decay (none on vectors: biases, norms, gates)."""
    trained = {id(p) for p in objective.trained(student)}
    copied = {id(p) for block in student.blocks for p in block.copied_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in trained)
        if not parameter.requires_grad:
            continue
        rate = stage.copied_lr if stage.copied_lr is not None and id(parameter) in copied else stage.lr
        groups.setdefault((rate, stage.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]


def total_steps(stage: Stage, context: int) -> int:
    return math.ceil(stage.tokens / (stage.batch_size * context))


def run_stage(
    student: SubquadForCausalLM,
    objective: Objective,
    stage: Stage,
    rows: Dataset,
    context: int,
    directory: Path,
    checkpoint: Checkpoint,
    seed: int,
    report: Callable[[dict[str, Any]], None],
    label: str,
) -> None:
    """Trains `student` in place, continuing from the newest whole checkpoint in `directory`.

    rows: data set of `{"input_ids": [context]}`, exactly as many as the stage's steps consume, in their order.
    report: is called with a mapping (stage, step, tokens, loss, lr, tokens_per_second) at every logged step.
    """
    steps = total_steps(stage, context)
    last = newest_checkpoint(directory)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.lr,
        lr_scheduler_type=SCHEDULES[stage.schedule],
        warmup_steps=math.ceil(stage.warmup * steps),
        max_grad_norm=stage.max_grad_norm,
        save_strategy="steps",
        save_steps=checkpoint.every,
        save_total_limit=max(2, checkpoint.keep),
        logging_strategy="steps",
        logging_steps=max(1, min(10, steps // 20)),
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = StageTrainer(
        objective,
        stage,
        student,
        args=arguments,
        train_dataset=rows,
        callbacks=[Progress(stage.batch_size * context, report, label)],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    for parameter in student.parameters():
        parameter.requires_grad_(True)


class Progress(TrainerCallback):
    """A bar with loss, tokens per second and time left, and the same as metrics."""

    def __init__(self, tokens_per_step: int, report: Callable[[dict[str, Any]], None], label: str):
        self.tokens_per_step, self.report, self.label = tokens_per_step, report, label
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        total = state.max_steps * self.tokens_per_step
        self.start, self.first = time.perf_counter(), state.global_step
        self.bar = tqdm(
            total=total,
            initial=state.global_step * self.tokens_per_step,
            desc=self.label,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            leave=False,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        assert self.bar is not None
        self.bar.update(state.global_step * self.tokens_per_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs: Any):
        if not logs or "loss" not in logs:
            return
        done = (state.global_step - self.first) * self.tokens_per_step
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)
        self.report(
            {
                "stage": self.label,
                "step": state.global_step,
                "tokens": state.global_step * self.tokens_per_step,
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                "lr": logs.get("learning_rate"),
                "tokens_per_second": round(done / (time.perf_counter() - self.start), 1),
            }
        )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.bar is not None:
            self.bar.close()


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end; those cut off by a kill are removed.

    `Trainer` writes its state last: a checkpoint is whole where that can be read.
    """
    for path in sorted(directory.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            state = json.loads((path / "trainer_state.json").read_text())
            if state["global_step"] == _step(path):
                return path
        except (OSError, ValueError, KeyError):
            pass
        shutil.rmtree(path)
    return None


def _step(path: Path) -> int:
    suffix = path.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
