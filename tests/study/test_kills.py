"""A study that is killed, as a whole or a machine of it, and started again: the same table, nothing done twice."""

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

TWELVE = [
    "student.mixer=[gla, retnet, metala]",
    "seed=[0, 1]",
    "stages.matrix=null",
    "stages.hidden={tokens: 256, lr: 1e-3, batch_size: 2}",
    "stages.end_to_end=[{tokens: 128, lr: 1e-3, batch_size: 2}, {tokens: 256, lr: 1e-3, batch_size: 2}]",
    "evaluation.eval_tokens=128",
    "checkpoint.save_steps=1",
]
TIMED = ("seconds", "decode_tokens_per_second")
"""What no two runs have in common."""


def table(rows):
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(study_recipe, tmp_path_factory):
    os.environ["SUBQUAD_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    return table(run_study(load_study(study_recipe, TWELVE), tmp_path_factory.mktemp("undisturbed")))


def finished(output: Path) -> dict[str, int]:
    """When each finished run wrote its result."""
    return {path.parent.name: path.stat().st_mtime_ns for path in output.glob("*/result.json")}


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_three_times_at_random_it_ends_with_the_same_table(jobs, undisturbed, study_recipe, tmp_path):
    output, generator = tmp_path / "killed", random.Random(jobs)
    command = [sys.executable, "-m", "subquad.cli", "study", str(study_recipe), "--output", str(output)]
    command += ["--jobs", str(jobs), *(part for text in TWELVE for part in ("--set", text))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def progress():
        return sum(len(path.read_bytes()) for path in output.glob("*/metrics.jsonl"))

    seen: dict[str, int] = {}
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        reached, deadline = progress(), time.monotonic() + 180
        while process.poll() is None and progress() <= reached and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        now = finished(output)
        assert {name: now[name] for name in seen} == seen, "a finished run was repeated"
        seen = now
    assert kills
    assert len(seen) < 12
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    now = finished(output)
    assert {name: now[name] for name in seen} == seen, "a finished run was repeated"
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert table(rows) == undisturbed
    assert not (output / ".stages").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (subquad[cluster])")
def test_on_a_cluster_that_loses_a_machine_it_ends_with_the_same_table(
    undisturbed, study_recipe, tmp_path, monkeypatch
):
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else its workers starve beside whatever else runs here
    recipes = load_study(study_recipe, TWELVE)
    # The head runs nothing: without a core of its own it only knows of the others.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        doomed, _ = (cluster.add_node(num_cpus=1) for _ in range(2))
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        ray.init(log_to_driver=False)
        lost = []

        def lose(line: str) -> None:
            """Once two runs are under way and one of them has trained."""
            if not lost and "2 running" in line and "loss" in line:
                lost.append(line)
                cluster.remove_node(doomed, allow_graceful=False)

        rows = run_study(recipes, tmp_path / "study", engine="ray", say=lose, interval=0.2)
        assert lost
        assert table(rows) == undisturbed
        assert all(run.state == "finished" for run in find_runs(recipes, tmp_path / "study"))
    finally:
        ray.shutdown()
        cluster.shutdown()
