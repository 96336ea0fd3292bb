"""Losses and gradients that are not finite, on a device that the host does not wait for in every step.

A norm of the gradient that is not finite prevents the update on the device, by the optimizer's `found_inf` (that of
gradient scalers), and so it does in all later steps. The host reads it where it waits for the device anyway. The
weights are then those before the first such step, which can be computed again to find the cause.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.distill.objective import Batch


class Step(NamedTuple):
    """What a step of training is computed from besides the weights, and whether it has updated them.

    number: steps before it. loss_weights: one for each of the micro-batches. prevented: 1 without an update, else 0.
    """

    number: int
    batches: list[Batch]
    loss_weights: list[Tensor]
    prevented: Tensor


class LateChecks:
    """The steps since the last call of `first_without_update`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, list[Step]()

    def begin_step(self, number: int, batches: list[Batch], loss_weights: list[Tensor]) -> None:
        """number: steps before it."""
        prevented = self.steps[-1].prevented if self.steps else torch.zeros((), device=loss_weights[0].device)
        self.steps.append(Step(number, list(batches), list(loss_weights), prevented))

    def end_step(self, norm: Tensor) -> None:
        """Prevents the update if the gradient's norm is not finite, or if an earlier update was prevented."""
        prevented = self.steps[-1].prevented.maximum((~norm.isfinite()).float())
        self.steps[-1] = self.steps[-1]._replace(prevented=prevented)
        self.optimizer.found_inf = prevented  # type: ignore[attr-defined]

    def first_without_update(self) -> Step | None:
        """The first step whose update was prevented, if there is one. Waits for the device."""
        steps, self.steps = self.steps, []
        prevented = torch.stack([step.prevented for step in steps]).tolist() if steps else []
        return steps[prevented.index(1.0)] if 1.0 in prevented else None
