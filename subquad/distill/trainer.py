"""Training of one stage on `transformers.Trainer`: batches, learning rates, checkpoints, precision, validation."""

import contextlib
import copy
import functools
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from subquad.config import Recipe, Stage
from subquad.data import StreamedRows
from subquad.data.packing import IGNORE_INDEX, next_labels
from subquad.data.streaming import State
from subquad.distill.checkpoints import newest_checkpoint, seal
from subquad.distill.interruption import StopRequest
from subquad.distill.late_checks import LateChecks
from subquad.distill.layer_parallel import LayerParallel
from subquad.distill.layerwise import LayerwiseDistillation
from subquad.distill.logging_callbacks import MetricsCallback, tensorboard
from subquad.distill.objective import Batch, Objective, collate
from subquad.distill.param_groups import add_lora, keep_average, load_average, parameter_groups
from subquad.distill.sharding import gather_weights, own_part, scatter_weights, shard, use_whole_states
from subquad.distill.training_arguments import training_arguments
from subquad.distill.untied_head import UntiedHead
from subquad.distill.window_dropout import dropped_windows, drops_windows
from subquad.modeling.attention.activations import LayerActivations, capture_activations
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError, is_out_of_memory, saving, write_json_atomic

logger = logging.getLogger(__name__)
STREAM = "stream.json"
"""Of a checkpoint: the positions of all processes in streamed text."""


