"""`subquad frontier`: rows at equal bytes, resuming, training by a recipe, wrong input."""

import csv
import json

import pytest
import torch

import subquad
from subquad import cli
from subquad.config import load_recipe
from subquad.data import spread_rows
from subquad.evaluate.results import select
from subquad.modeling.budget import calibration_shape
from subquad.modeling.memory_errors import MemoryCandidates
from subquad.modeling.placement import Placement
from subquad.selection.ranking import rank_groups
from subquad.study import candidates, frontier
from subquad.study.candidates import BITS, BUDGET, EVICTION, MEMORY, RECIPE, STREAMING, TEACHER, WINDOW
from subquad.utils import UserError
from tests.helpers.recipes import save_tiny_teacher, tiny_recipe
from tests.helpers.results import select_one

TOKEN = 2 * 2 * 2 * 8 * 4
"""Bytes of a cached token: keys and values of two layers with two heads of eight channels in float32. Late queries read
sinks at a rotation, cos and sin of eight channels for each layer and window: a quarter of a token."""
CONTEXT = 256


class NoQuanto:
    def __init__(self):
        raise UserError("a cache of 4 bits needs optimum.quanto")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    directory = tmp_path_factory.mktemp("frontier")
    tiny_recipe(directory)
    save_tiny_teacher(directory / "teacher", context=512)
    return directory


@pytest.fixture(autouse=True)
def no_quanto(monkeypatch):
    monkeypatch.setattr(candidates, "QuantizedCacheLayer", NoQuanto)


@pytest.fixture
def memories_without_error(monkeypatch):
    """An untrained teacher's memories are not worth their bytes."""
    original = MemoryCandidates.head_errors
    monkeypatch.setattr(MemoryCandidates, "head_errors", lambda self: [0 * own for own in original(self)])


def measure(workspace, output, budgets, **options):
    text = str(workspace / "text.txt")
    options = {"corpus": text, "suites": ["language", "long"], "context": CONTEXT, **options}
    return frontier.run(str(workspace / "teacher"), budgets, text, str(output), **options)


def test_all_methods_at_equal_bytes_and_nothing_twice(workspace, tmp_path, monkeypatch):
    found = measure(workspace, tmp_path, [150, 8])
    methods = [(row.method, row.budget) for row in found.rows]
    small, large = ([(method, budget) for method in (WINDOW, BUDGET, EVICTION)] for budget in (8, 150))
    assert methods == [(TEACHER, None), *small, *large[:2], (STREAMING, 150), large[2]]  # 8 pays for no whole head
    assert found.failed == {f"teacher, {BITS}": "a cache of 4 bits needs optimum.quanto"}
    sizes = {(row.method, row.budget): found.numbers(row)["cache"].value / TOKEN for row in found.rows}
    assert sizes[TEACHER, None] == CONTEXT
    for budget in (8, 150):
        assert sizes[WINDOW, budget] == budget + 3.5
        assert sizes[EVICTION, budget] == budget + 4
        assert sizes[BUDGET, budget] <= budget + 4
    # half of 150 tokens for each of four heads: one whole head of 256; the others share 4 * 154 - 256, 120 each,
    # of which they keep one for the rotation
    assert sizes[STREAMING, 150] == (CONTEXT + 3 * 119) / 4 + 0.5
    for row in found.rows[1:]:
        assert found.numbers(row)["KL"].value > 0
    assert found.numbers(found.rows[0])["KL"].value == 0

    table = found.cells()
    with (tmp_path / "table.csv").open() as file:
        assert list(csv.reader(file)) == table
    assert table[0][:3] == ["", "cache", "loss"]
    assert "loss, tokens 128 to 256" in table[0]
    assert [line[0] for line in table[1:]] == [row.model for row in found.rows]
    assert all(cell for line in table for cell in line[1:])
    assert "failed: a cache of 4 bits" in found.table()
    stored = json.loads((tmp_path / "results.json").read_text())
    assert len(stored["results"]) == len(found.results)
    assert [row["model"] for row in stored["rows"]] == [row.model for row in found.rows]
    assert {path.suffix for path in tmp_path.glob("frontier.*")} == {".svg", ".png"}

    assert frontier.read_frontier(tmp_path) == found

    for name in ("linearize", "rank_groups"):
        monkeypatch.setattr(candidates, name, lambda *a, **k: pytest.fail("computed again"))
    monkeypatch.setattr(frontier.Evaluation, "outcome", only_stored(frontier.Evaluation.outcome))
    assert measure(workspace, tmp_path, [150, 8]).cells() == table


