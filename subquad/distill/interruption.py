"""Interrupts of training: after SIGINT or SIGTERM the current step ends and a checkpoint is saved.

A second signal stops at once, without a checkpoint; within `REPEAT_SECONDS` it is the same request, sent twice. In
several processes all stop after the same step, as soon as one of them has been asked to.
"""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_SECONDS = 2.0
"""Slurm signals every process of a job, and torchrun passes on to its processes the signal that it gets itself."""


class Interruption(KeyboardInterrupt):
    """A stage was interrupted, and a checkpoint saved. exit_code: of the command, 128 and the signal's number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class StopRequest(TrainerCallback):
    """Saves a checkpoint and ends training after the step in which a signal arrives."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that this process got."""
        self.signal: int | None = None
        """The signal that any process got, as far as this one knows."""
        self.ignored_until = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() >= self.ignored_until:
                raise KeyboardInterrupt
            return
        self.received = self.signal = number
        self.ignored_until = time.monotonic() + REPEAT_SECONDS
        name = signal.Signals(number).name
        logger.warning("%s: a checkpoint is saved after this step; a second signal stops at once", name)

    def agreed(self) -> bool:
        """Whether any process got a signal; all processes call it together."""
        state = PartialState()
        if state.num_processes > 1:
            number = torch.tensor(self.signal or 0, device=state.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.signal = int(number) or self.signal  # one may have come since
        return self.signal is not None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.agreed():
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside this context the signals are handled; then it raises `Interruption` if one came. Nothing is changed
        outside of the main thread, and for signals that the process ignores."""
        main = threading.current_thread() is threading.main_thread()
        handled = [s for s in SIGNALS if main and signal.getsignal(s) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signal is not None:
            raise Interruption(self.signal)
