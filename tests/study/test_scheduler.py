"""Which runs may execute at once, what resources they get, and recovery from a killed worker."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from subquad.config import load_study
from subquad.study import engines
from subquad.study.engines import MAX_WORKER_EXITS, Scheduler
from subquad.study.grid import run_study
from subquad.study.progress import shared_stages
from subquad.study.ray_engine import resources_per_run
from subquad.study.runs import find_runs
from subquad.utils import UserError
from tests.helpers.studies import SHORT, TWO_LAST_STAGES, same_weights

ROOT = Path(__file__).parents[2]


def test_a_run_waits_while_another_trains_a_shared_stage(study_recipe, tmp_path):
    pair = find_runs(load_study(study_recipe, [TWO_LAST_STAGES]), tmp_path)
    (other,) = find_runs(load_study(study_recipe, ["student.mixer=retnet"]), tmp_path)
    stage_cache = shared_stages(pair, tmp_path)
    scheduler = Scheduler([*pair, other], stage_cache)
    assert scheduler.next() is pair[0]
    assert scheduler.next() is other
    assert scheduler.next() is None
    for key in scheduler.shared_keys(pair[0]):
        (stage_cache.directory / key).mkdir(parents=True)
    assert scheduler.next() is pair[1]
    for run in (*pair, other):
        scheduler.end(run)
    assert not scheduler


def test_a_run_fails_after_repeated_worker_exits(study_recipe, tmp_path):
    (run,) = find_runs(load_study(study_recipe), tmp_path)
    scheduler = Scheduler([run], shared_stages([run], tmp_path))
    for _ in range(MAX_WORKER_EXITS):
        assert scheduler.next() is run
        scheduler.end(run, BrokenProcessPool("by signal 9"))
    assert not scheduler
    assert run.state == "failed"
    assert "by signal 9" in run.error()["message"]


def test_cores_are_divided_among_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [engines.threads_per_worker(jobs) for jobs in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert engines.threads_per_worker(2) == 2


def test_resources_of_a_run_on_a_cluster():
    def machine(alive=True, **resources):
        return {"Alive": alive, "Resources": resources}

    cpus = [machine(CPU=16), machine(CPU=8), machine(CPU=0), machine(alive=False, CPU=1)]
    assert resources_per_run(cpus, 1) == {"num_cpus": 8}
    assert resources_per_run(cpus, 3) == {"num_cpus": 2}
    assert resources_per_run(cpus, 100) == {"num_cpus": 1}
    assert resources_per_run([*cpus, machine(CPU=16, GPU=8)], 1) == {"num_cpus": 1, "num_gpus": 1}
    assert resources_per_run([machine(CPU=16, GPU=2)], 4) == {"num_cpus": 1, "num_gpus": 0.5}
    with pytest.raises(UserError, match="no machine with a CPU"):
        resources_per_run([machine(CPU=0)], 1)


WORKERS = """
from types import SimpleNamespace
from subquad.study import engines
from tests.helpers.workers import draw_bar

def run_all(submit, jobs):
    for future in [submit(slot, None) for slot in range(jobs)]:
        future.result()
    {end}

engines.execute_in_worker = draw_bar
engines.run_in_processes(SimpleNamespace(run_all=run_all, stage_cache=None), 1)
"""


@pytest.mark.parametrize("end", ["", "raise KeyboardInterrupt"])
def test_workers_leave_no_semaphores(end):
    """Those of progress bars, which a worker that ends normally or is ended would leave."""
    done = subprocess.run(
        [sys.executable, "-c", WORKERS.format(end=end)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode != 0) == bool(end), done.stderr
    assert "leaked" not in done.stderr


@pytest.mark.slow
@pytest.mark.sample
def test_parallel_runs_with_a_killed_worker_match_sequential_runs(study_recipe, tmp_path, monkeypatch):
    recipes = load_study(study_recipe, [*SHORT, "student.mixer=[gla, retnet, metala]"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = run_study(recipes, tmp_path / "sequential")
    workers, killed = set(), []
    wait = engines.wait

    def killing_wait(futures, timeout=None, **options):
        workers.update(multiprocessing.active_children())
        if not killed and len(workers) == 2 and (tmp_path / "parallel" / "gla" / "metrics.jsonl").exists():
            killed.append(min(workers, key=lambda worker: worker.pid))
            killed[0].kill()
        return wait(futures, 0.05, **options)

    monkeypatch.setattr(engines, "wait", killing_wait)
    results = run_study(recipes, tmp_path / "parallel", jobs=2)
    assert killed
    assert len(workers) == 3
    assert not multiprocessing.active_children()
    for result, other in zip(expected, results, strict=True):
        assert same_weights(tmp_path / "sequential" / result["run"], tmp_path / "parallel" / other["run"])
        assert result["perplexity"] == other["perplexity"]
