"""A study of many runs whose processes are killed at random ends with the table of an undisturbed one."""

import json
import os
import random
import subprocess
import sys
import time

import psutil
import pytest

from subquad.config import load_study
from subquad.study.grid import run_study
from tests.helpers.studies import study_command

RUNS = 40
KILLS = 12
SECONDS = (1.0, 6.0)
"""Between kills, from the first new step of training on."""
MANY = [
    "student.mixer=[gla, retnet, metala, linear_attention]",
    f"seed={list(range(RUNS // 4))}",
    "stages.matrix=null",
    "stages.hidden={tokens: 256, lr: 1e-3, batch_size: 2}",
    "stages.end_to_end=null",
    "evaluation.eval_tokens=128",
    "checkpoint.save_steps=1",
]
TIMED = ("seconds", "decode_tokens_per_second")


def table(results):
    return [{name: value for name, value in result.items() if name not in TIMED} for result in results]


def victim(study: psutil.Process, generator: random.Random) -> psutil.Process:
    """The process of the study, or one of its workers."""
    workers = [p for p in study.children() if "spawn_main" in " ".join(p.cmdline())]
    return generator.choice([study, *sorted(workers, key=lambda p: p.pid)])


@pytest.mark.slow
def test_random_kills_change_nothing(study_recipe, tmp_path):
    undisturbed = table(run_study(load_study(study_recipe, MANY), tmp_path / "undisturbed"))
    assert len(undisturbed) == RUNS
    output, generator, kills, code = tmp_path / "killed", random.Random(0), 0, None
    command = [sys.executable, "-m", "subquad.cli", *study_command(study_recipe, output, *MANY), "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def steps():
        return sum(path.stat().st_size for path in output.glob("*/metrics.jsonl"))

    while code != 0:
        assert code is None or kills, "it fails by itself"
        study = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        while study.poll() is None and kills < KILLS:
            reached = steps()
            while study.poll() is None and steps() <= reached:
                time.sleep(0.05)
            time.sleep(generator.uniform(*SECONDS))
            if study.poll() is None:
                victim(psutil.Process(study.pid), generator).kill()
                kills += 1
        code = study.wait()
    assert kills >= KILLS // 2  # on a fast machine the study ends earlier
    results = json.loads((output / "results.json").read_text())["results"]
    assert table(results) == undisturbed
    assert not list(output.rglob("*.part"))