class StageTrainer(Trainer):
    """A `transformers.Trainer` whose loss is that of an objective and whose rows come in the order of the dataset.

    A loss is a mean over the tokens that are not ignored. The Trainer averages over the micro-batches of a step. Where
    they differ in these tokens (padding, conversations), each is weighted by its number of tokens, over all processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective,
        student: SubquadForCausalLM,
        train: Dataset,
        validation: Dataset,
        run_directory: Path,
        parallel: str = "ddp",
    ):
        """train: as many rows as the stage consumes, in order. parallel: as of `distill`."""
        self.recipe, self.student = recipe, student
        self.trained = student
        """The student, or its sharded copy from `create_optimizer` on. The student's own weights are then those of the
        last checkpoint, until the stage ends."""
        self.objective: Objective = objective
        self.stage: Stage = getattr(recipe.stages, objective.name)
        self.directory = run_directory / "checkpoints" / objective.name
        self.lora = None if self.stage.lora is None else add_lora(student, self.stage.lora, recipe.seed)
        self.untied = UntiedHead(student) if getattr(self.stage, "untie_head", False) else None
        self.groups = parameter_groups(student, objective.trained_parameters(student), self.stage)
        self.layer_parallel: LayerParallel | None = None
        if parallel.startswith("layers") and isinstance(objective, LayerwiseDistillation):
            self.layer_parallel = objective.layer_parallel = LayerParallel(objective.layer_parameters(student))
        self.fsdp = parallel.endswith("fsdp") and self.layer_parallel is None
        callbacks: list[TrainerCallback] = [
            MetricsCallback(run_directory, objective.name, self.stage.batch_size * recipe.data.seq_len)
        ]
        if recipe.report_to == "tensorboard" and PartialState().is_main_process:
            callbacks.append(tensorboard(run_directory / "tensorboard" / objective.name))
        args = training_arguments(recipe, self.stage, self.directory, f"{run_directory.name} {objective.name}")
        use_cache = student.config.use_cache
        super().__init__(
            student, args, data_collator=collate, train_dataset=train, eval_dataset=validation, callbacks=callbacks
        )
        student.config.use_cache = use_cache  # which Trainer sets to false, also in what it saves
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # `compute_loss` weights the micro-batches itself
        if self.stage.gradient_checkpointing:  # these methods have other names in newer releases of `transformers`
            enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.loss_weights: list[torch.Tensor] = []
        self.late_checks: LateChecks | None = None
        self.accelerator.clip_grad_norm_ = self.clip_grad_norm_
        if self.layer_parallel is not None:
            # without a wrapper that averages gradients
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def train_stage(self) -> None:
        """Trains the student in place, from the newest complete checkpoint of the stage if there is one.

        Raises:
            Interruption: SIGINT or SIGTERM came; a checkpoint of the last step is saved.
        """
        checkpoint = newest_checkpoint(self.directory)
        if checkpoint is not None:
            logger.info("resuming from %s", checkpoint)
            if isinstance(self.train_dataset, StreamedRows):
                self.train_dataset.stream.load_state(json.loads(Path(checkpoint, STREAM).read_text()))
        stop = StopRequest()
        self.add_callback(stop)
        with stop.listening():
            self.train(resume_from_checkpoint=checkpoint)
            self.check_steps()
        if self.stage.ema_decay is not None:
            load_average(self.create_optimizer())
        self.update_student()
        if self.fsdp:
            self.trained = self.model_wrapped = self.student.to(self.args.device)  # type: ignore[arg-type]
        if self.untied is not None:
            self.untied.tie()
        if self.lora is not None:
            self.lora.merge_and_unload()
        if self.stage.gradient_checkpointing:
            getattr(self.student, "activation_checkpointing_disable", self.student.gradient_checkpointing_disable)()
            self.student.disable_input_require_grads()  # without it the hooks of every stage would add up
        self.student.requires_grad_(True)
        self.student.zero_grad()

    # ------------------------------------------------------------------ the loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], None]:  # type: ignore[override]
        """The micro-batches of a step, as the objective reads them; also sets the weight of each in the step's mean."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        with self.autocast():
            samples = [self.objective.training_batch(batch) for batch in samples]
        counts = torch.stack([self.objective.count_tokens(batch) for batch in samples]).float().to(self.args.device)
        total = self.accelerator.reduce(counts.sum(), "sum").clamp_min(1)
        self.loss_weights = list((counts * len(samples) * self.accelerator.num_processes / total).unbind())
        if self.late_checks is not None:
            self.late_checks.begin_step(self.state.global_step, samples, self.loss_weights)
        return samples, None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward pass of a micro-batch, without windows in the steps that `window_dropout` chooses."""
        schedule, state = getattr(self.stage, "window_dropout", None), self.state
        drops = schedule is not None and drops_windows(
            schedule, self.recipe.seed, self.objective.name, state.global_step, state.max_steps
        )
        try:
            with dropped_windows(self.trained) if drops else contextlib.nullcontext():
                return super().training_step(*args, **kwargs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self.memory_error() from error

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        return self.objective_loss(model, inputs) * self.loss_weights.pop(0)

    def objective_loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        with self.autocast():
            targets = self.objective.forward_kwargs(batch)
            if self.layer_parallel is not None:
                batches = self.layer_parallel.gather_batch(batch)
                targets["of_processes"] = [self.objective.forward_kwargs(of_process) for of_process in batches]
            outputs = model(objective=self.objective, **targets)
        if self.late_checks is not None and torch.is_grad_enabled():
            # to wait for the value would leave the device without work: makes the gradient NaN, see `LateChecks`
            return outputs.loss * torch.where(outputs.loss.isfinite(), 1.0, torch.nan)
        if not torch.isfinite(outputs.loss):
            if outputs.layer_losses is not None:
                bad = (~outputs.layer_losses.isfinite()).nonzero().flatten().tolist()
            else:
                # the other processes would have to run a sharded student too
                given = targets["input_ids"], targets.get("positions")
                bad = [] if self.fsdp else non_finite_layers(self.student, *given)
            origin = f"layer {bad[0]}" if bad else "the head or the loss itself"
            raise self.non_finite_error(f"the loss is not finite, starting at {origin}")
        return outputs.loss

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def non_finite_error(self, problem: str) -> UserError:
        return UserError(
            f"stage {self.objective.name}, step {self.state.global_step + 1}: {problem}; lower lr or raise warmup (the "
            f"last checkpoint is in {self.directory})"
        )

    def memory_error(self) -> UserError:
        rows, name = self.args.per_device_train_batch_size, self.objective.name
        if rows > 1:
            hint = f"lower stages.{name}.micro_batch_size to {rows // 2}, which leaves the steps the same"
        elif name == "matrix":
            hint = f"lower stages.{name}.row_chunk_size to {self.stage.row_chunk_size // 2}"  # type: ignore[attr-defined]
        elif name == "end_to_end" and not self.stage.gradient_checkpointing:
            hint = f"set stages.{name}.gradient_checkpointing to true"
        else:
            hint = f"lower data.seq_len to {self.recipe.data.seq_len // 2}"
        return UserError(
            f"stage {name}, step {self.state.global_step + 1}: out of memory with {rows} rows of "
            f"{self.recipe.data.seq_len} tokens in a process; {hint}"
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The stage's loss on a validation batch; also sums the student's cross-entropy."""
        batch = self._prepare_inputs(inputs)
        labels, count = batch.get("labels", batch["input_ids"]), (next_labels(batch) != IGNORE_INDEX).sum()
        with torch.no_grad(), self.autocast():
            loss = self.objective_loss(model, self.objective.training_batch(batch))
            positions = batch.get("position_ids")
            ce = model(input_ids=batch["input_ids"], position_ids=positions, labels=labels, use_cache=False).loss
        self.validation_ce += torch.stack([torch.where(count > 0, ce.double() * count, 0.0), count.double()])
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        if self.layer_parallel is not None:
            self.layer_parallel.broadcast_weights()
        # the sum over tokens in nats, and the number of tokens
        self.validation_ce = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        out = super().evaluation_loop(*args, **kwargs)
        total, count = self.accelerator.reduce(self.validation_ce, "sum")
        return out._replace(metrics={**(out.metrics or {}), "eval_ce": float(total / count)})

    # ------------------------------------------------------------------ optimizer and order of rows

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            if self.fsdp:
                self.shard_student()
            self.optimizer = torch.optim.AdamW(self.groups, self.stage.lr, betas=(0.9, 0.95), fused=True)
            if self.stage.ema_decay is not None:
                keep_average(self.optimizer, self.stage.ema_decay)
            if self.fsdp:
                use_whole_states(self.optimizer)
            elif self.layer_parallel is not None:
                self.layer_parallel.use_whole_states(self.optimizer)
            elif self.args.device.type != "cpu":
                self.late_checks = LateChecks(self.optimizer)
        return self.optimizer

    def shard_student(self) -> None:
        """From now on a sharded copy of the student is trained. `Trainer` takes it for a wrapper of the student."""
        self.objective.before_sharding(self.student)
        self.trained = self.model_wrapped = copy.deepcopy(self.student.cpu())
        shard(self.trained, self.args.device)
        self.groups = parameter_groups(self.trained, self.objective.trained_parameters(self.trained), self.stage)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return super()._wrap_model(self.trained if self.fsdp else model, *args, **kwargs)

    def update_student(self) -> None:
        """Gives the student of each process all weights that were trained."""
        if self.fsdp:
            gather_weights(self.trained, self.student)
        elif self.layer_parallel is not None:
            self.layer_parallel.broadcast_weights()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.update_student()
        directory = self.directory / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with saving(directory, "a checkpoint"):
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()  # each process saves the state of its random numbers
            if self.args.should_save:
                seal(directory)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if (self.fsdp or self.layer_parallel) and not self.args.should_save:
            self.create_optimizer().state_dict()  # all processes take part
        super()._save_optimizer_and_scheduler(output_dir)
        states = stream_states(self.train_dataset, self.state.global_step * self.stage.batch_size)
        if states and self.args.should_save:
            write_json_atomic(Path(output_dir, STREAM), states)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.fsdp:
            scatter_weights(self.student, self.trained)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
        """As in `torch`; raises UserError for a norm that is not finite, which would make all weights so. On a device
        that is not waited for, it prevents the update instead."""
        parameters = [p for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norm = norm if self.layer_parallel is None else self.layer_parallel.over_all_layers(norm)
        if self.late_checks is not None:
            self.late_checks.end_step(norm)
        elif not math.isfinite(float(norm)):
            grads = {n: p.grad for n, p in self.trained.named_parameters() if p.grad is not None}
            bad = [n for n, grad in grads.items() if not own_part(grad).isfinite().all()]
            origin = ", ".join(bad[:3]) or "weights of another process"
            raise self.non_finite_error(f"the gradient is not finite, in {origin}")
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.check_steps()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def check_steps(self) -> None:
        """Raises UserError if a loss or gradient was not finite since the last call, as the step itself would have
        raised it: the step is computed again, with checks, from the weights that it had."""
        step = None if self.late_checks is None else self.late_checks.first_without_update()
        if step is None:
            return
        self.late_checks, self.state.global_step, self.loss_weights = None, step.number, step.loss_weights
        for batch in step.batches:
            self.training_step(self.model_wrapped, batch)
        self.clip_grad_norm_(self.model_wrapped.parameters(), self.args.max_grad_norm)
        raise self.non_finite_error("the loss or its gradient was not finite, but is when it is computed again")


def non_finite_layers(
    student: SubquadForCausalLM, input_ids: torch.Tensor, positions: torch.Tensor | None
) -> list[int]:
    """The layers whose mixer or attention has an output that is not finite."""
    bad: list[int] = []

    def check(index: int, activations: LayerActivations) -> None:
        if not activations.output.isfinite().all():
            bad.append(index)

    with torch.no_grad(), capture_activations([(layer, None) for layer in student.mixer_layers], check):
        student.base_model(input_ids=input_ids, position_ids=positions, use_cache=False)
    return bad


def stream_states(train: Any, done: int) -> list[State]:
    """Where each process is in streamed text after `done` rows of a stage; none if the text is not streamed."""
    return gather_object([train.state(done)]) if isinstance(train, StreamedRows) else []
