"""Training of one stage on `transformers.Trainer`: batches, learning rates, checkpoints, precision, validation."""

import contextlib
import copy
import functools
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from subquad.config import Recipe, Stage
from subquad.data.packing import IGNORE_INDEX, next_labels
from subquad.distill.interruption import StopRequest
from subquad.distill.layer_parallel import LayerParallel
from subquad.distill.layerwise import LayerwiseDistillation
from subquad.distill.logging_callbacks import MetricsCallback, tensorboard
from subquad.distill.objective import Batch, Objective
from subquad.distill.param_groups import add_lora, keep_average, load_average, parameter_groups
from subquad.distill.recipe_stages import total_steps
from subquad.distill.sharding import gather_weights, own_part, scatter_weights, shard, use_whole_states
from subquad.distill.untied_head import UntiedHead
from subquad.distill.window_dropout import dropped_windows, drops_windows
from subquad.modeling.attention.activations import LayerActivations, capture_activations
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.placement import find_device
from subquad.utils import UserError

logger = logging.getLogger(__name__)
LR_SCHEDULERS = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
"""The names of `transformers` that differ from those in recipes."""


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
        super().__init__(student, args, train_dataset=train, eval_dataset=validation, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # `compute_loss` weights the micro-batches itself
        if self.stage.gradient_checkpointing:  # these methods have other names in newer releases of `transformers`
            enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.loss_weights: list[float] = []
        self.clip_gradients = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self.clip_grad_norm_
        if self.layer_parallel is not None:
            self.clip_gradients = self.layer_parallel.clip_grad_norm_
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
        stop = StopRequest()
        self.add_callback(stop)
        with stop.listening():
            self.train(resume_from_checkpoint=checkpoint)
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
        self.student.requires_grad_(True)
        self.student.zero_grad()

    # ------------------------------------------------------------------ the loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], None]:  # type: ignore[override]
        """The micro-batches of a step, as the objective reads them; also sets the weight of each in the step's mean."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        with self.autocast():
            samples = [self.objective.training_batch(batch) for batch in samples]
        counts = torch.stack([self.objective.count_tokens(batch) for batch in samples]).float()
        total = self.accelerator.reduce(counts.sum().to(self.args.device), "sum").cpu()
        self.loss_weights = (counts * len(samples) * self.accelerator.num_processes / total.clamp_min(1)).tolist()
        return samples, None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward pass of a micro-batch, without windows in the steps that `window_dropout` chooses."""
        schedule, state = getattr(self.stage, "window_dropout", None), self.state
        if schedule is None or not drops_windows(
            schedule, self.recipe.seed, self.objective.name, state.global_step, state.max_steps
        ):
            return super().training_step(*args, **kwargs)
        with dropped_windows(self.trained):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        return self.objective_loss(model, inputs) * self.loss_weights.pop(0)

    def objective_loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        with self.autocast():
            targets = self.objective.forward_kwargs(batch)
            if self.layer_parallel is not None:
                batches = self.layer_parallel.gather_batch(batch)
                targets["of_processes"] = [self.objective.forward_kwargs(of_process) for of_process in batches]
            outputs = model(objective=self.objective, **targets)
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

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The stage's loss on a validation batch; also sums the student's cross-entropy."""
        batch = self._prepare_inputs(inputs)
        labels, count = batch.get("labels", batch["input_ids"]), (next_labels(batch) != IGNORE_INDEX).sum()
        with torch.no_grad(), self.autocast():
            loss = self.objective_loss(model, self.objective.training_batch(batch))
            positions = batch.get("position_ids")
            ce = model(input_ids=batch["input_ids"], position_ids=positions, labels=labels, use_cache=False).loss
        self.validation_ce += torch.stack([ce.double() * count if count else count.double(), count.double()]).cpu()
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        if self.layer_parallel is not None:
            self.layer_parallel.broadcast_weights()
        # the sum over tokens in nats, and the number of tokens
        self.validation_ce = torch.zeros(2, dtype=torch.float64)
        out = super().evaluation_loop(*args, **kwargs)
        total, count = self.accelerator.reduce(self.validation_ce.to(self.args.device), "sum")
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
        super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if (self.fsdp or self.layer_parallel) and not self.args.should_save:
            self.create_optimizer().state_dict()  # all processes take part
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.fsdp:
            scatter_weights(self.student, self.trained)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def clip_grad_norm_(self, *args: Any, **kwargs: Any) -> Any:
        """Accelerate's; raises UserError for a norm that is not finite, which would make all weights so."""
        norm = self.clip_gradients(*args, **kwargs)
        if norm is not None and not math.isfinite(float(norm)):
            grads = {n: p.grad for n, p in self.trained.named_parameters() if p.grad is not None}
            bad = [n for n, grad in grads.items() if not own_part(grad).isfinite().all()]
            origin = ", ".join(bad[:3]) or "weights of another process"
            raise self.non_finite_error(f"the gradient is not finite, in {origin}")
        return norm


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


def training_arguments(recipe: Recipe, stage: Stage, directory: Path, run_name: str) -> TrainingArguments:
    steps, processes = total_steps(stage, recipe.data.seq_len), PartialState().num_processes
    rows, micro_batch = rows_per_process(stage, processes)
    eval_steps = recipe.evaluation.eval_steps
    cuda = find_device(recipe.device).type == "cuda"
    wsd = {"num_decay_steps": math.ceil(stage.decay * steps), "decay_type": "linear"}
    arguments = TrainingArguments(
        output_dir=str(directory),
        run_name=run_name,
        report_to="none" if recipe.report_to == "tensorboard" else recipe.report_to,
        disable_tqdm=True,
        logging_steps=max(1, min(10, steps // 20)),
        logging_nan_inf_filter=False,
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        learning_rate=stage.lr,
        lr_scheduler_type=LR_SCHEDULERS.get(stage.lr_scheduler, stage.lr_scheduler),
        lr_scheduler_kwargs=wsd if stage.lr_scheduler == "wsd" else {},
        warmup_steps=math.ceil(stage.warmup * steps),
        max_grad_norm=stage.max_grad_norm,
        eval_strategy="no" if eval_steps is None else "steps",
        eval_steps=eval_steps,
        prediction_loss_only=True,
        save_steps=recipe.checkpoint.save_steps,
        save_total_limit=recipe.checkpoint.save_total_limit,
        load_best_model_at_end=recipe.evaluation.load_best_model_at_end,
        remove_unused_columns=False,
        seed=recipe.seed,
        use_cpu=not cuda,
        ddp_backend="gloo" if processes > 1 and not cuda else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # more would make Trainer split batches by DataParallel
    return arguments


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


def newest_checkpoint(directory: Path) -> str | None:
    """The newest complete checkpoint; removes those that a kill left incomplete.

    `Trainer` writes its state last, so that a checkpoint with a readable state is complete.
    """
    with PartialState().main_process_first():
        while directory.is_dir() and (path := get_last_checkpoint(directory)) is not None:
            try:
                json.loads(Path(path, "trainer_state.json").read_text())
                return path
            except (OSError, ValueError):
                shutil.rmtree(path)
    return None
