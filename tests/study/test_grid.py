"""A study and its directory: run identity, shared stages, failures, results, evaluation and the lock."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from subquad import utils
from subquad.cli import main
from subquad.config import load_study
from subquad.distill import pipeline
from subquad.distill.logging_callbacks import read_jsonl
from subquad.distill.recipe_stages import STAGE_NAMES, StageCache, stage_keys
from subquad.evaluate import command
from subquad.evaluate.runner import Evaluation
from subquad.modeling import teachers
from subquad.study import engines
from subquad.study.grid import run_study
from subquad.study.progress import describe_remaining_work, format_study, result_notes
from subquad.study.runs import find_runs
from subquad.utils import UserError, exclusive
from tests.helpers.studies import HIDDEN_ONLY, SHORT, TWO_LAST_STAGES, same_weights, study_command


@pytest.fixture
def trained_stages(monkeypatch):
    """The stages that are trained, as (run name, stage)."""
    trained = []
    train = pipeline.DistillationRun.train_stage

    def record(run, name):
        trained.append((run.directory.name, name))
        train(run, name)

    monkeypatch.setattr(pipeline.DistillationRun, "train_stage", record)
    return trained


def test_a_changed_recipe_trains_only_new_runs(study_recipe, tmp_path, trained_stages):
    results = run_study(load_study(study_recipe, [*HIDDEN_ONLY, "student.mixer=[gla, retnet]"]), tmp_path)
    assert [result["run"] for result in results] == ["gla", "retnet"]
    assert trained_stages == [("gla", "hidden"), ("retnet", "hidden")]
    trained_stages.clear()
    more = load_study(study_recipe, [*HIDDEN_ONLY, "student.mixer=[gla, retnet]", "seed=[0, 1]"])
    results = run_study(more, tmp_path)
    assert [result["run"] for result in results] == ["gla", "gla-seed=1", "retnet", "retnet-seed=1"]
    assert [name for name, _ in trained_stages] == ["gla-seed=1", "retnet-seed=1"]
    trained_stages.clear()
    changed = load_study(study_recipe, [*HIDDEN_ONLY, "student.mixer=gla", "stages.hidden.lr=2e-3"])
    (result,) = run_study(changed, tmp_path)
    assert result["run"] == f"gla-{changed[0].digest()[:8]}"
    assert len(trained_stages) == 1
    trained_stages.clear()
    (tmp_path / "gla").rename(tmp_path / "renamed")
    results = run_study(load_study(study_recipe, [*HIDDEN_ONLY, "student.mixer=[gla, retnet]"]), tmp_path)
    assert [result["run"] for result in results] == ["renamed", "retnet"]
    assert trained_stages == []


def test_shared_stages_are_trained_once_and_give_the_same_students(study_recipe, tmp_path, trained_stages):
    recipes = load_study(study_recipe, [*SHORT[:2], TWO_LAST_STAGES])
    directories = [run.directory for run in find_runs(recipes, tmp_path / "study")]
    run_study(recipes, tmp_path / "study")
    first, second = (directory.name for directory in directories)
    assert trained_stages == [(first, "matrix"), (first, "hidden"), (first, "end_to_end"), (second, "end_to_end")]
    assert not (tmp_path / "study" / ".stages").exists()
    for recipe, directory in zip(recipes, directories, strict=True):
        alone = tmp_path / f"alone-{directory.name}"
        pipeline.distill(recipe, alone)
        assert same_weights(alone, directory)
        losses = [
            [(line["stage"], line["step"], line["loss"]) for line in read_jsonl(path / "metrics.jsonl")]
            for path in (alone, directory)
        ]
        assert losses[0] == losses[1]


def test_stage_keys_depend_on_everything_up_to_the_stage(study_recipe):
    def keys(*overrides):
        (recipe,) = load_study(study_recipe, overrides)
        return stage_keys(recipe)

    base = keys()
    longer = keys("stages.end_to_end.tokens=4096")
    assert [base[name] == longer[name] for name in STAGE_NAMES] == [True, True, False]
    others = "seed=1 student.copy_qkv=false data.seq_len=16 stages.matrix.lr=1 evaluation.eval_tokens=64"
    for other in others.split():
        assert not set(base.values()) & set(keys(other).values())
    # Beyond UNIGRAM_TOKENS the length of an epoch, and with it the order of the rows, depends on the whole run.
    assert not set(base.values()) & set(keys("stages.end_to_end.tokens=300000").values())


def test_a_later_stage_of_the_run_is_not_replaced_by_a_cached_one(tmp_path):
    stage_cache = StageCache(tmp_path / "stages", frozenset({"a", "b"}))
    (tmp_path / "stages" / "a").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "hidden-done").mkdir(parents=True)
    stage_cache.restore({"matrix": "a", "hidden": "b"}, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["hidden-done"]


def test_a_failed_run_is_reported_and_does_not_stop_others(study_recipe, tmp_path, capsys, monkeypatch):
    distill = pipeline.distill

    def fail(recipe, *rest):
        if recipe.student.mixer == "gla":
            raise RuntimeError("no luck\ntoday")
        return distill(recipe, *rest)

    argv = study_command(study_recipe, tmp_path / "s", "student.mixer=[gla, retnet]", *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "distill", fail)
        assert main(argv) == 1
    out = capsys.readouterr().out
    assert "gla failed: RuntimeError: no luck" in out
    assert "1 of 2 runs failed" in out
    error = json.loads((tmp_path / "s" / "gla" / "error.json").read_text())
    assert (error["type"], error["message"]) == ("RuntimeError", "no luck\ntoday")
    assert "in fail" in error["traceback"]
    results = json.loads((tmp_path / "s" / "results.json").read_text())
    assert [result["run"] for result in results["results"]] == ["retnet"]
    assert [state["state"] for state in results["runs"]] == ["failed", "finished"]
    assert main([*argv, "--show"]) == 1
    shown = capsys.readouterr().out
    assert "retnet" in shown
    assert "gla failed: RuntimeError: no luck" in shown
    assert main(argv) == 0
    assert not (tmp_path / "s" / "gla" / "error.json").exists()
    assert [run.state for run in find_runs(load_study(study_recipe, SHORT), tmp_path / "s")] == ["finished"]


def test_results_are_written_to_a_database(study_recipe, tmp_path):
    results = run_study(load_study(study_recipe, [*SHORT, "seed=[0,1]"]), tmp_path)
    with sqlite3.connect(tmp_path / "results.sqlite") as database:
        runs = database.execute("SELECT run, state, mixer, stages, seed, tokens FROM runs ORDER BY seed").fetchall()
        values = database.execute("SELECT value FROM results WHERE metric = 'perplexity' ORDER BY run").fetchall()
        mean = database.execute(
            "SELECT mixer, avg(value), count(*) FROM results JOIN runs USING (run) WHERE metric = 'kl' GROUP BY mixer"
        ).fetchone()
    assert [run[1:5] for run in runs] == [("finished", "gla", "matrix,hidden,end_to_end", seed) for seed in (0, 1)]
    assert [value for (value,) in values] == [result["perplexity"] for result in results]
    assert mean == ("gla", pytest.approx(sum(result["kl"] for result in results) / 2), 2)


def test_evaluation_results_are_in_the_database(study_recipe, tmp_path, capsys):
    argv = study_command(study_recipe, tmp_path / "s", *SHORT)
    assert main([*argv, "--evaluate", "language"]) == 0, capsys.readouterr()
    with sqlite3.connect(tmp_path / "s" / "results.sqlite") as database:
        models = database.execute("SELECT DISTINCT run FROM results WHERE source = 'evaluation'").fetchall()
    assert {"gla", "teacher"} <= {name for (name,) in models}
    assert main([*argv, "--evaluate", "nonsense"]) == 2
    assert "'nonsense'" in capsys.readouterr().err


def test_students_are_evaluated_one_at_a_time_and_the_teacher_once(study_recipe, tmp_path, monkeypatch):
    model_counts, computed = [], []
    evaluate, outcome = command.run, Evaluation.outcome

    def count_models(models, **rest):
        model_counts.append(len(models))
        return evaluate(models, **rest)

    def record_job(self, name, model, dependencies, compute):
        return outcome(self, name, model, dependencies, lambda: computed.append((name, model.name)) or compute())

    monkeypatch.setattr(command, "run", count_models)
    monkeypatch.setattr(Evaluation, "outcome", record_job)
    recipes = load_study(study_recipe, [*SHORT, "seed=[0,1]"])
    run_study(recipes, tmp_path, suites=["language"])
    assert model_counts == [1, 1]
    assert len(computed) == len(set(computed)) == 5  # two students, their window, the teacher, its unigram
    rows = json.loads((tmp_path / "evaluation" / "results.json").read_text())["results"]
    assert len({row["model"] for row in rows}) == 4
    assert len({(row["model"], row["metric"]) for row in rows}) == len(rows)


def test_dry_run_lists_tokens_and_does_not_invent_a_time(study_recipe, tmp_path, capsys):
    assert main([*study_command(study_recipe, tmp_path / "s", TWO_LAST_STAGES), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "s").exists()
    # Both runs need matrix (512 tokens) and hidden (768 tokens), which are trained once.
    assert "2 runs, 2 to do, 1.60k tokens; time unknown" in out
    assert [line.split()[-2:] for line in out.splitlines()[2:4]] == [["1.41k", "unknown"], ["192", "unknown"]]
    recipes = load_study(study_recipe, [TWO_LAST_STAGES])
    run_study(recipes[:1], tmp_path / "s")
    description = describe_remaining_work(recipes, tmp_path / "s")
    assert "2 runs, 1 to do" in description
    assert "of training at the speed measured in this directory" in description


def test_invalid_arguments_are_refused_before_a_teacher_is_loaded(study_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "load_teacher", lambda *a: pytest.fail("loaded a teacher"))
    recipes = load_study(study_recipe)
    with pytest.raises(UserError, match="jobs: got 0"):
        run_study(recipes, tmp_path / "s", jobs=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output: got the file"):
        run_study(recipes, tmp_path / "file")
    with pytest.raises(UserError, match="nowhere"):
        run_study(load_study(study_recipe, ["teacher=nowhere"]), tmp_path / "s")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"\.\[cluster\]"):
        run_study(recipes, tmp_path / "s", engine="ray")


def test_every_run_reports_to_tensorboard(study_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = [*HIDDEN_ONLY, "report_to=tensorboard", "seed=[0,1]"]
    for result in run_study(load_study(study_recipe, overrides), tmp_path):
        events = EventAccumulator(str(tmp_path / result["run"] / "tensorboard" / "hidden"))
        events.Reload()
        logged = [line["loss"] for line in read_jsonl(tmp_path / result["run"] / "metrics.jsonl")]
        assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)


# ---------------------------------------------------------------------- the lock

HOLD_LOCK = """
import sys, time
from pathlib import Path
from subquad.utils import exclusive
with exclusive(Path(sys.argv[1], ".lock"), "study", Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_locked_directory_is_refused_until_its_owner_is_killed(study_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "LOCK_TIMEOUT", 0.3)
    owner = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {owner.pid}"):
            run_study(load_study(study_recipe), tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".owner"]
    finally:
        owner.kill()
        owner.wait()
    with exclusive(tmp_path / ".lock", "study", tmp_path):
        pass


def test_status_lines_report_done_running_and_remaining(study_recipe, tmp_path):
    lines = []
    recipes = load_study(study_recipe, [*SHORT, "seed=[0,1]"])
    run_study(recipes, tmp_path, log=lines.append, interval=0.2)
    assert any(line.startswith("[1/2] gla-seed=0: perplexity") for line in lines)
    assert any(line.startswith("[2/2] gla-seed=1: perplexity") for line in lines)
    assert any("0 of 2 done, 1 running (gla-seed=0" in line for line in lines)
    assert any("loss" in line and "tok/s" in line and "left" in line for line in lines)
    assert "gla-seed=1" in format_study(find_runs(recipes, tmp_path))


def test_an_interrupted_study_continues(study_recipe, tmp_path, monkeypatch):
    recipes = load_study(study_recipe, [*SHORT, "student.mixer=[gla, retnet]"])

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engines, "execute_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_study(recipes, tmp_path)
    assert "no run is finished yet" in format_study(find_runs(recipes, tmp_path))
    assert len(run_study(recipes, tmp_path)) == 2


def test_the_recipe_of_published_results_gives_their_runs():
    recipes = load_study(Path(__file__).parents[2] / "results" / "nano" / "recipe.yaml")
    assert len(recipes) == 144


def test_results_that_surprise_have_notes():
    """A student that training made worse, and one that is better than its teacher."""
    plain = {"mixer": "gla", "kl_at_init": 1.0, "kl": 0.5, "recovered_share": 0.9}
    assert result_notes([plain]) == []
    worse, better = {**plain, "mixer": "xlstm", "kl": 1.25}, {**plain, "mixer": "kda", "recovered_share": 1.02}
    first, second = result_notes([plain, worse, better])
    assert first.startswith("! xlstm: training made it worse: ")
    assert "its KL from the teacher was 1.000 and is 1.250 nats per token" in first
    assert second == "recovered above 100% (kda): a lower loss than the teacher's on the validation text"
