"""A study in its directory: which runs there are, what is done again, what is shared, and what a failure costs."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from subquad.cli import main
from subquad.config import load_study
from subquad.distill import pipeline
from subquad.distill.progress import read_jsonl
from subquad.distill.stage_cache import StageCache
from subquad.evaluate import command
from subquad.evaluate.runner import ResultCache
from subquad.study import execute as work
from subquad.study import local_engine as processes
from subquad.study import lock
from subquad.study.grid import describe_plan, run_study, shared_stages
from subquad.study.lock import StudyLock
from subquad.study.ray_engine import share
from subquad.study.runs import find_runs
from subquad.study.scheduler import MAX_RETRIES, Scheduler
from subquad.study.table import format_study
from subquad.utils import UserError

SHORT = ["stages.matrix.tokens=128", "stages.hidden.tokens=192", "stages.end_to_end.tokens=128"]
TWO_ENDS = "stages.end_to_end=[{tokens: 128, lr: 1e-3, batch_size: 2}, {tokens: 192, lr: 1e-3, batch_size: 2}]"


def weights(place):
    return load_file(place / "model.safetensors")


def same(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def counted(monkeypatch):
    """The stages that are trained, as (directory, stage)."""
    trained = []
    train = pipeline.train_stage

    def count(name, stage, recipe, output, *rest):
        trained.append((output.name, name))
        return train(name, stage, recipe, output, *rest)

    monkeypatch.setattr(pipeline, "train_stage", count)
    return trained


def test_a_changed_recipe_runs_only_what_is_new(study_recipe, tmp_path, counted):
    alone = ["stages.matrix=null", "stages.end_to_end=null", "stages.hidden.tokens=128"]
    rows = run_study(load_study(study_recipe, [*alone, "student.mixer=[gla, retnet]"]), tmp_path)
    assert [row["run"] for row in rows] == ["gla", "retnet"]
    assert counted == [("gla", "hidden"), ("retnet", "hidden")]
    counted.clear()
    more = load_study(study_recipe, [*alone, "student.mixer=[gla, retnet]", "seed=[0, 1]"])
    rows = run_study(more, tmp_path)
    assert [row["run"] for row in rows] == ["gla", "gla-seed=1", "retnet", "retnet-seed=1"]
    assert [name for name, _ in counted] == ["gla-seed=1", "retnet-seed=1"]
    counted.clear()
    changed = load_study(study_recipe, [*alone, "student.mixer=gla", "stages.hidden.lr=2e-3"])
    (row,) = run_study(changed, tmp_path)
    assert row["run"] == f"gla-{changed[0].digest()[:8]}"
    assert len(counted) == 1
    counted.clear()
    (tmp_path / "gla").rename(tmp_path / "renamed")
    rows = run_study(load_study(study_recipe, [*alone, "student.mixer=[gla, retnet]"]), tmp_path)
    assert [row["run"] for row in rows] == ["renamed", "retnet"]
    assert counted == []


def test_shared_stages_are_trained_once_and_change_nothing(study_recipe, tmp_path, counted):
    recipes = load_study(study_recipe, [*SHORT[:2], TWO_ENDS])
    places = [run.directory for run in find_runs(recipes, tmp_path / "study")]
    run_study(recipes, tmp_path / "study")
    first, second = (place.name for place in places)
    assert counted == [(first, "matrix"), (first, "hidden"), (first, "end_to_end"), (second, "end_to_end")]
    assert not (tmp_path / "study" / ".stages").exists()
    for recipe, place in zip(recipes, places, strict=True):
        pipeline.distill(recipe, tmp_path / "alone")
        assert same(tmp_path / "alone", place)
        lines = [
            [(r["stage"], r["step"], r["loss"]) for r in read_jsonl(p / "metrics.jsonl")]
            for p in (tmp_path / "alone", place)
        ]
        assert lines[0] == lines[1]
        (tmp_path / "alone").rename(tmp_path / f"alone-{place.name}")


def test_stages_are_shared_by_those_alone_that_have_all_before_them_in_common(study_recipe):
    def keys(*overrides):
        (recipe,) = load_study(study_recipe, overrides)
        return pipeline.stage_keys(recipe)

    plain = keys()
    longer = keys("stages.end_to_end.tokens=4096")
    assert [plain[name] == longer[name] for name in pipeline.ORDER] == [True, True, False]
    for other in (
        "seed=1",
        "student.copy_qkv=false",
        "data.seq_len=16",
        "stages.matrix.lr=1",
        "evaluation.eval_tokens=64",
    ):
        assert not set(plain.values()) & set(keys(other).values())
    # Past UNIGRAM_TOKENS an epoch is as long as the run, and so is the order of its rows.
    assert not set(plain.values()) & set(keys("stages.end_to_end.tokens=300000").values())


def test_a_run_that_has_come_further_takes_nothing(tmp_path):
    shared = StageCache(tmp_path / "stages", frozenset({"a", "b"}))
    (tmp_path / "stages" / "a").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "hidden-done").mkdir(parents=True)
    shared.restore({"matrix": "a", "hidden": "b"}, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["hidden-done"]


def test_a_failed_run_is_shown_and_stops_no_other(study_recipe, tmp_path, capsys, monkeypatch):
    distill = work.distill

    def fail(recipe, *rest):
        if recipe.student.mixer == "gla":
            raise RuntimeError("no luck\ntoday")
        return distill(recipe, *rest)

    argv = ["study", str(study_recipe), "-o", str(tmp_path / "s"), "--set", "student.mixer=[gla, retnet]"]
    argv += [part for text in SHORT for part in ("--set", text)]
    with monkeypatch.context() as patch:
        patch.setattr(work, "distill", fail)
        assert main(argv) == 1
    out = capsys.readouterr().out
    assert "gla failed: RuntimeError: no luck" in out
    assert "1 of 2 runs failed" in out
    error = json.loads((tmp_path / "s" / "gla" / "error.json").read_text())
    assert (error["type"], error["message"]) == ("RuntimeError", "no luck\ntoday")
    assert "in fail" in error["traceback"]
    results = json.loads((tmp_path / "s" / "results.json").read_text())
    assert [row["run"] for row in results["rows"]] == ["retnet"]
    assert [state["state"] for state in results["runs"]] == ["failed", "finished"]
    assert main([*argv, "--show"]) == 1
    shown = capsys.readouterr().out
    assert "retnet" in shown
    assert "gla failed: RuntimeError: no luck" in shown
    assert main(argv) == 0
    assert not (tmp_path / "s" / "gla" / "error.json").exists()
    assert [run.state for run in find_runs(load_study(study_recipe, SHORT), tmp_path / "s")] == ["finished"]


def test_results_are_a_database(study_recipe, tmp_path):
    rows = run_study(load_study(study_recipe, [*SHORT, "seed=[0,1]"]), tmp_path)
    with sqlite3.connect(tmp_path / "results.sqlite") as base:
        runs = base.execute("SELECT run, state, mixer, stages, seed, tokens FROM runs ORDER BY seed").fetchall()
        found = base.execute("SELECT value FROM rows WHERE metric = 'perplexity' ORDER BY run").fetchall()
        mean = base.execute(
            "SELECT mixer, avg(value), count(*) FROM rows JOIN runs USING (run) WHERE metric = 'kl' GROUP BY mixer"
        ).fetchone()
    assert [run[1:5] for run in runs] == [("finished", "gla", "matrix,hidden,end_to_end", seed) for seed in (0, 1)]
    assert [value for (value,) in found] == [row["perplexity"] for row in rows]
    assert mean == ("gla", pytest.approx(sum(row["kl"] for row in rows) / 2), 2)


def test_evaluation_joins_the_results(study_recipe, tmp_path, capsys):
    argv = ["study", str(study_recipe), "-o", str(tmp_path / "s"), "--evaluate", "language"]
    argv += [part for text in SHORT for part in ("--set", text)]
    assert main(argv) == 0, capsys.readouterr()
    with sqlite3.connect(tmp_path / "s" / "results.sqlite") as base:
        models = base.execute("SELECT DISTINCT run FROM rows WHERE source = 'evaluation'").fetchall()
    assert {"gla", "teacher"} <= {name for (name,) in models}
    assert main([*argv[:-1], "seed=[0,1]", "--evaluate", "nonsense"]) == 2
    assert "unknown suite 'nonsense'" in capsys.readouterr().err


def test_an_evaluation_holds_one_student_at_a_time_and_measures_the_teacher_once(study_recipe, tmp_path, monkeypatch):
    asked, computed = [], []
    run, compute = command.run, ResultCache.run

    def one_by_one(models, **rest):
        asked.append(len(models))
        return run(models, **rest)

    def note(self, part):
        computed.append(part.name)
        compute(self, part)

    monkeypatch.setattr(command, "run", one_by_one)
    monkeypatch.setattr(ResultCache, "run", note)
    recipes = load_study(study_recipe, [*SHORT, "seed=[0,1]"])
    run_study(recipes, tmp_path, suites=["language"])
    assert asked == [1, 1]
    assert len(computed) == len(set(computed)) == 4  # two students, the teacher, its unigram
    rows = json.loads((tmp_path / "evaluation" / "results.json").read_text())["rows"]
    assert len({row["model"] for row in rows}) == 3
    assert len({(row["model"], row["metric"]) for row in rows}) == len(rows)


def test_a_plan_tells_tokens_and_invents_no_time(study_recipe, tmp_path, capsys):
    argv = ["study", str(study_recipe), "-o", str(tmp_path / "s"), "--dry-run", "--set", TWO_ENDS]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "s").exists()
    # both need matrix (512) and hidden (768), which are trained once
    assert "2 runs, 2 to do, 2k tokens; time unknown" in out
    assert [line.split()[-2:] for line in out.splitlines()[1:3]] == [["1k", "unknown"], ["192", "unknown"]]
    recipes = load_study(study_recipe, [TWO_ENDS])
    run_study(recipes[:1], tmp_path / "s")
    plan = describe_plan(recipes, tmp_path / "s")
    assert "2 runs, 1 to do" in plan
    assert "of training at the speed that runs here have shown" in plan


def test_what_is_wrong_is_told_before_anything_is_loaded(study_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "load_teacher", lambda *a: pytest.fail("loaded a teacher"))
    recipes = load_study(study_recipe)
    with pytest.raises(UserError, match="jobs: got 0"):
        run_study(recipes, tmp_path / "s", jobs=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run_study(recipes, tmp_path / "file")
    with pytest.raises(UserError, match="neither a file"):
        run_study(load_study(study_recipe, ["teacher=nowhere"]), tmp_path / "s")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"subquad\[cluster\]"):
        run_study(recipes, tmp_path / "s", engine="ray")


def test_tensorboard_gets_every_run(study_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    short = ["stages.matrix=null", "stages.end_to_end=null", "stages.hidden.tokens=192", "report_to=tensorboard"]
    for row in run_study(load_study(study_recipe, [*short, "seed=[0,1]"]), tmp_path):
        events = EventAccumulator(str(tmp_path / row["run"] / "tensorboard" / "hidden"))
        events.Reload()
        logged = [r["loss"] for r in read_jsonl(tmp_path / row["run"] / "metrics.jsonl")]
        assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)


# ---------------------------------------------------------------------- the lock

HOLD = """
import sys, time
from pathlib import Path
from subquad.study.lock import StudyLock
with StudyLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_directory_in_use_is_refused_until_its_holder_is_killed(study_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"another study is at work in .*process {holder.pid}"):
            run_study(load_study(study_recipe), tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    with StudyLock(tmp_path):
        pass


# ---------------------------------------------------------------------- which may run at once


def tasks(study_recipe, output, *overrides):
    runs = find_runs(load_study(study_recipe, overrides), output)
    shared = shared_stages(runs, output)
    return [work.Task(run, shared) for run in runs]


def test_a_run_waits_for_a_stage_that_another_trains(study_recipe, tmp_path):
    one, two = tasks(study_recipe, tmp_path, TWO_ENDS)
    (other,) = tasks(study_recipe, tmp_path, "student.mixer=retnet")
    board = Scheduler([one, two, other])
    assert board.next() is one
    assert board.next() is other
    assert board.next() is None
    for key in one.common():
        (one.shared.directory / key).mkdir(parents=True)
    assert board.next() is two
    for task in (one, two, other):
        board.end(task)
    assert not board


def test_a_run_whose_process_dies_again_and_again_has_failed(study_recipe, tmp_path):
    (task,) = tasks(study_recipe, tmp_path)
    board = Scheduler([task])
    for _ in range(MAX_RETRIES):
        assert board.next() is task
        board.on_worker_exit(task, "by signal 9")
    assert not board
    assert task.run.state == "failed"
    assert "by signal 9" in task.run.error()["message"]


def test_cores_are_divided(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [processes.threads_each(jobs) for jobs in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert processes.threads_each(2) == 2


def test_a_runs_share_of_a_cluster():
    def machine(alive=True, **resources):
        return {"Alive": alive, "Resources": resources}

    plain = [machine(CPU=16), machine(CPU=8), machine(CPU=0), machine(alive=False, CPU=1)]
    assert share(plain, 1) == {"num_cpus": 8}
    assert share(plain, 3) == {"num_cpus": 2}
    assert share(plain, 100) == {"num_cpus": 1}
    assert share([*plain, machine(CPU=16, GPU=8)], 1) == {"num_cpus": 1, "num_gpus": 1}
    assert share([machine(CPU=16, GPU=2)], 4) == {"num_cpus": 1, "num_gpus": 0.5}
    with pytest.raises(UserError, match="no machine with a CPU"):
        share([machine(CPU=0)], 1)


@pytest.mark.slow
@pytest.mark.sample
def test_several_at_once_end_as_one_after_the_other_though_a_worker_is_killed(study_recipe, tmp_path, monkeypatch):
    recipes = load_study(study_recipe, [*SHORT, "student.mixer=[gla, retnet, metala]"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = run_study(recipes, tmp_path / "one")
    killed = []
    start = processes.start_worker

    def started(slot, jobs, lock):
        worker = start(slot, jobs, lock)
        killed.append(worker)
        return worker

    monkeypatch.setattr(processes, "start_worker", started)
    end = processes.wait

    def wait(connections, timeout=None):
        if len(killed) == 2 and (tmp_path / "several" / "gla" / "metrics.jsonl").exists():
            killed[0].process.kill()
            killed.append(None)
        return end(connections, 0.05)

    monkeypatch.setattr(processes, "wait", wait)
    rows = run_study(recipes, tmp_path / "several", jobs=2)
    assert len([worker for worker in killed if worker is not None]) == 3
    for row, other in zip(expected, rows, strict=True):
        assert same(tmp_path / "one" / row["run"], tmp_path / "several" / other["run"])
        assert row["perplexity"] == other["perplexity"]


def test_live_lines_tell_what_is_done_and_left(study_recipe, tmp_path):
    lines = []
    recipes = load_study(study_recipe, [*SHORT, "seed=[0,1]"])
    run_study(recipes, tmp_path, say=lines.append, interval=0.2)
    assert any(line.startswith("[1/2] gla-seed=0: perplexity") for line in lines)
    assert any(line.startswith("[2/2] gla-seed=1: perplexity") for line in lines)
    assert any("0 of 2 done, 1 running (gla-seed=0" in line for line in lines)
    assert any("loss" in line and "tok/s" in line and "left" in line for line in lines)
    assert "gla-seed=1" in format_study(find_runs(recipes, tmp_path))


def test_interrupted_it_goes_on(study_recipe, tmp_path, monkeypatch):
    recipes = load_study(study_recipe, [*SHORT, "student.mixer=[gla, retnet]"])

    def stop(task, teachers):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(processes, "run_task", stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(recipes, tmp_path)
    assert "no run is finished yet" in format_study(find_runs(recipes, tmp_path))
    assert len(run_study(recipes, tmp_path)) == 2