def only_stored(outcome):
    def checked(self, name, model, dependencies, compute):
        return outcome(self, name, model, dependencies, lambda: pytest.fail(f"{name} computed again"))

    return checked


def test_windows_and_whole_heads_are_those_of_budget_and_ranking(workspace, tmp_path):
    text = str(workspace / "text.txt")
    settings = frontier.frontier_settings(["language"], text, None, None, None, CONTEXT)
    teacher = frontier.load_eval_model(str(workspace / "teacher"))
    evaluation = frontier.Evaluation([], teacher, settings, tmp_path)
    made = candidates.Candidates(evaluation, [150], frontier.Data(source=text), CONTEXT)
    models = {row.method: make().model for row, make in list(made.untrained())[:4]}
    ids = made.calibration_ids()
    assert ids.shape[1] == 512  # what the teacher can read
    windows = [layer.windows for layer in models[BUDGET].mixer_layers]
    student = subquad.linearize(teacher.model, budget="150", calibration_ids=ids)
    assert windows == [layer.windows for layer in student.mixer_layers]
    first = rank_groups(teacher.model, teacher.tokenizer, ids.flatten(), keep=1)[0]
    for index, layer in enumerate(models[STREAMING].mixer_layers):
        expected = [None if (index, head) == (first.layer, first.kv_head) else 116 for head in range(2)]
        assert layer.windows == tuple(expected)
        assert layer.sinks == 4


@pytest.mark.usefixtures("memories_without_error")
def test_all_models_have_the_dtype_of_the_options(workspace, tmp_path):
    options = {"suites": ["language"], "placement": Placement(dtype="bfloat16"), "budget_memory": "gla"}
    found = measure(workspace, tmp_path, [100], **options)
    sizes = {row.method: found.numbers(row)["cache"].value / TOKEN for row in found.rows}
    assert sizes[TEACHER] == CONTEXT / 2
    assert sizes[WINDOW] == (100 + 3.5) / 2
    assert max(sizes[BUDGET], sizes[MEMORY]) <= (100 + 4) / 2
    assert [path.name for path in (tmp_path / "students").iterdir()] == ["gla-100-bfloat16"]


@pytest.mark.usefixtures("memories_without_error")
def test_memories_are_fitted_once_and_stored(workspace, tmp_path, monkeypatch):
    options = {"suites": ["language"], "budget_memory": "gla"}
    found = measure(workspace, tmp_path, [100], **options)
    assert [row.method for row in found.rows] == [TEACHER, WINDOW, BUDGET, MEMORY, EVICTION]
    row = found.rows[3]
    assert (row.model, row.budget) == ("teacher, windows and memories by error 100", 100)
    assert found.numbers(row)["cache"].value <= 104 * TOKEN
    teacher, tokenizer = subquad.load_teacher(str(workspace / "teacher"))
    ids = spread_rows(frontier.Data(source=str(workspace / "text.txt")), tokenizer, *calibration_shape(teacher))
    expected = subquad.linearize(teacher, budget=100, calibration_ids=ids, budget_memory="gla")
    assert any(spec.get("memory_heads") for spec in expected.config.layer_specs)
    stored, _ = subquad.load_teacher(str(tmp_path / "students" / "gla-100"))
    assert stored.config.layer_specs == expected.config.layer_specs
    for name, parameter in stored.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name

    monkeypatch.setattr(candidates, "linearize", lambda *a, **k: pytest.fail("fitted again"))
    monkeypatch.setattr(frontier.Evaluation, "outcome", only_stored(frontier.Evaluation.outcome))
    assert measure(workspace, tmp_path, [100], **options).cells() == found.cells()


