"""A study that is killed, or loses a machine, ends with the same results and repeats no finished run."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from subquad.config import load_study
from subquad.study.grid import run_study
from subquad.study.runs import find_runs
from tests.helpers.studies import study_command

TWELVE = [
    "student.mixer=[gla, retnet, metala]",
    "seed=[0, 1]",
    "stages.matrix=null",
    "stages.hidden={tokens: 256, lr: 1e-3, batch_size: 2}",
    "stages.end_to_end=[{tokens: 128, lr: 1e-3, batch_size: 2}, {tokens: 256, lr: 1e-3, batch_size: 2}]",
    "evaluation.eval_tokens=128",
    "checkpoint.save_steps=1",
]
TIMED = ("seconds", "decode_tokens_per_second", "teacher_decode_tokens_per_second")
"""Measured times, which differ between identical runs."""


def without_times(results):
    return [{name: value for name, value in result.items() if name not in TIMED} for result in results]


@pytest.fixture(scope="module")
def uninterrupted(study_recipe, own_cache, tmp_path_factory):
    return without_times(run_study(load_study(study_recipe, TWELVE), tmp_path_factory.mktemp("uninterrupted")))


def finished(output: Path) -> dict[str, int]:
    """Modification time of each finished run's result, by run name."""
    return {path.parent.name: path.stat().st_mtime_ns for path in output.glob("*/result.json")}


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_killed_three_times_gives_the_same_results(jobs, uninterrupted, study_recipe, tmp_path):
    output, generator = tmp_path / "killed", random.Random(jobs)
    arguments = study_command(study_recipe, output, *TWELVE)
    command = [sys.executable, "-m", "subquad.cli", *arguments, "--jobs", str(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def metrics_bytes():
        return sum(len(path.read_bytes()) for path in output.glob("*/metrics.jsonl"))

    finished_before: dict[str, int] = {}
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        reached, deadline = metrics_bytes(), time.monotonic() + 180
        while process.poll() is None and metrics_bytes() <= reached and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        now = finished(output)
        assert {name: now[name] for name in finished_before} == finished_before, "a finished run was repeated"
        finished_before = now
    assert kills
    assert len(finished_before) < 12
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    now = finished(output)
    assert {name: now[name] for name in finished_before} == finished_before, "a finished run was repeated"
    results = json.loads((output / "results.json").read_text())["results"]
    assert without_times(results) == uninterrupted
    assert not (output / ".stages").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (subquad[cluster])")
def test_a_cluster_that_loses_a_machine_gives_the_same_results(uninterrupted, study_recipe, tmp_path, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or its workers starve on a busy machine
    recipes = load_study(study_recipe, TWELVE)
    # The head node has no core, so it executes no run.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        lost_node, _ = (cluster.add_node(num_cpus=1) for _ in range(2))
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        ray.init(log_to_driver=False)
        lost = []

        def lose_machine(line: str) -> None:
            """Removes a machine once two runs are running and one has reported a loss."""
            if not lost and "2 running" in line and "loss" in line:
                lost.append(line)
                cluster.remove_node(lost_node, allow_graceful=False)

        results = run_study(recipes, tmp_path / "study", engine="ray", log=lose_machine, interval=0.2)
        assert lost
        assert without_times(results) == uninterrupted
        assert all(run.state == "finished" for run in find_runs(recipes, tmp_path / "study"))
    finally:
        ray.shutdown()
        cluster.shutdown()
