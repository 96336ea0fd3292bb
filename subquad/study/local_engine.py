"""Runs on this machine: one after the other in this process, or several at once in processes of their own.

A worker loads the teacher once and takes run after run. One that is killed costs its run what lies behind the last
checkpoint, and the study nothing else.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from subquad.study.execute import Task, TeacherCache, environment, run_task
from subquad.study.lock import StudyLock
from subquad.study.scheduler import Scheduler
from subquad.study.worker import work

Changed = Callable[[], None]


def run_here(board: Scheduler, changed: Changed) -> None:
    """One run after the other. `changed` is called when one starts and when one ends."""
    teachers = TeacherCache()
    while (task := board.next()) is not None:
        changed()
        run_task(task, teachers)
        board.end(task)
        changed()


@dataclass
class Worker:
    process: SpawnProcess
    connection: Connection
    task: Task | None = None


def run_in_processes(board: Scheduler, jobs: int, lock: StudyLock, changed: Changed) -> None:
    """Up to `jobs` runs at once, with an equal part of the cores each, and a GPU each where there are some."""
    workers: dict[int, Worker] = {}
    try:
        while board:
            for slot in range(jobs):
                if (slot not in workers or workers[slot].task is None) and (task := board.next()) is not None:
                    if slot not in workers:
                        workers[slot] = start_worker(slot, jobs, lock)
                    workers[slot].task = task
                    with contextlib.suppress(OSError):  # it has just died, which is found below
                        workers[slot].connection.send(task)
                    changed()
            busy = {slot: worker for slot, worker in workers.items() if worker.task is not None}
            # Of runs that wait for another's stage the end of that stage is not told: look now and then.
            ready = wait([worker.connection for worker in busy.values()], timeout=1.0 if board.waiting else None)
            for slot, worker in busy.items():
                if worker.connection in ready:
                    end_of_task(board, workers, slot)
                    changed()
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.join()


def end_of_task(board: Scheduler, workers: dict[int, Worker], slot: int) -> None:
    worker = workers[slot]
    assert worker.task is not None
    try:
        worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        del workers[slot]
        code = worker.process.exitcode or 0
        board.on_worker_exit(worker.task, f"by signal {-code}" if code < 0 else f"with exit code {code}")
        return
    board.end(worker.task)
    worker.task = None


def start_worker(slot: int, jobs: int, lock: StudyLock) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    threads = threads_each(jobs)
    with environment({"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", **gpu_of(slot)}):
        process = context.Process(target=work, args=(theirs, lock, threads))
        process.start()
    theirs.close()  # or its end would not be seen
    return Worker(process, ours)


def threads_each(jobs: int) -> int:
    """Cores of this process divided, but no more than `OMP_NUM_THREADS` allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // jobs, int(allowed) if allowed.isdigit() and int(allowed) else cores))


def gpu_of(slot: int) -> dict[str, str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())] if chosen is None else chosen.split(",")
    return {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if names and torch.cuda.device_count() else {}
