"""Executes the runs of a study on this machine: sequentially in this process, or several at once in worker processes.

A worker loads the teacher once and executes one run after the other. If it is killed, its run resumes from the last
checkpoint in another worker.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from subquad.distill.recipe_stages import StageCache, stage_keys
from subquad.study.execute import execute_in_worker, execute_run, start_worker, teacher_in_memory
from subquad.study.runs import Run
from subquad.threads import available_cores

MAX_WORKER_EXITS = 3
"""Worker exits after which a run counts as failed."""


class Scheduler:
    """The runs of a study, each waiting, running or ended. No two runs train the same shared stage at once.

    on_end: called with each run that has finished or failed.
    """

    def __init__(self, runs: Iterable[Run], stage_cache: StageCache, on_end: Callable[[Run], None] = lambda run: None):
        self.waiting = [run for run in runs if run.state != "finished"]
        self.running: list[Run] = []
        self.stage_cache, self.on_end = stage_cache, on_end
        self.worker_exits = Counter[str]()

    def __bool__(self) -> bool:
        """Whether any run is waiting or running."""
        return bool(self.waiting or self.running)

    def next(self) -> Run | None:
        """Marks the first waiting run that is not blocked as running and returns it; None if there is none."""
        for run in self.waiting:
            missing = {key for key in self.shared_keys(run) if not self.stage_cache.has(key)}
            if not any(missing & self.shared_keys(other) for other in self.running):
                self.waiting.remove(run)
                self.running.append(run)
                return run
        return None

    def shared_keys(self, run: Run) -> set[str]:
        """Keys of the run's stages that other runs share."""
        return set(stage_keys(run.recipe).values()) & self.stage_cache.shared_keys

    def end(self, run: Run, error: BaseException | None = None) -> None:
        """Records that a run ended: it finished, or `error.json` says why it failed, or it did not start: `error`.

        A run whose process was killed is queued again, to resume from its last checkpoint, up to `MAX_WORKER_EXITS`.
        """
        self.running.remove(run)
        if isinstance(error, BrokenProcessPool):
            self.worker_exits[run.name] += 1
            if self.worker_exits[run.name] < MAX_WORKER_EXITS:
                self.waiting.insert(0, run)
                return
            exits = f"its process exited {MAX_WORKER_EXITS} times, last with {error}"
            run.fail("WorkerDied", f"{exits}; is there enough memory?")
        elif error is not None:
            run.fail(type(error).__name__, str(error))
        self.on_end(run)

    def run_all(self, submit: Callable[[int, Run], Future[None]], slots: int) -> None:
        """Executes all runs, up to `slots` at once; `submit` starts a run in a free slot."""
        running: dict[Future[None], tuple[int, Run]] = {}
        while self:
            for slot in sorted(set(range(slots)) - {slot for slot, _ in running.values()}):
                if (run := self.next()) is not None:
                    running[submit(slot, run)] = slot, run
            # No message announces that a shared stage is complete, so blocked runs are checked every second.
            ended, _ = wait(running, 1.0 if self.waiting else None, return_when=FIRST_COMPLETED)
            for future in ended:
                self.end(running.pop(future)[1], future.exception())


def run_sequentially(scheduler: Scheduler) -> None:
    try:
        while (run := scheduler.next()) is not None:
            execute_run(run, scheduler.stage_cache)
            scheduler.end(run)
    finally:
        teacher_in_memory.cache_clear()


def run_in_processes(scheduler: Scheduler, jobs: int) -> None:
    """Executes up to `jobs` runs at once. The CPU cores are divided evenly; each worker gets a GPU if there are any.

    Each slot has an executor of one worker: a worker that is killed breaks its own executor only, and has its own GPU.
    """
    context, threads = multiprocessing.get_context("spawn"), threads_per_worker(jobs)
    # This process holds the only other end: when it ends, even by a kill, the workers see the pipe close and exit.
    worker_end, own_end = context.Pipe(duplex=False)
    executors: dict[int, ProcessPoolExecutor] = {}

    def submit(slot: int, run: Run) -> Future[None]:
        try:
            return executors[slot].submit(execute_in_worker, run, scheduler.stage_cache)
        except (KeyError, BrokenProcessPool):
            arguments = (worker_end, threads, gpu_environment(slot))
            executors[slot] = ProcessPoolExecutor(1, context, start_worker, arguments)
            return executors[slot].submit(execute_in_worker, run, scheduler.stage_cache)

    try:
        scheduler.run_all(submit, jobs)
        for executor in executors.values():  # before the pipe closes, so that the workers can clean up
            executor.shutdown()
    finally:
        own_end.close()
        for executor in executors.values():
            executor.shutdown()


def threads_per_worker(jobs: int) -> int:
    """The CPU cores of this process divided by `jobs`, at most `OMP_NUM_THREADS`."""
    cores = available_cores()
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // jobs, int(limit) if limit.isdigit() and int(limit) else cores))


def gpu_environment(slot: int) -> dict[str, str]:
    """The `CUDA_VISIBLE_DEVICES` of a worker; empty without a GPU."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if count else {}
