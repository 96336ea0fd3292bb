"""Executes runs on a Ray cluster: each run is a Ray task with CPUs or a GPU.

Ray queues, places and retries runs. A run whose machine dies resumes elsewhere from its last checkpoint in the shared
directory.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subquad.distill.stage_cache import StageCache
from subquad.study.execute import execute_run
from subquad.study.runs import Run
from subquad.study.scheduler import MAX_WORKER_EXITS, Scheduler
from subquad.utils import UserError, needs_extra, quiet_libraries

FORWARDED_VARIABLES = ("SUBQUAD_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN")
"""Environment variables that every run receives from the study."""


def import_ray() -> Any:
    """Raises UserError if Ray is not installed."""
    with needs_extra("engine ray", "cluster"):
        return importlib.import_module("ray")


def connect(ray: Any) -> None:
    """Connects to the cluster at `RAY_ADDRESS`; if unset, starts a cluster on this machine."""
    if not ray.is_initialized():
        try:
            ray.init(logging_level="ERROR", log_to_driver=False)
        except ConnectionError as error:
            address = os.environ.get("RAY_ADDRESS", "this machine")
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"RAY_ADDRESS: got {address}, expected the address of a running cluster ({reason})"
            ) from None


def resources_per_run(nodes: list[dict[str, Any]], jobs: int) -> dict[str, float]:
    """The resources of one run, for `jobs` runs on the smallest machine: a GPU or part of one, or CPU cores."""
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not alive:
        raise UserError("the Ray cluster has no machine with a CPU; expected at least one")
    gpus = [resources["GPU"] for resources in alive if resources.get("GPU", 0) >= 1]
    if gpus:
        return {"num_cpus": 1, "num_gpus": min(1.0, min(gpus) / jobs)}
    return {"num_cpus": max(1, int(min(resources["CPU"] for resources in alive) // jobs))}


def run_on_cluster(scheduler: Scheduler, jobs: int, on_change: Callable[[], None]) -> None:
    """Submits every run that is not blocked to Ray. `jobs`: runs at once on a machine."""
    ray = import_ray()
    connect(ray)
    resources = resources_per_run(ray.nodes(), jobs)
    remote = ray.remote(max_retries=MAX_WORKER_EXITS - 1, **resources)(execute_remotely)
    variables = {name: os.environ[name] for name in FORWARDED_VARIABLES if name in os.environ}
    context = (scheduler.stage_cache, Path.cwd(), variables, int(resources["num_cpus"]))
    submitted: dict[Any, Run] = {}
    try:
        while scheduler:
            while (run := scheduler.next()) is not None:
                submitted[remote.remote(run, *context)] = run
                on_change()
            # Ray announces the end of runs but not of shared stages, so blocked runs are checked every second.
            ended, _ = ray.wait(list(submitted), timeout=1.0)
            for reference in ended:
                end_run(ray, scheduler, submitted.pop(reference), reference)
                on_change()
    finally:
        for reference in submitted:
            ray.cancel(reference, force=True)


def end_run(ray: Any, scheduler: Scheduler, run: Run, reference: Any) -> None:
    try:
        ray.get(reference)
    except Exception as error:  # raised by Ray: retries are exhausted, or the task could not start
        run.fail(type(error).__name__, str(error))
    scheduler.end(run)


def execute_remotely(
    run: Run, stage_cache: StageCache, directory: Path, variables: dict[str, str], threads: int
) -> None:
    """Executes a run in a Ray worker on any machine. `directory`: working directory of the study."""
    import torch

    output = directory / run.directory.parent
    if not directory.is_dir() or not output.is_dir():
        raise UserError(f"this machine cannot read {directory} and {output}; expected directories on a shared disk")
    os.environ.update(variables)
    os.chdir(directory)
    quiet_libraries()
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
    execute_run(run, stage_cache)
