"""A study of many runs whose processes are killed at random ends with the table of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from subquad.config import load_study
from subquad.study.grid import run_study
from tests.helpers.studies import study_command

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SECONDS = (0.0, 5.0)
"""From the first new step of training after a kill to the next kill; half of them are at once."""
MANY = [
    "student.mixer=[gla, retnet, metala, linear_attention]",
    "stages.matrix=null",
    "stages.hidden={tokens: 1024, lr: 1e-3, batch_size: 2}",
    "stages.end_to_end=null",
    "evaluation.eval_tokens=128",
    "checkpoint.save_steps=1",
]
TIMED = ("seconds", "decode_tokens_per_second", "teacher_decode_tokens_per_second")


def table(results):
    return [{name: value for name, value in result.items() if name not in TIMED} for result in results]


def victim(study: psutil.Process, generator: random.Random) -> psutil.Process:
    """The process of the study, or one of its workers."""
    workers = []
    for process in study.children():
        with suppress(psutil.Error):  # it has ended
            workers += [process] if "spawn_main" in " ".join(process.cmdline()) else []
    return generator.choice([study, *sorted(workers, key=lambda p: p.pid)])


def damage(output, generator: random.Random) -> int:
    """Changes a byte or cuts a file of a checkpoint, as a failing disk does; returns the number of damaged files."""
    files = [path for path in output.glob("*/checkpoints/*/checkpoint-*/*") if path.stat().st_size]
    if not files:
        return 0
    path = generator.choice(sorted(files))
    content = bytearray(path.read_bytes())
    at = generator.randrange(len(content))
    if generator.random() < 0.5:
        content[at] ^= 1 << generator.randrange(8)
    else:
        del content[at:]
    path.write_bytes(content)
    return 1


@pytest.mark.slow
@pytest.mark.parametrize(("runs", "kills"), [(40, 12), (200, 60)])
def test_random_kills_change_nothing(runs, kills, study_recipe, tmp_path):
    """Of the study or its workers, with one of three signals; after most of them a checkpoint is damaged."""
    many = [*MANY, f"seed={list(range(runs // 4))}"]
    undisturbed = table(run_study(load_study(study_recipe, many), tmp_path / "undisturbed"))
    assert len(undisturbed) == runs
    output, generator, killed, damaged, code = tmp_path / "killed", random.Random(0), 0, 0, None
    command = [sys.executable, "-m", "subquad.cli", *study_command(study_recipe, output, *many), "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def steps():
        return sum(path.stat().st_size for path in output.glob("*/metrics.jsonl"))

    while code != 0:
        assert code is None or killed, "it fails by itself"
        study = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        while study.poll() is None and killed < kills:
            reached = steps()
            while study.poll() is None and steps() <= reached:
                time.sleep(0.05)
            time.sleep(generator.choice([0, generator.uniform(*SECONDS)]))
            if study.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    victim(psutil.Process(study.pid), generator).send_signal(generator.choice(SIGNALS))
                    killed += 1
        code = study.wait()
        if code and generator.random() < 0.7:
            damaged += damage(output, generator)
    print(f"{killed} killed, {damaged} files damaged")
    assert killed >= kills // 2  # on a fast machine the study ends earlier
    assert damaged or kills < 60  # few kills may meet no checkpoint
    results = json.loads((output / "results.json").read_text())["results"]
    assert table(results) == undisturbed
    assert not list(output.rglob("*.part"))
