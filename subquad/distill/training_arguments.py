"""The arguments of `transformers.Trainer` for a stage."""

import math
from pathlib import Path

from accelerate import PartialState
from transformers import TrainingArguments

from subquad.config import Recipe, Stage
from subquad.distill.recipe_stages import total_steps
from subquad.modeling.placement import find_device
from subquad.utils import UserError

LR_SCHEDULERS = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
"""The names of `transformers` that differ from those in recipes."""


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
        accelerator_config={"non_blocking": cuda},
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
