"""The processes that train together."""

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState

from subquad.config import Recipe
from subquad.modeling.placement import find_device
from subquad.utils import UserError

PARALLEL = ("ddp", "fsdp", "layers", "layers+fsdp")
"""What they share; see `subquad.distill.pipeline.distill`."""


def start_processes(recipe: Recipe, parallel: str) -> None:
    """Joins the processes that train together, each with the device of the recipe, before anything is put on it.

    Raises:
        UserError: FSDP of accelerate, which this does not use; an unknown `parallel`, or one of several processes in
            one process.
    """
    if parallel not in PARALLEL:
        raise UserError(f"parallel: got {parallel!r}, expected one of {', '.join(PARALLEL)}")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise UserError("accelerate: got --use_fsdp, expected processes without it and --parallel fsdp")
    PartialState(cpu=find_device(recipe.device).type == "cpu")
    if parallel != "ddp" and not torch.distributed.is_initialized():
        raise UserError(f"parallel: got {parallel} in one process, expected several (torchrun --nproc_per_node N)")


def on_first_process(action: Callable[..., object], *args: Any) -> None:
    """Calls `action(*args)` in the first of the processes that train together; the others wait until it is done."""
    state = PartialState()
    with state.main_process_first():
        if state.is_main_process:
            action(*args)
