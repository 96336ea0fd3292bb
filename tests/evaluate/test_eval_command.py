"""`subquad eval`: result files, interruption, errors."""

import copy
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import subquad
from subquad import cli
from subquad.analysis.mixing_matrices import unpack_pairs
from subquad.evaluate import command, lm_eval, runner, suites
from subquad.evaluate.baselines import int8_teacher
from subquad.evaluate.perplexity import token_sums
from subquad.evaluate.results import Result, select
from subquad.evaluate.runner import EvalModel, Evaluation, evaluate, load_eval_model
from subquad.evaluate.suites import QUICK, STANDARD_SUITES, Settings, settings_for
from subquad.registry import SUITES
from subquad.utils import UserError, install_command
from tests.helpers.recipes import tiny_recipe
from tests.helpers.results import select_one

WINDOW = "teacher, window 4 + 4 sinks"
"""The uniform window of the students' bytes."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tiny teacher, its text, items, and an untrained student."""
    directory = tmp_path_factory.mktemp("workspace")
    tiny_recipe(directory)
    teacher, tokenizer = subquad.load_teacher(directory / "teacher")
    student = subquad.linearize(teacher, "gla")
    student.save_pretrained(directory / "student")
    tokenizer.save_pretrained(directory / "student")
    (directory / "items").mkdir()
    items = [{"context": "The red fox sees the old", "continuation": word} for word in ("tree", "stone")]
    (directory / "items" / "last.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return directory


def arguments(workspace, *more, corpus="text.txt", lengths="8,32"):
    text = ["--corpus", str(workspace / corpus), "--lengths", lengths]
    return ["eval", str(workspace / "student"), "--teacher", str(workspace / "teacher"), *text, *more]


def read(output):
    """The header and the results of an output directory."""
    found = json.loads((output / "results.json").read_text())
    return found, [Result(**values) for values in found["results"]]


def assert_documented(metrics, page):
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    named = {"win_and_tie@t" if metric.startswith("win_and_tie") else metric for metric in metrics}
    assert [metric for metric in named if f"`{metric}`" not in text and not metric.startswith("mass_")] == []


def test_quick_evaluation_writes_results(workspace, tmp_path, capsys):
    assert cli.main(arguments(workspace, "--data", str(workspace / "items"), "--output", str(tmp_path / "out"))) == 0
    header, found = read(tmp_path / "out")
    assert {"versions", "device", "recipe"} <= set(header)
    assert header["jobs"]["complete"]
    assert {result.model for result in found} == {"student", "teacher", WINDOW}
    metrics, of_window = ({(r.task, r.metric) for r in select(found, model=name)} for name in ("student", WINDOW))
    assert metrics - of_window - {("text.txt", "degradation_length")} == {("cache", "equal_window")}
    of_teacher = select(found, model="teacher")
    assert select_one(of_teacher, metric="kl").value == 0
    assert select_one(of_teacher, metric="top1_agreement").value == 1
    assert select_one(of_teacher, task="text.txt", metric="recovered_share").value == 1
    assert select_one(found, model="student", metric="kl").value > 0.01
    metrics = {result.metric for result in found}
    expected = {"perplexity", "bits_per_byte", "top5_agreement", "acc", "acc_generated", "chance", "common_prefix"}
    expected |= {"degenerate_rate", "perplexity_by_position", "prefill_seconds", "seconds_per_token", "cache_bytes"}
    assert expected <= metrics
    assert_documented(metrics, "evaluation.md")
    shown = capsys.readouterr().out
    assert "text.txt" in shown
    assert "student" in shown


RECALL_FIGURES = {"student-recall", "teacher-window-4-4-sinks-recall", "teacher-recall"}
DIAGNOSTIC_FIGURES = {"student-matrices", "student-decays", "cka"}


def test_recall_diagnostics_and_figures(workspace, tmp_path, capsys):
    (workspace / "long.txt").write_text((workspace / "text.txt").read_text() * 2)
    expected: set[str] = set()
    for suite, new in (
        ("recall", {"student-recall", "teacher-window-4-4-sinks-recall", "teacher-recall"}),
        ("recall,diagnostics", DIAGNOSTIC_FIGURES),
    ):
        more = ["--suite", suite, "--output", str(tmp_path / "out"), "--figures"]
        assert cli.main(arguments(workspace, *more, corpus="long.txt", lengths="128")) == 0
        expected |= {f"{name}.{kind}" for name in new for kind in ("svg", "png")}
        assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} == expected
    header, found = read(tmp_path / "out")
    assert header["jobs"]["failed"] == {}
    of_teacher = select(found, model="teacher", layer=None, head=None)
    assert select_one(of_teacher, metric="topk_mass_overlap").value == 1
    of_student = select(found, model="student", layer=None, head=None)
    assert select_one(of_student, metric="topk_mass_overlap").value < 0.99
    assert select(found, model="student", task="needle_number", metric="acc")
    assert select(found, model="student", task="without_layer", metric="loss", layer=1)
    assert_documented({result.metric for result in found if result.task != runner.CACHE}, "analysis.md")
    pairs = unpack_pairs(json.loads((tmp_path / "out" / "matrices" / "student.json").read_text())["heads"])
    for student, teacher in pairs.values():
        assert not student.equal(teacher)
        for M in (student, teacher):
            torch.testing.assert_close(M.sum(-1), torch.ones(len(M)), atol=2e-3, rtol=0)
            assert M.triu(1).abs().max() == 0
    assert "top-k mass" in capsys.readouterr().out