@pytest.mark.sample
@pytest.mark.slow
@pytest.mark.usefixtures("memories_without_error")
def test_students_of_a_recipe_are_trained_once(workspace, tmp_path, monkeypatch):
    changes = ["stages.matrix=null", "stages.end_to_end=null"]
    recipe = load_recipe(workspace / "recipe.yaml", changes)
    options = {"suites": ["language"], "recipe": recipe, "recipe_budgets": [24], "budget_memory": "gla"}
    found = measure(workspace, tmp_path, [8, 24], **options)
    trained = [row for row in found.rows if row.trained]
    assert [(row.method, row.budget) for row in trained] == [(RECIPE, None), (WINDOW, 24), (BUDGET, 24), (MEMORY, 24)]
    assert trained[0].model == "gla, trained"
    untrained = {row.method: row for row in found.rows if not row.trained and row.budget == 24}
    for row in trained[1:]:
        before, after = (found.numbers(each) for each in (untrained[row.method], row))
        assert after["cache"].value <= 28 * TOKEN
        assert after["loss"].value != before["loss"].value
    with_memories = tmp_path / "trained" / "budget-24"
    assert any(spec.get("memory_heads") for spec in subquad.load_teacher(str(with_memories))[0].config.layer_specs)
    monkeypatch.setattr("subquad.distill.pipeline.DistillationRun", lambda *a: pytest.fail("trained again"))
    assert measure(workspace, tmp_path, [8, 24], **options).cells() == found.cells()


ERRORS = {
    "budget": (["--budgets", "8,4096"], "budgets: got [8, 4096]"),
    "no number": (["--budgets", "8,x"], "--budgets: got 'x'"),
    "calibration": (["--calibrate", "nothing.txt"], "nothing.txt"),
    "corpus": (["--corpus", "nothing.txt"], "nothing.txt"),
    "suite": (["--suite", "languag"], "did you mean 'language'"),
    "recipe": (["--recipe", "recipe.yaml"], "recipe: got the teacher"),
    "no recipe": (["--recipe-budgets", "96"], "recipe_budgets: got [96] without a recipe"),
    "other budgets": (
        ["--recipe", "recipe.yaml", "--recipe-budgets", "96,7"],
        "recipe_budgets: got [96, 7], expected some of [32, 64, 96, 192, 384]",
    ),
    "memory": (["--budget-memory", "glas"], "unknown mixer 'glas'; did you mean 'gla'"),
    "output": (["--output", "teacher"], "holds no evaluation"),
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_errors_are_found_before_a_model_is_loaded(workspace, name, capsys, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(frontier, "load_eval_model", lambda *a: pytest.fail("a model was loaded"))
    more, message = ERRORS[name]
    given = ["frontier", "nano", "--calibrate", "text.txt", "--output", "new", *more]
    assert cli.main(given) == 2
    assert message in capsys.readouterr().err


def test_command_prints_the_table(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    options = ["--calibrate", "text.txt", "--corpus", "text.txt", "--suite", "language", "--context", "128"]
    assert cli.main(["frontier", "teacher", *options, "--budgets", "8", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "teacher, window 8 + 4 sinks" in shown
    stored = json.loads((tmp_path / "results.json").read_text())["results"]
    results = [frontier.Result(**values) for values in stored]
    window = select_one(results, model="teacher, window 8 + 4 sinks", metric="cache_bytes")
    assert (window.value, window.length) == (11.5 * TOKEN, 128)
    assert select(results, metric="acc") == []
