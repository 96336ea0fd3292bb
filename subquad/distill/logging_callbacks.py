"""Metrics of training: the progress bar, `metrics.jsonl`, TensorBoard and the loss curves."""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from subquad import progress
from subquad.threads import ThreadWatch
from subquad.utils import UserError, install_command, saving, write_text_atomic

logger = logging.getLogger(__name__)


class MetricsCallback(TrainerCallback):
    """Shows a progress bar with the loss and appends every logged step to the run's `metrics.jsonl`, in the first
    process only."""

    def __init__(self, run_directory: Path, stage: str, tokens_per_step: int):
        self.path, self.stage, self.tokens_per_step = run_directory / "metrics.jsonl", stage, tokens_per_step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.start, self.first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            # those after the checkpoint at which an interrupted stage resumes
            records = [r for r in read_jsonl(self.path) if r["stage"] != self.stage or r["step"] <= state.global_step]
            write_text_atomic(self.path, "".join(json.dumps(record) + "\n" for record in records))
        total = state.max_steps * self.tokens_per_step
        if state.is_world_process_zero:
            progress.announce("%s: stage %s, %s tokens", self.path.parent.name, self.stage, f"{total:,}")
        # beside a GPU the threads wait for it
        self.watch = ThreadWatch(torch.get_num_threads()) if args.device.type == "cpu" else None
        self.bar = progress.bar(
            total,
            f"{self.path.parent.name} {self.stage}",
            "tok",
            initial=state.global_step * self.tokens_per_step,
            hide=not state.is_world_process_zero,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.bar.update(self.tokens_per_step)
        if self.watch is not None:
            self.watch.look(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.bar.close()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs: Any):
        if not logs or "loss" not in logs:
            return
        self.bar.set_postfix_str(f"loss {logs['loss']:.4g}", refresh=False)
        tokens = (state.global_step - self.first_step) * self.tokens_per_step
        speed = round(tokens / (time.perf_counter() - self.start), 1)
        norm, rate = logs.get("grad_norm"), logs.get("learning_rate")
        self.report(state, loss=logs["loss"], grad_norm=norm, lr=rate, tokens_per_second=speed)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics=None, **kwargs: Any
    ):
        if metrics:
            self.report(state, validation_loss=metrics["eval_loss"], validation_ce=metrics["eval_ce"])

    def report(self, state: TrainerState, **values: Any) -> None:
        if not state.is_world_process_zero:
            return
        tokens, seconds = state.global_step * self.tokens_per_step, round(time.perf_counter() - self.start, 2)
        record = {"stage": self.stage, "step": state.global_step, "tokens": tokens, "seconds": seconds, **values}
        with saving(self.path, "a step", remove=False), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def tensorboard(directory: Path) -> TrainerCallback:
    """Writes TensorBoard curves to `directory`; the Trainer's own would be deleted with the checkpoints.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        problem = "report_to: tensorboard is not installed; pip install tensorboard, or change report_to"
        raise UserError(problem) from None
    return TensorBoardCallback(SummaryWriter(str(directory)))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none if it does not exist. A last line that a kill cut off is skipped."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def draw_curves(metrics: Sequence[dict[str, Any]], target: Path, title: str) -> None:
    """Draws training and validation loss against tokens as SVG, a panel for each stage; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        logger.info("%s is not drawn: matplotlib is missing; %s", target.name, install_command("report"))
        return
    stages: dict[str, list[dict[str, Any]]] = {}
    for record in metrics:
        stages.setdefault(record["stage"], []).append(record)
    if not stages:
        return
    figure = Figure(figsize=(1 + 3.6 * len(stages), 3.2), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, (stage, records) in zip(panels, stages.items(), strict=True):
        for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o--")):
            points = [(record["tokens"], record[key]) for record in records if key in record]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=3)
        axes.set(title=stage, xlabel="tokens", ylabel="loss")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(target, format="svg", metadata={"Date": None})
