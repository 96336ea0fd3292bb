"""Several processes at the files of a study: shared stages, the report, names of directories."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from subquad.config import load_study
from subquad.distill.checkpoints import damage, seal
from subquad.distill.recipe_stages import StageCache
from subquad.report.page import write_report
from subquad.study.runs import find_runs
from tests.helpers.studies import HIDDEN_ONLY, study_command
from tests.helpers.together import run_together

KEYS = {"matrix": "a", "hidden": "b"}


def write_stage(directory: Path, content: str) -> None:
    directory.mkdir(parents=True)
    for name in ("initial.json", "metrics.jsonl", *map(str, range(200))):
        (directory / name).write_text(content)
    (directory / "done.json").write_text(json.dumps({"seconds": 1}))
    seal(directory)


def test_four_processes_save_and_take_a_shared_stage(tmp_path):
    """What they save is equal in a study; here it differs, so that a mixture would be seen."""
    stages = StageCache(tmp_path / "stages", frozenset(KEYS.values()))

    def save_and_take(index):
        for key in KEYS.values():
            write_stage(tmp_path / f"{index}-{key}", f"{index} {key}")
        for key in KEYS.values():
            stages.save(key, tmp_path / f"{index}-{key}")
            run = tmp_path / f"run-{index}-{key}"
            run.mkdir()
            stages.restore(KEYS, run)

    assert run_together(4, save_and_take) == [0, 0, 0, 0]
    assert sorted(path.name for path in stages.directory.iterdir()) == ["a", "b"]
    taken = [*stages.directory.iterdir(), *tmp_path.glob("run-*/checkpoints/*-done")]
    assert len(taken) == 2 + 8
    assert [damage(directory, "done.json") for directory in taken] == [None] * len(taken)
    assert {len([*directory.iterdir()]) for directory in taken} == {204}


@pytest.mark.slow
def test_the_report_is_drawn_while_the_study_runs(study_recipe, tmp_path):
    command = study_command(study_recipe, tmp_path, *HIDDEN_ONLY, "student.mixer=[gla,retnet]", "seed=[0,1]")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    study = subprocess.Popen(
        [sys.executable, "-m", "subquad.cli", *command], stdout=subprocess.DEVNULL, env=environment
    )
    drawn, counts = 0, set()
    try:
        while study.poll() is None:
            if (tmp_path / "results.json").exists():
                page = write_report(tmp_path).read_text()
                counts |= {n for n in range(5) if f"{n} of 4 finished" in page}
                drawn += 1
    finally:
        study.kill()
        study.wait()
    assert study.returncode == 0
    assert drawn >= 2
    assert min(counts) < 4
    assert "4 of 4 finished" in write_report(tmp_path).read_text()


HOSTILE = ["../../outside/teacher", "..", "/etc/teacher", "a/b", "a\\b", "-rf", ".lock", "x" * 300, "na\u00efve\n"]


def test_no_value_of_a_recipe_leads_out_of_the_output(study_recipe, tmp_path):
    output = tmp_path / "deep" / "study"
    for key in ("teacher", "data.source", "data.validation"):
        runs = find_runs(load_study(study_recipe, [f"{key}={json.dumps(HOSTILE)}"]), output)
        assert len({run.directory for run in runs}) == len(HOSTILE)
        for run in runs:
            run.fail("UserError", "hostile")
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["study"]
    names = {path.name for path in output.iterdir()}
    assert len(names) == 3 * len(HOSTILE)
    assert all(path.parent.parent == output for path in output.rglob("error.json"))
    assert max(map(len, names)) < 128
