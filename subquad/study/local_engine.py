"""Executes runs on this machine: sequentially in this process, or several at once in worker processes.

A worker loads the teacher once and executes one run after the other. If it is killed, its run resumes from the last
checkpoint in another worker.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from subquad.study.execute import TeacherCache, environment, execute_run, worker_main
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


@dataclass
class Worker:
    process: SpawnProcess
    connection: Connection
    run: Run | None = None


def run_in_processes(scheduler: Scheduler, jobs: int, lock: StudyLock, on_change: Callable[[], None]) -> None:
    """Executes up to `jobs` runs at once. The CPU cores are divided evenly; each worker gets a GPU if there are any."""
    workers: dict[int, Worker] = {}
    try:
        while scheduler:
            for slot in range(jobs):
                if (slot not in workers or workers[slot].run is None) and (run := scheduler.next()) is not None:
                    if slot not in workers:
                        workers[slot] = start_worker(slot, jobs, lock)
                    workers[slot].run = run
                    with contextlib.suppress(OSError):  # the worker has just died; `wait` below detects it
                        workers[slot].connection.send((run, scheduler.stage_cache))
                    on_change()
            busy = {slot: worker for slot, worker in workers.items() if worker.run is not None}
            # No message announces that a shared stage is complete, so blocked runs are checked every second.
            ready = wait([worker.connection for worker in busy.values()], timeout=1.0 if scheduler.waiting else None)
            for slot, worker in busy.items():
                if worker.connection in ready:
                    end_run(scheduler, workers, slot)
                    on_change()
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.join()


def end_run(scheduler: Scheduler, workers: dict[int, Worker], slot: int) -> None:
    """Handles a worker that reported the end of its run, or exited."""
    worker = workers[slot]
    assert worker.run is not None
    try:
        worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        del workers[slot]
        code = worker.process.exitcode or 0
        scheduler.on_worker_exit(worker.run, f"by signal {-code}" if code < 0 else f"with exit code {code}")
        return
    scheduler.end(worker.run)
    worker.run = None


def start_worker(slot: int, jobs: int, lock: StudyLock) -> Worker:
    context = multiprocessing.get_context("spawn")
    own_end, worker_end = context.Pipe()
    threads = threads_per_worker(jobs)
    with environment({"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", **gpu_environment(slot)}):
        process = context.Process(target=worker_main, args=(worker_end, lock, threads))
        process.start()
    worker_end.close()  # while this process holds a copy, the exit of the worker does not close the pipe
    return Worker(process, own_end)


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
