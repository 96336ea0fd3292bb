"""Metrics of training: the progress bar, `metrics.jsonl`, TensorBoard and the loss curves."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from subquad.utils import UserError, write_text_atomic

logger = logging.getLogger(__name__)


class MetricsCallback(TrainerCallback):
    """Shows a progress bar with the loss and hands every logged step to `report`, in the first process only."""

    def __init__(self, tokens_per_step: int, report: Callable[[dict[str, Any]], None], label: str):
        self.tokens_per_step, self.report, self.label = tokens_per_step, report, label
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.start, self.first_step = time.perf_counter(), state.global_step
        self.bar = tqdm(
            total=state.max_steps * self.tokens_per_step,
            initial=state.global_step * self.tokens_per_step,
            desc=self.label,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            leave=False,
            disable=None if state.is_world_process_zero else True,  # None: only on a terminal
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        assert self.bar is not None
        self.bar.update(self.tokens_per_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs: Any):
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        tokens = (state.global_step - self.first_step) * self.tokens_per_step
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)
        self._report(
            state,
            loss=logs["loss"],
            grad_norm=logs.get("grad_norm"),
            lr=logs.get("learning_rate"),
            tokens_per_second=round(tokens / (time.perf_counter() - self.start), 1),
        )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics=None, **kwargs: Any
    ):
        if metrics and state.is_world_process_zero:
            self._report(state, validation_loss=metrics["eval_loss"], validation_ce=metrics["eval_ce"])

    def _report(self, state: TrainerState, **values: Any) -> None:
        tokens = state.global_step * self.tokens_per_step
        seconds = round(time.perf_counter() - self.start, 2)
        self.report({"step": state.global_step, "tokens": tokens, "seconds": seconds, **values})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.bar is not None:
            self.bar.close()


def tensorboard(directory: Path) -> TrainerCallback:
    """Writes TensorBoard curves to `directory`; the Trainer's own would be deleted with the checkpoints.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "report_to: tensorboard is not installed; pip install tensorboard, or change report_to"
        ) from None
    return TensorBoardCallback(SummaryWriter(str(directory)))


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none if it does not exist. A last line that a kill cut off is skipped."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def draw_curves(metrics: Sequence[dict[str, Any]], target: Path, title: str) -> None:
    """Draws training and validation loss against tokens as SVG, a panel for each stage; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        logger.info('%s is not drawn: matplotlib is missing; pip install "subquad[report]"', target.name)
        return
    stages = list(dict.fromkeys(record["stage"] for record in metrics))
    if not stages:
        return
    figure = Figure(figsize=(1 + 3.6 * len(stages), 3.2), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o--")):
            points = [
                (record["tokens"], record[key]) for record in metrics if record["stage"] == stage and key in record
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=3)
        axes.set(title=stage, xlabel="tokens", ylabel="loss")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(target, format="svg", metadata={"Date": None})
