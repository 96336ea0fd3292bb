"""Executes runs on this machine: sequentially in this process, or several at once in worker processes.

A worker loads the teacher once and executes one run after the other. If it is killed, its run resumes from the last
checkpoint in another worker.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from subquad.study.execute import TeacherCache, execute_run, start_worker
from subquad.study.lock import StudyLock
from subquad.study.runs import Run
from subquad.study.scheduler import Scheduler


def run_sequentially(scheduler: Scheduler, on_change: Callable[[], None]) -> None:
    """Executes one run after the other. `on_change` is called whenever a run starts or ends."""
    teachers = TeacherCache()
    while (run := scheduler.next()) is not None:
        on_change()
        execute_run(run, scheduler.stage_cache, teachers)
        scheduler.end(run)
        on_change()


def run_in_processes(scheduler: Scheduler, jobs: int, lock: StudyLock, on_change: Callable[[], None]) -> None:
    """Executes up to `jobs` runs at once. The CPU cores are divided evenly; each worker gets a GPU if there are any.

    Each slot has an executor of one worker: a worker that is killed breaks its own executor only, and has its own GPU.
    """
    context, threads = multiprocessing.get_context("spawn"), threads_per_worker(jobs)
    # This process holds the only other end: when it ends, even by a kill, the workers see the pipe close and exit.
    worker_end, own_end = context.Pipe(duplex=False)
    executors: dict[int, ProcessPoolExecutor] = {}
    running: dict[Future[None], tuple[int, Run]] = {}

    def submit(slot: int, run: Run) -> Future[None]:
        try:
            return executors[slot].submit(execute_run, run, scheduler.stage_cache)
        except (KeyError, BrokenProcessPool):
            arguments = (lock, worker_end, threads, gpu_environment(slot))
            executors[slot] = ProcessPoolExecutor(1, context, start_worker, arguments)
            return executors[slot].submit(execute_run, run, scheduler.stage_cache)

    try:
        while scheduler:
            for slot in sorted(set(range(jobs)) - {slot for slot, _ in running.values()}):
                if (run := scheduler.next()) is not None:
                    running[submit(slot, run)] = slot, run
                    on_change()
            # No message announces that a shared stage is complete, so blocked runs are checked every second.
            ended, _ = wait(running, 1.0 if scheduler.waiting else None, return_when=FIRST_COMPLETED)
            for future in ended:
                _, run = running.pop(future)
                if error := future.exception():
                    scheduler.on_worker_exit(run, f"with {type(error).__name__}: {error}")
                else:
                    scheduler.end(run)
                on_change()
    finally:
        own_end.close()
        for executor in executors.values():
            executor.shutdown()


def threads_per_worker(jobs: int) -> int:
    """The CPU cores of this process divided by `jobs`, at most `OMP_NUM_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // jobs, int(limit) if limit.isdigit() and int(limit) else cores))


def gpu_environment(slot: int) -> dict[str, str]:
    """The `CUDA_VISIBLE_DEVICES` of a worker; empty without a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if names and torch.cuda.device_count() else {}
