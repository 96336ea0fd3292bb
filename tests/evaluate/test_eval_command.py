"""`subquad eval` as a user runs it: results on disk, interruptions, mistakes."""

import json

import pytest
import torch
from workshop import tiny_recipe

import subquad
from subquad import cli
from subquad.analysis.saved_matrices import unpack
from subquad.evaluate import command
from subquad.evaluate import jobs as plan
from subquad.evaluate.results import Result, one, select
from subquad.evaluate.runner import evaluate, load_eval_model
from subquad.evaluate.suites import PARTS, QUICK, Settings, settings_of
from subquad.evaluate.table import tables
from subquad.utils import UserError


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A tiny teacher, its text, items, and an untrained student."""
    place = tmp_path_factory.mktemp("shop")
    tiny_recipe(place)
    teacher, tokenizer = subquad.load_teacher(place / "teacher")
    student = subquad.linearize(teacher, "gla")
    student.save_pretrained(place / "student")
    tokenizer.save_pretrained(place / "student")
    (place / "items").mkdir()
    items = [{"context": "The red fox sees the old", "continuation": word} for word in ("tree", "stone")]
    (place / "items" / "last.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return place


def arguments(shop, *more, models=("student",)):
    names = [str(shop / name) for name in models]
    text = ["--corpus", str(shop / "text.txt"), "--lengths", "8,32"]
    return ["eval", *names, "--teacher", str(shop / "teacher"), *text, *more]


def test_a_quick_evaluation_on_disk(shop, tmp_path, capsys):
    assert cli.main(arguments(shop, "--data", str(shop / "items"), "--output", str(tmp_path / "out"))) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"versions", "device", "recipe", "rows"} <= set(results)
    assert results["parts"]["planned"] == results["parts"]["finished"]
    rows = [Result.from_dict(row) for row in results["rows"]]
    assert {row.model for row in rows} == {"student", "teacher"}
    of_teacher = select(rows, model="teacher")
    assert one(of_teacher, metric="kl").value == 0
    assert one(of_teacher, metric="top1_agreement").value == 1
    assert one(of_teacher, task="text.txt", metric="recovered_share").value == 1
    assert one(select(rows, model="student"), metric="kl").value > 0.01
    metrics = {row.metric for row in rows}
    assert {
        "perplexity",
        "bits_per_byte",
        "top5_agreement",
        "acc",
        "acc_generated",
        "chance",
        "common_prefix",
        "degenerate",
        "perplexity_by_position",
        "prefill_seconds",
        "seconds_per_token",
        "cache_bytes",
    } <= metrics
    shown = capsys.readouterr().out
    assert "text.txt" in shown
    assert "student" in shown


def test_recall_diagnostics_and_pictures(shop, tmp_path, capsys):
    (shop / "long.txt").write_text((shop / "text.txt").read_text() * 2)
    args = ["eval", str(shop / "student"), "--teacher", str(shop / "teacher"), "--corpus", str(shop / "long.txt")]
    args += ["--suite", "recall,diagnostics", "--lengths", "128", "--output", str(tmp_path / "out"), "--figures"]
    assert cli.main(args) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["parts"]["failed"] == {}
    rows = [Result.from_dict(row) for row in results["rows"]]
    of_teacher = select(rows, model="teacher", layer=None, head=None)
    assert one(of_teacher, metric="overlap").value == 1
    of_student = select(rows, model="student", layer=None, head=None)
    assert one(of_student, metric="overlap").value < 0.99
    assert select(rows, model="student", task="needle_number", metric="acc")
    assert select(rows, model="student", task="without_layer", metric="loss", layer=1)
    kept = unpack(json.loads((tmp_path / "out" / "matrices" / "student.json").read_text())["heads"])
    for ours, theirs in kept.values():
        assert not ours.equal(theirs)
        for M in (ours, theirs):
            torch.testing.assert_close(M.sum(-1), torch.ones(len(M)), atol=2e-3, rtol=0)
            assert M.triu(1).abs().max() == 0
    drawn = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    expected = {"student-matrices", "student-decays", "student-recall", "teacher-recall", "cka"}
    assert drawn == {f"{name}.{kind}" for name in expected for kind in ("svg", "png")}
    assert "overlap" in capsys.readouterr().out


def test_json_is_all_that_stands_on_stdout(shop, capsys):
    assert cli.main(arguments(shop, "--suite", "language", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert one([Result.from_dict(row) for row in found["rows"]], model="student", metric="perplexity").value > 1


def test_finished_parts_are_not_computed_again(shop, tmp_path, monkeypatch, capsys):
    """Interrupted in the third part, and run again: two are kept, and the rows are those of an undisturbed run."""
    calls = []
    plain = plan.long_context.position_losses

    def interrupted(model, ids, **kwargs):
        calls.append(len(ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(model, ids, **kwargs)

    monkeypatch.setattr(plan.long_context, "position_losses", interrupted)
    args = arguments(shop, "--suite", "long", "--output", str(tmp_path / "out"))
    assert cli.main(args) == 130
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["parts"] == {"planned": 2, "finished": 1, "failed": {}}
    monkeypatch.setattr(plan.long_context, "position_losses", plain)
    assert cli.main(args) == 0
    assert "1 of 2 parts are finished already" in capsys.readouterr().out
    whole = arguments(shop, "--suite", "long", "--output", str(tmp_path / "whole"))
    assert cli.main(whole) == 0
    rows = [json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("out", "whole")]
    assert rows[0] == rows[1]


def test_a_model_that_changed_is_measured_anew(shop, tmp_path):
    settings = QUICK.__class__(parts=("language",), tokens=64)
    teacher, tokenizer = subquad.load_teacher(shop / "teacher")
    from dataclasses import replace

    settings = replace(
        settings, text=command.corpus_of(str(shop / "text.txt"), None).model_copy(update={"seq_len": 32})
    )

    def perplexity(identity, model):
        subject = plan.EvalModel("it", model, tokenizer, (identity,))
        rows, _ = evaluate([subject], None, settings, tmp_path / "out")
        return one(rows, metric="perplexity").value

    first = perplexity("a", teacher)
    other = subquad.linearize(teacher, "gla")
    assert perplexity("a", other) == first  # as if it were the same
    assert perplexity("b", other) != first


def test_identity_follows_the_files(shop, tmp_path):
    import shutil

    place = tmp_path / "student"
    shutil.copytree(shop / "student", place)
    before = load_eval_model(str(place)).identity
    assert load_eval_model(str(place)).identity == before
    student = subquad.linearize(subquad.load_teacher(shop / "teacher")[0], "retnet")
    student.save_pretrained(place)
    assert load_eval_model(str(place)).identity != before


MISTAKES = {
    "suite": (["--suite", "quik"], "unknown suite 'quik'; did you mean 'quick'"),
    "task": (["--tasks", "lst", "--data", "items"], "unknown task 'lst'; did you mean 'last'"),
    "data": (["--data", "nowhere"], "is not a directory"),
    "lengths": (["--lengths", "8,x"], "--lengths: got 'x'"),
    "limit": (["--limit", "0"], "limit: got 0"),
    "corpus": (["--corpus", "nothing.txt"], "nothing.txt"),
    "figures": (["--figures"], "expected --output DIR too"),
    "tasks without their part": (["--suite", "long", "--tasks", "last"], "expected zero-shot or generation too"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_are_told_before_anything_is_loaded(shop, name, capsys, monkeypatch):
    monkeypatch.chdir(shop)
    monkeypatch.setattr(command, "load_eval_model", lambda *a: pytest.fail("a model was loaded"))
    more, message = MISTAKES[name]
    assert cli.main([*arguments(shop), *more]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_model_and_an_output_that_is_no_evaluation(shop, capsys):
    assert cli.main(["eval", str(shop / "studnet")]) == 2
    assert "studnet" in capsys.readouterr().err
    assert cli.main(arguments(shop, "--output", str(shop / "teacher"))) == 2
    assert "holds no evaluation" in capsys.readouterr().err


def test_another_vocabulary_is_refused(shop):
    with pytest.raises(UserError, match="different vocabularies"):
        command.run([str(shop / "student")], teacher="nano", suites=["language"])


def test_a_student_beside_its_recipe_knows_its_teacher_and_text(shop, tmp_path):
    recipe = (shop / "recipe.yaml").read_text()
    (shop / "student" / "recipe.yaml").write_text(recipe)
    try:
        results = command.run([str(shop / "student")], suites=["language"])
    finally:
        (shop / "student" / "recipe.yaml").unlink()
    assert {row.teacher for row in results.rows} == {"teacher"}
    assert results.head["recipe"]["teacher"] == str(shop / "teacher")


def test_a_part_that_fails_leaves_the_others(shop, monkeypatch):
    def broken(*args, **kwargs):
        raise UserError("no hub here")

    monkeypatch.setattr(plan, "zero_shot", broken)
    results = command.run(
        [str(shop / "student")],
        suites=["language", "zero-shot"],
        corpus=str(shop / "text.txt"),
        data=str(shop / "items"),
    )
    assert results.failed == {"zero-shot last: student": "no hub here"}
    assert select(results.rows, metric="perplexity")
    assert "no hub here" in results.table()


def test_names_are_short_and_different(tmp_path):
    for name in ("a/gla", "b/gla"):
        (tmp_path / name).mkdir(parents=True)
    assert command.names_of([str(tmp_path / "a" / "gla"), "nano"]) == ["gla", "nano"]
    assert command.names_of([str(tmp_path / n / "gla") for n in "ab"]) == ["a/gla", "b/gla"]
    with pytest.raises(UserError, match="the same model twice"):
        command.names_of(["nano", "nano"])


def test_suites():
    assert settings_of(["full"]).parts == PARTS
    assert settings_of(["long", "language"]) == Settings(parts=("language", "long"))
    assert settings_of(["quick"]) is QUICK
    with pytest.raises(UserError, match="quick alone"):
        settings_of(["quick", "long"])


def test_the_table_has_a_line_a_model_and_a_column_a_metric():
    rows = [
        Result("text", "perplexity", 20.5, stderr=0.25, model="gla"),
        Result("text", "perplexity", 10.0, model="nano"),
        Result("text", "kl", 0.5, model="gla"),
        Result("cost", "cache_bytes", 2.0**20, length=1024, batch=8, model="gla"),
        Result("cost", "seconds_per_token", 0.002, length=1024, model="gla"),
    ]
    text = tables(rows)
    assert "20.50 ±0.25" in text
    assert "cache bytes 1,024 x8" in text
    assert "1.0 MiB" in text
    assert "2.0 ms" in text
    lines = text.splitlines()
    assert lines[0] == "text"
    assert sum(line.startswith("nano") for line in lines) == 1


def test_several_students_beside_one_teacher(shop, tmp_path, capsys):
    student = subquad.linearize(subquad.load_teacher(shop / "teacher")[0], "retnet")
    student.save_pretrained(tmp_path / "other")
    subquad.load_teacher(shop / "teacher")[1].save_pretrained(tmp_path / "other")
    torch.manual_seed(0)
    args = ["eval", str(shop / "student"), str(tmp_path / "other"), "--teacher", str(shop / "teacher")]
    assert cli.main([*args, "--corpus", str(shop / "text.txt"), "--suite", "language"]) == 0
    shown = capsys.readouterr().out
    for name in ("student", "other", "teacher"):
        assert name in shown
