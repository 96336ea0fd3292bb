"""Benchmarks by lm-eval: scores equal lm-eval's own, and errors are found before any work."""

import gzip
import json
import subprocess
import sys

import pytest
import torch
import yaml

import subquad
from subquad.evaluate import lm_eval as harness
from subquad.evaluate.lm_eval import FORMATS, Task, evenly_spaced, find_tasks, item_format, local_tasks, zero_shot
from subquad.evaluate.results import select, select_one
from subquad.utils import UserError

lm_eval = pytest.importorskip("lm_eval", reason="zero-shot tasks need lm-eval (extra: eval)")

ITEMS = {
    "questions": [
        {"query": f"Question: what is {n} + 1?", "choices": [str(n), str(n + 1), "pandas"], "gold": 1} for n in range(9)
    ],
    "endings": [
        {"context_options": ["import os", "def f"], "continuation": f"(x{n}):", "gold": n % 2} for n in range(7)
    ],
    "words": [{"context": f"for i in range({n}): print", "continuation": "(i)"} for n in range(8)],
    # UID has two types, as in BLiMP
    "pairs": [{"sentence_good": "def f(x):", "sentence_bad": "def (x f:", "UID": [n, str(n)][n % 2]} for n in range(5)],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("items")
    for name, items in ITEMS.items():
        lines = "".join(json.dumps(item) + "\n" for item in items)
        if name == "words":
            with gzip.open(directory / f"{name}.jsonl.gz", "wt") as file:
                file.write(lines)
        else:
            (directory / f"{name}.jsonl").write_text(lines)
    return directory


@pytest.fixture(scope="module")
def nano():
    return subquad.load_teacher("nano")


def test_formats_are_found_from_the_items(data):
    tasks = local_tasks(data)
    assert {name: task.keys[0] for name, task in tasks.items()} == {
        "questions": "query",
        "endings": "context_options",
        "words": "context",
        "pairs": "sentence_good",
    }
    assert [name for name, task in tasks.items() if task.is_last_word] == ["words"]


def log_likelihood(model, tokenizer, context, continuation):
    """The log-likelihood of a continuation, computed directly."""
    before = tokenizer(context).input_ids if context else [tokenizer.eos_token_id]
    ids = torch.tensor([before + tokenizer(context + continuation).input_ids[len(before) if context else 0 :]])
    with torch.no_grad():
        log_q = model(ids).logits[0].log_softmax(-1)
    return sum(log_q[t - 1, ids[0, t]].item() for t in range(len(before), ids.shape[1]))


@pytest.mark.parametrize("name", list(ITEMS))
def test_scores_equal_direct_computation(data, nano, name):
    model, tokenizer = nano
    result = zero_shot(model, tokenizer, local_tasks(data)[name], batch_size=3)
    expected = []
    for item in ITEMS[name]:
        if name == "questions":
            options = [log_likelihood(model, tokenizer, item["query"] + "\nAnswer:", " " + c) for c in item["choices"]]
            expected.append(options.index(max(options)) == item["gold"])
        elif name == "endings":
            options = [log_likelihood(model, tokenizer, c, " " + item["continuation"]) for c in item["context_options"]]
            expected.append(options.index(max(options)) == item["gold"])
        elif name == "pairs":
            options = [log_likelihood(model, tokenizer, "", item[f"sentence_{kind}"]) for kind in ("good", "bad")]
            expected.append(options[0] > options[1])
        else:
            ids = tokenizer(item["context"] + " " + item["continuation"], return_tensors="pt").input_ids
            n = len(tokenizer(item["context"]).input_ids)
            guessed = model(ids).logits[0, n - 1 : -1].argmax(-1)
            expected.append(torch.equal(guessed, ids[0, n:]))
    assert result.scores.tolist() == [float(x) for x in expected]
    assert select_one(result.results, metric="acc").value == pytest.approx(sum(expected) / len(expected))
    assert result.chance == {"questions": pytest.approx(1 / 3), "words": 0}.get(name, 0.5)


def test_evenly_spaced():
    assert evenly_spaced(9, 3) == [0, 3, 6]
    assert evenly_spaced(9, 20) == list(range(9))


@pytest.mark.parametrize("kind", ["file", "task of lm-eval", "group of lm-eval"])
def test_limited_items_are_evenly_spaced(data, nano, kind, tmp_path):
    """Of a file as of lm-eval's own tasks: the same items."""
    local = local_tasks(data)["questions"]
    whole = zero_shot(*nano, local)
    task = local
    if kind != "file":
        harness.task_manager.cache_clear()
        names = ["own_task", "own_other"]
        for name in names:
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**local.to_lm_eval(), "task": name}))
        (tmp_path / "own_group.yaml").write_text(yaml.safe_dump({"group": "own_group", "task": names}))
        task = Task("own_task" if kind == "task of lm-eval" else "own_group")
    limited = zero_shot(*nano, task, limit=3, include=tmp_path)
    expected = whole.scores[[0, 3, 6]]
    if kind != "group of lm-eval":
        assert limited.scores.tolist() == expected.tolist()
    for result in select(limited.results, metric="acc"):
        assert result.value == pytest.approx(expected.mean().item())
        assert result.n in (3, None)


