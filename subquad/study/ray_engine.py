"""Runs on many machines, by Ray: a run is a task with its CPUs or a GPU. What dies is run again elsewhere, from its
last checkpoint on the shared directory. Queue, resources and the watching of machines are Ray's.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subquad.study.execute import Task, TeacherCache, run_task
from subquad.study.scheduler import MAX_RETRIES, Scheduler
from subquad.utils import UserError, quiet_libraries

PASSED_ON = ("SUBQUAD_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN")
"""Variables that a run sees as the study does."""

Changed = Callable[[], None]
teachers = TeacherCache()  # of a worker, which Ray lets run task after task


def import_ray() -> Any:
    """Raises UserError where Ray is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise UserError('engine: ray is not installed; pip install "subquad[cluster]", or leave out --engine') from None


def connect(ray: Any) -> None:
    """To the cluster at `RAY_ADDRESS`; without that, to one on this machine alone."""
    if not ray.is_initialized():
        try:
            ray.init(logging_level="ERROR", log_to_driver=False)
        except ConnectionError as error:
            where = os.environ.get("RAY_ADDRESS", "this machine")
            first = str(error).partition("\n")[0]
            raise UserError(
                f"no Ray cluster at {where} ({first}); expected RAY_ADDRESS to name a running one"
            ) from None


def share(nodes: list[dict[str, Any]], jobs: int) -> dict[str, float]:
    """What a run asks for, of the smallest machine: one of its GPUs, or its cores divided among `jobs` runs."""
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not alive:
        raise UserError("the Ray cluster has no machine with a CPU to run on; expected at least one")
    gpus = [resources["GPU"] for resources in alive if resources.get("GPU", 0) >= 1]
    if gpus:
        return {"num_cpus": 1, "num_gpus": min(1.0, min(gpus) / jobs)}
    return {"num_cpus": max(1, int(min(resources["CPU"] for resources in alive) // jobs))}


def run_on_cluster(board: Scheduler, jobs: int, changed: Changed) -> None:
    """All runs that need not wait are Ray's to place; `jobs` is how many a machine has at once."""
    ray = import_ray()
    connect(ray)
    resources = share(ray.nodes(), jobs)
    remote = ray.remote(max_retries=MAX_RETRIES - 1, **resources)(run_remotely)
    settings = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    started: dict[Any, Task] = {}
    try:
        while board:
            while (task := board.next()) is not None:
                started[remote.remote(task, Path.cwd(), settings, int(resources["num_cpus"]))] = task
                changed()
            # Ended runs are told; of those that wait for another's stage its end is not: look now and then.
            ended, _ = ray.wait(list(started), timeout=1.0)
            for reference in ended:
                end(ray, board, started.pop(reference), reference)
                changed()
    finally:
        for reference in started:
            ray.cancel(reference, force=True)


def end(ray: Any, board: Scheduler, task: Task, reference: Any) -> None:
    try:
        ray.get(reference)
    except Exception as error:  # Ray's own: the retries are used up, or the task could not even begin
        task.run.fail(type(error).__name__, str(error))
    board.end(task)


def run_remotely(task: Task, directory: Path, settings: dict[str, str], threads: int) -> None:
    """In a worker of Ray's, on any machine."""
    import torch

    shared = directory / task.run.directory.parent
    if not directory.is_dir() or not shared.is_dir():
        raise UserError(f"this machine does not see {directory} and {shared}; expected directories that all share")
    os.environ.update(settings)
    os.chdir(directory)
    quiet_libraries()
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
    run_task(task, teachers)
