"""Scheduled dropout of windows: some steps of a stage train without them, so that memories must serve.

It follows the idea of scheduled sliding-window dropout (arXiv 2510.05901): attention to the window is suppressed at
random during training, less and less often. Another form, steps with a window of one token, taught wrong shares.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.near_far import NearFarLayer


def drops_windows(schedule: Sequence[float], seed: int, stage: str, step: int, steps: int) -> bool:
    """Whether step `step` (from 0) of the `steps` of a stage trains without windows. It depends on the arguments alone:
    it is the same in all processes and after an interruption.

    schedule: the probabilities of the first and of the last step; linear in between.
    """
    first, last = schedule
    probability = first + (last - first) * step / max(1, steps - 1)
    return random.Random(f"{seed} {stage} {step}").random() < probability


@contextmanager
def dropped_windows(student: SubquadForCausalLM) -> Iterator[None]:
    """Inside this context the outputs of layers with near and far are those of their memories alone, where a token has
    left the window."""
    merges = [layer.merge for layer in student.mixer_layers if isinstance(layer, NearFarLayer)]
    try:
        for merge in merges:
            merge.far_only = True
        yield
    finally:
        for merge in merges:
            merge.far_only = False