def test_finished_jobs_are_not_computed_again(workspace, tmp_path, monkeypatch, capsys):
    """After an interruption in the second job, the first is reused, and the results equal those of one run."""
    calls = []
    original = suites.long_context.position_losses

    def interrupted(model, ids, **kwargs):
        calls.append(len(ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(model, ids, **kwargs)

    monkeypatch.setattr(suites.long_context, "position_losses", interrupted)
    args = arguments(workspace, "--suite", "long", "--output", str(tmp_path / "out"))
    assert cli.main(args) == 130
    assert read(tmp_path / "out")[0]["jobs"] == {"complete": False, "finished": 1, "failed": {}}
    monkeypatch.setattr(suites.long_context, "position_losses", original)
    assert cli.main(args) == 0
    shown = capsys.readouterr().out
    assert "long context: student: finished already" in shown
    assert "long context: teacher: finished already" not in shown
    assert cli.main(arguments(workspace, "--suite", "long", "--output", str(tmp_path / "whole"))) == 0
    assert read(tmp_path / "out")[1] == read(tmp_path / "whole")[1]


def few_tokens(workspace):
    text = command.validation_text(str(workspace / "text.txt"), None).model_copy(update={"seq_len": 32})
    return Settings(suites=("language",), tokens=64, text=text)


def perplexity(model, settings, output):
    results, _ = evaluate([model], None, settings, output)
    return select_one(results, metric="perplexity").value


def test_changed_model_is_evaluated_again(workspace, tmp_path):
    teacher, tokenizer = subquad.load_teacher(workspace / "teacher")
    other, settings = subquad.linearize(teacher, "gla"), few_tokens(workspace)
    cases = ((teacher, "a"), (other, "a"), (other, "b"))
    models = [EvalModel("it", model, tokenizer, (identity,)) for model, identity in cases]
    first, stored, new = (perplexity(model, settings, tmp_path) for model in models)
    assert first == stored != new


def test_models_in_memory_are_known_by_their_content(workspace, tmp_path, monkeypatch):
    teacher, tokenizer = subquad.load_teacher(workspace / "teacher")
    settings, measured = few_tokens(workspace), []
    monkeypatch.setattr(suites, "token_sums", lambda *args: measured.append(args[0]) or token_sums(*args))

    def measure(model):
        return perplexity(EvalModel("it", model, tokenizer), settings, tmp_path)

    first = measure(teacher)
    other = copy.deepcopy(teacher)
    assert measure(other) == first
    assert len(measured) == 1  # equal content: the stored outcome
    with torch.no_grad():
        other.get_output_embeddings().weight[0, 0] += 1
    assert measure(other) != first
    assert measure(int8_teacher(teacher)) != first
    assert len(measured) == 3
    for name, value in (("FORMAT", runner.FORMAT + 1), ("LIBRARIES", ("lm-eval", "torch"))):
        monkeypatch.setattr(runner, name, value)
        runner.versions.cache_clear()
        assert measure(teacher) == first
    runner.versions.cache_clear()
    assert len(measured) == 5


def test_rows_of_two_tokenizers_in_memory_are_not_mixed_up(workspace):
    teacher, tokenizer = subquad.load_teacher(workspace / "teacher")
    other = copy.deepcopy(tokenizer)
    evaluation = Evaluation([EvalModel("it", teacher, tokenizer)], None, Settings(suites=()))
    assert evaluation.cached(EvalModel("a", teacher, tokenizer), "rows", lambda: 1) == 1
    assert evaluation.cached(EvalModel("b", teacher, other), "rows", lambda: 2) == 2


def test_identity_depends_on_the_files(workspace, tmp_path):
    directory = shutil.copytree(workspace / "student", tmp_path / "student")
    before = load_eval_model(str(directory)).identity
    assert load_eval_model(str(directory)).identity == before
    student = subquad.linearize(subquad.load_teacher(workspace / "teacher")[0], "retnet")
    student.save_pretrained(directory)
    assert load_eval_model(str(directory)).identity != before


ERRORS = {
    "suite": (["--suite", "quik"], "did you mean 'quick'"),
    "task": (["--tasks", "lst", "--data", "items"], "did you mean 'last'"),
    "data": (["--data", "nowhere"], "data: 'nowhere'"),
    "lengths": (["--lengths", "8,x"], "--lengths: got 'x'"),
    "short length": (["--lengths", "512,1"], "lengths: got [512, 1]"),
    "no length": (["--lengths", ""], "lengths: got []"),
    "limit": (["--limit", "0"], "--limit: got '0'"),
    "corpus": (["--corpus", "nothing.txt"], "nothing.txt"),
    "figures": (["--figures"], "--output DIR"),
    "tasks without their suite": (["--suite", "long", "--tasks", "last"], "expected zero-shot or generation"),
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_errors_are_found_before_a_model_is_loaded(workspace, name, capsys, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(command, "load_eval_model", lambda *a: pytest.fail("a model was loaded"))
    more, message = ERRORS[name]
    assert cli.main([*arguments(workspace), *more]) == 2
    assert message in capsys.readouterr().err


def test_tasks_of_the_hub_are_refused_at_once_without_a_network(workspace, capsys, monkeypatch):
    monkeypatch.setattr(lm_eval, "hub_problem", lambda: "the hub cannot be reached")
    monkeypatch.setattr(lm_eval, "any_dataset_cached", lambda: False)
    assert cli.main(arguments(workspace, "--suite", "zero-shot")) == 2
    err = capsys.readouterr().err
    assert err.startswith("subquad: tasks: the items of lambada_openai, arc_easy, ")
    assert "no network: the hub cannot be reached" in err
    assert err.count("\n") == 1


def test_tasks_whose_items_are_missing_are_named_without_a_network(monkeypatch, tmp_path):
    """Of other names than the default tasks, those of the hub that are not in the cache."""
    paths = {"local": "json", "file": str(tmp_path), "cached": "owner/cached", "missing": "owner/missing"}
    index = {name: SimpleNamespace(cfg={"dataset_path": path}) for name, path in paths.items()}
    monkeypatch.setattr(lm_eval, "task_manager", lambda include, defaults: SimpleNamespace(task_index=index))
    monkeypatch.setattr(lm_eval, "hub_problem", lambda: "the hub cannot be reached")
    monkeypatch.setattr(lm_eval, "is_dataset_cached", lambda name: name == "owner/cached")
    with pytest.raises(UserError, match="the items of missing are on the hub, and there is no network"):
        lm_eval.find_tasks(list(paths), None)
    assert [task.name for task in lm_eval.find_tasks(["local", "file", "cached"], None)] == ["local", "file", "cached"]


def test_missing_model_and_foreign_output_directory(workspace, capsys):
    assert cli.main(["eval", str(workspace / "studnet")]) == 2
    assert "studnet" in capsys.readouterr().err
    assert cli.main(arguments(workspace, "--output", str(workspace / "teacher"))) == 2
    assert "holds no evaluation" in capsys.readouterr().err


def test_different_vocabulary_is_refused(workspace):
    with pytest.raises(UserError, match="vocabularies"):
        command.run([str(workspace / "student")], teacher="nano", suites=["language"])


def test_teacher_and_text_come_from_the_students_recipe(workspace, tmp_path):
    student = shutil.copytree(workspace / "student", tmp_path / "student")
    shutil.copy(workspace / "recipe.yaml", student)
    report = command.run([str(student)], suites=["language"])
    assert {result.teacher for result in report.results} == {"teacher"}
    assert report.header["recipe"]["teacher"] == str(workspace / "teacher")


def test_failed_job_leaves_the_others(workspace, monkeypatch):
    monkeypatch.setattr(suites, "zero_shot", Mock(side_effect=UserError("no hub here")))
    options = {"corpus": str(workspace / "text.txt"), "data": str(workspace / "items")}
    report = command.run([str(workspace / "student")], suites=["language", "zero-shot"], **options)
    assert report.failed == {"zero-shot last: student": "no hub here"}
    assert select(report.results, metric="perplexity")


def test_exit_code_says_whether_a_part_failed(workspace, monkeypatch, capsys):
    argv = ["eval", str(workspace / "student"), "--suite", "language,zero-shot", "--data", str(workspace / "items")]
    argv += ["--corpus", str(workspace / "text.txt")]
    monkeypatch.setattr(suites, "zero_shot", Mock(side_effect=UserError("no hub here")))
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert err == "subquad: 1 part failed: zero-shot last: student\n"
    assert out.count("no hub here") == 1
    assert cli.main([*argv[:2], "--suite", "language", *argv[-2:]]) == 0


def test_json_is_all_that_is_on_stdout(workspace, monkeypatch, capsys):
    """lm-eval prints while it bootstraps."""
    monkeypatch.setattr(command, "evaluate", lambda *a: (print("bootstrapping"), ([], {}))[1])
    argv = [
        "eval",
        str(workspace / "student"),
        "--suite",
        "language",
        "--corpus",
        str(workspace / "text.txt"),
        "--json",
    ]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["results"] == []
    assert "bootstrapping" in err


def test_an_output_that_cannot_be_written_is_found_first(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_eval_model", lambda *a: pytest.fail("loaded a model"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output: .* cannot be written: "):
        command.run([str(workspace / "student")], output=str(tmp_path / "file" / "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_short_names_are_distinct(tmp_path):
    for name in ("a/gla", "b/gla"):
        (tmp_path / name).mkdir(parents=True)
    assert command.short_names([str(tmp_path / "a" / "gla"), "nano"]) == ["gla", "nano"]
    assert command.short_names([str(tmp_path / n / "gla") for n in "ab"]) == ["a/gla", "b/gla"]
    with pytest.raises(UserError, match="twice"):
        command.short_names(["nano", "nano"])


def test_suites():
    assert settings_for(["full"]).suites == STANDARD_SUITES
    assert settings_for(["long", "language"]) == Settings(suites=("language", "long"))
    assert settings_for(["quick"]) is QUICK
    with pytest.raises(UserError, match="quick"):
        settings_for(["quick", "long"])


def count_parameters(evaluation, model):
    return [Result("size", "parameters", evaluation.outcome("parameters", model, (), model.model.num_parameters))]


def test_suites_can_be_added(workspace, monkeypatch):
    monkeypatch.setitem(SUITES.objects, "size", count_parameters)
    report = command.run([str(workspace / "student")], suites=["size"], corpus=str(workspace / "text.txt"))
    expected = subquad.load_teacher(workspace / "student")[0].num_parameters()
    assert select_one(report.results, model="student", metric="parameters").value == expected


def test_several_students_with_one_teacher_and_json_as_the_only_output(workspace, tmp_path, capsys):
    teacher, tokenizer = subquad.load_teacher(workspace / "teacher")
    subquad.linearize(teacher, "retnet").save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    command, *more = arguments(workspace, "--suite", "language", "--json")
    assert cli.main([command, str(tmp_path / "other"), *more]) == 0
    found = select([Result(**row) for row in json.loads(capsys.readouterr().out)["results"]], metric="perplexity")
    assert [result.model for result in found] == ["other", "student", WINDOW, "teacher"]  # of equal bytes
    assert all(result.value > 1 for result in found)


def test_quick_without_items_says_so_below_the_table(workspace, monkeypatch):
    monkeypatch.setattr(command, "evaluate", lambda *a: ([], {}))
    note = "benchmarks (zero-shot) are left out: they need items, by --data DIR or --tasks NAME,NAME from the hub"
    options = {"corpus": str(workspace / "text.txt")}
    assert command.run([str(workspace / "student")], **options).table().splitlines()[-1] == note
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = command.run([str(workspace / "student")], **options).table().splitlines()[-1]
    assert found == note + f", and the extra: {install_command('eval')}"
    given = command.run([str(workspace / "student")], data=str(workspace / "items"), **options)
    assert "left out" not in given.table()
    assert "left out" not in command.run([str(workspace / "student")], suites=["language"], **options).table()


def test_limit_without_tasks_names_what_is_left_out(caplog):
    settings = replace(settings_for(("full",)), limit=5)
    with caplog.at_level("WARNING", "subquad"):
        assert "zero-shot" not in command.resolve_tasks(settings, None, None, None).suites
    assert "--tasks" in caplog.text