def test_batch_size_does_not_change_scores(data, nano):
    model, tokenizer = nano
    student = subquad.linearize(model, "gated_deltanet").eval()
    task = local_tasks(data)["endings"]
    alone, batched = (zero_shot(student, tokenizer, task, batch_size=n) for n in (1, 8))
    assert alone.scores.tolist() == batched.scores.tolist()
    assert [result.value for result in alone.results] == pytest.approx([r.value for r in batched.results])


def test_unknown_tasks_are_refused_with_the_nearest_name(data):
    with pytest.raises(UserError, match="did you mean 'questions'"):
        find_tasks(["question"], data)
    with pytest.raises(UserError, match="did you mean 'arc_easy'"):
        find_tasks(["arc_eazy"], None)
    assert find_tasks(["words", "piqa"], data) == [local_tasks(data)["words"], Task("piqa")]
    assert [task.name for task in find_tasks(None, None)] == list(harness.HUB_TASKS)
    assert len(find_tasks(None, data)) == 4


def test_errors_name_the_file_and_line(tmp_path):
    with pytest.raises(UserError, match=r"data: .*missing"):
        local_tasks(tmp_path / "missing")
    with pytest.raises(UserError, match=r"holds no NAME\.jsonl"):
        local_tasks(tmp_path)
    (tmp_path / "odd.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(UserError, match=r"odd\.jsonl: .*query"):
        local_tasks(tmp_path)
    (tmp_path / "odd.jsonl").write_text('{"context": "a", "continuation": "b"}\n{"context": \n')
    with pytest.raises(UserError, match=r"odd\.jsonl: line 2"):
        local_tasks(tmp_path)["odd"].items()
    (tmp_path / "odd.jsonl").write_text('{"context": "a", "continuation": "b"}\n{"context": "c"}\n')
    with pytest.raises(UserError, match=r"odd\.jsonl: item 2 has no continuation"):
        local_tasks(tmp_path)["odd"].items()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"context": "a"}\n' * 1000)[:40])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz"):
        item_format(tmp_path / "cut.jsonl.gz")


COMMAND_LINE = """
import sys
sys.modules["fla"] = None
import subquad
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.mark.slow
@pytest.mark.sample
def test_scores_equal_the_lm_eval_command_line(tmp_path, data, nano):
    """`lm_eval --model hf` on a transformer and on a student, which `import subquad` registers."""
    model, tokenizer = nano
    student = subquad.linearize(model, "gla")
    tasks = local_tasks(data)
    for name, task in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task.to_lm_eval()))
    for used in (model, student):
        used.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        out = tmp_path / f"results-{type(used).__name__}"
        arguments = {
            "--model": "hf",
            "--model_args": f"pretrained={tmp_path / 'model'},dtype=float32,max_length=1024",
            "--tasks": ",".join(ITEMS),
            "--include_path": str(tmp_path),
            "--device": "cpu",
            "--batch_size": "1",
            "--output_path": str(out / "found.json"),
        }
        command = [sys.executable, "-c", COMMAND_LINE, *[text for pair in arguments.items() for text in pair]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        (written,) = out.rglob("*.json")
        expected = json.loads(written.read_text())["results"]
        loaded = subquad.load_teacher(tmp_path / "model")
        for name, task in tasks.items():
            for result in zero_shot(*loaded, task, batch_size=1).results:  # no padding, as batches differ
                assert result.value == expected[name][f"{result.metric},none"], (name, result)


@pytest.mark.parametrize("keys", list(FORMATS))
def test_each_format_is_recognized(keys, tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps(dict.fromkeys(keys, "x")) + "\n")
    assert item_format(file) == keys
