"""Executes runs on a Ray cluster: each run is a Ray task with CPUs or a GPU.

Ray queues, places and retries runs. A run whose machine dies resumes elsewhere from its last checkpoint in the shared
directory.
"""

import importlib
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from subquad.distill.recipe_stages import StageCache
from subquad.study.engines import MAX_WORKER_EXITS, Scheduler
from subquad.study.execute import execute_run
from subquad.study.runs import Run
from subquad.utils import UserError, needs_extra, quiet_libraries

FORWARDED_VARIABLES = ("SUBQUAD_CACHE", "HF_HOME", "HF_HUB_OFFLINE")
"""Environment variables that every run receives from the study. No HF_TOKEN, which Ray would show to every user of the
cluster: each machine has its own, or finds that of `hf auth login` in HF_HOME."""


def import_ray() -> Any:
    """Raises UserError if Ray is not installed."""
    with needs_extra("engine ray", "cluster"):
        return importlib.import_module("ray")


def resources_per_run(nodes: list[dict[str, Any]], jobs: int) -> dict[str, float]:
    """The resources of one run, for `jobs` runs on the smallest machine: a GPU or part of one, or CPU cores."""
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not alive:
        raise UserError("the Ray cluster has no machine with a CPU; expected at least one")
    gpus = [resources["GPU"] for resources in alive if resources.get("GPU", 0) >= 1]
    if gpus:
        return {"num_cpus": 1, "num_gpus": min(1.0, min(gpus) / jobs)}
    return {"num_cpus": max(1, int(min(resources["CPU"] for resources in alive) // jobs))}


def run_on_cluster(scheduler: Scheduler, jobs: int) -> None:
    """Submits every run that is not blocked to the cluster at `RAY_ADDRESS`; if unset, to one started on this machine.

    jobs: runs at once on a machine.
    """
    ray = import_ray()
    try:
        ray.init(logging_level="ERROR", log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError as error:
        address, reason = os.environ.get("RAY_ADDRESS", "this machine"), str(error).partition("\n")[0]
        raise UserError(f"RAY_ADDRESS: got {address}, expected the address of a running cluster ({reason})") from None
    resources = resources_per_run(ray.nodes(), jobs)
    variables = {name: os.environ[name] for name in FORWARDED_VARIABLES if name in os.environ}
    remote = ray.remote(max_retries=MAX_WORKER_EXITS - 1, runtime_env={"env_vars": variables}, **resources)(
        execute_remotely
    )
    submitted: dict[str, Any] = {}

    def submit(_: int, run: Run) -> Future[None]:
        submitted[run.name] = remote.remote(run, scheduler.stage_cache, Path.cwd(), int(resources["num_cpus"]))
        return submitted[run.name].future()

    try:
        scheduler.run_all(submit, len(scheduler.waiting))
    finally:
        for run in scheduler.running:
            ray.cancel(submitted[run.name], force=True)


def execute_remotely(run: Run, stage_cache: StageCache, directory: Path, threads: int) -> None:
    """Executes a run in a Ray worker on any machine. `directory`: working directory of the study."""
    import torch

    output = directory / run.directory.parent
    if not directory.is_dir() or not output.is_dir():
        raise UserError(f"this machine cannot read {directory} and {output}; expected directories on a shared disk")
    os.chdir(directory)
    quiet_libraries()
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
    execute_run(run, stage_cache)
