"""Times a step of stage 1 or 2 in a layout, and counts what a process holds for it.

    python -m benchmarks.parallel [--teacher nano] [--stage hidden] [--batch 4] [--context 512]
    torchrun --nproc_per_node 2 -m benchmarks.parallel --parallel layers [the same]

Prints milliseconds per step, and milliseconds of processor time per step, which other jobs on the machine change less:
medians of all but the first two steps, of the process that takes longest. And, of the first process, the bytes of the
optimizer's states and the largest resident memory. Every process has one thread.
"""

import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

import subquad
from benchmarks.common import Parser, run_as_script
from benchmarks.distill import StepTimer, make_trainer
from subquad.distill.processes import PARALLEL
from subquad.distill.sharding import own_part


class ProcessorTimer(StepTimer):
    """Also records the processor time of this process when steps begin."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_step_begin(*args, **kwargs)
        self.processor.append(time.process_time())

    def milliseconds(self) -> list[float]:
        """Per step: wall time and processor time."""
        return [
            1000 * statistics.median(b - a for a, b in itertools.pairwise(times[2:]))
            for times in (self.starts, self.processor)
        ]


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(own_part(x).nbytes for state in optimizer.state.values() for x in state.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("parallel", __doc__)
    parser.add_argument("--teacher", default="nano")
    parser.add_argument("--mixer", default="gla")
    parser.add_argument("--stage", choices=["matrix", "hidden"], default="hidden")
    parser.add_argument("--parallel", choices=PARALLEL, default="ddp")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch, over all processes")
    parser.add_argument("--context", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    state, timer = PartialState(cpu=not torch.cuda.is_available()), ProcessorTimer()
    teacher, _ = subquad.load_teacher(args.teacher)
    teacher.requires_grad_(False)
    student = subquad.linearize(teacher, args.mixer)
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(args.stage, teacher, student, args, Path(directory), args.parallel)
        trainer.add_callback(timer)
        trainer.train_stage()
        states = optimizer_bytes(trainer.create_optimizer())
    wall, processor = max(gather_object([timer.milliseconds()]), key=lambda times: times[1])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if state.is_main_process:
        layout = args.parallel if state.num_processes > 1 else "one process"
        print(
            f"{args.teacher} {args.stage}, {layout}: {wall:.0f} ms per step, {processor:.0f} ms of processor time, "
            f"{states / 1e6:.1f} MB of optimizer states, {memory / 1e6:.0f} MB resident"
        )
    state.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_as_script(main)
