"""Damaged files that Subquad wrote itself or that stand beside a task: each is refused with a message, or read."""

import shutil

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from subquad.cli import main
from subquad.evaluate.lm_eval import find_tasks, zero_shot
from subquad.utils import UserError
from tests.helpers.architectures import build_teacher
from tests.helpers.fuzzing import at_most, cheap, damaged, mutated, to_json, with_model
from tests.helpers.students import KINDS, make_student
from tests.helpers.studies import STAGE_SETS, synthetic_recipes, write_study
from tests.helpers.teachers import byte_tokenizer, tiny_teacher


def read_or_refused(read, begins: str):
    """What `read` returns; None if it raises a UserError, whose message begins so."""
    try:
        return read()
    except UserError as error:
        message = str(error)
    assert message.startswith(begins)
    return None


@pytest.fixture(scope="module")
def student():
    return make_student(build_teacher("llama"), layer_types=KINDS["near_far"]).eval()


@cheap
@given(st.data())
def test_cache_files(student, tmp_path, data):
    """One that is read continues a text as the whole file does."""
    path = tmp_path / "cache.safetensors"
    ids = torch.arange(3, 33).view(1, 30)
    with torch.no_grad():
        cache = student.new_cache()
        student(ids, past_key_values=cache)
        student.save_cache(cache, path)
        whole = path.read_bytes()
        path.write_bytes(data.draw(damaged(whole)))
        loaded = read_or_refused(lambda: student.load_cache(path), "cache: ")
        if loaded is None:
            return
        token = ids[:, :1]
        assert torch.equal(student(token, past_key_values=loaded).logits, student(token, past_key_values=cache).logits)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    directory = tmp_path_factory.mktemp("study") / "study"
    write_study(directory, synthetic_recipes(("gla",), STAGE_SETS[:1], (True,), (0,)))
    return directory


FILES = ("results.json", "evaluation.json", "recipe.yaml", "result.json", "metrics.jsonl", "analysis.json")


@with_model
@given(st.data(), st.sampled_from(FILES))
def test_reports_of_damaged_results(study, tmp_path, capfd, data, name):
    """Drawn, or refused with a message; nothing is written outside of the study."""
    target = tmp_path / "study"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(study, target)
    for path in target.rglob(name):
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    with at_most(120):
        code = main(["report", str(target)])
    message = capfd.readouterr().err
    assert code in (0, 2)
    assert code == 0 or "subquad: " in message
    assert [path.name for path in tmp_path.iterdir()] == ["study"]


TASK = {
    "task": "own",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "ITEMS"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "num_fewshot": 0,
    "metadata": {"version": 1.0},
}


@pytest.mark.slow
@pytest.mark.sample
@with_model
@given(mutated(TASK))
def test_task_definitions(tmp_path, own_cache, definition):
    """Of lm-eval's format: run, or refused with a message of one cause."""
    items = tmp_path / "items.jsonl"
    items.write_bytes(b"\n".join([to_json({"query": "2 + 2 is", "choices": ["3", "4"], "gold": 1})] * 2))
    text = yaml.safe_dump(definition, allow_unicode=True).replace("ITEMS", str(items))
    (tmp_path / "own.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    before = sorted(tmp_path.rglob("*"))

    def score():
        (task,) = find_tasks(["own"], None, tmp_path)
        return zero_shot(tiny_teacher(vocab_size=300), byte_tokenizer(), task, limit=2, include=tmp_path)

    with at_most(60):
        read_or_refused(score, "task")
    assert sorted(tmp_path.rglob("*")) == before
