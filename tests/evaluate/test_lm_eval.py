"""Benchmarks by lm-eval: scores equal lm-eval's own, and errors are found before any work."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import subquad
from subquad.evaluate import lm_eval as harness
from subquad.evaluate.lm_eval import FORMATS, HUB_TASKS, Task, evenly_spaced, find_tasks, zero_shot
from subquad.evaluate.results import select
from subquad.utils import UserError
from tests.helpers.results import select_one

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


@pytest.fixture(scope="module")
def tasks(data):
    return {task.name: task for task in find_tasks(None, data)}


def test_items_become_task_definitions(tasks, data, tmp_path):
    assert sorted(tasks) == sorted(ITEMS)
    for name, task in tasks.items():
        definition = yaml.safe_load((task.directory / f"{name}.yaml").read_text())
        assert definition["dataset_path"] == "json"
        written = Path(definition["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        keys = next(keys for keys in FORMATS.values() if set(keys) <= set(ITEMS[name][0]))
        for item, line in zip(ITEMS[name], written, strict=True):
            assert {key: json.loads(line)[key] for key in keys} == {key: item[key] for key in keys}
    assert [name for name, task in tasks.items() if task.generated] == ["words"]
    assert find_tasks(None, data) == list(tasks.values())
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ITEMS["pairs"][0]) + "\n")
    assert find_tasks(["pairs"], tmp_path)[0].key != tasks["pairs"].key


def log_likelihood(model, tokenizer, context, continuation):
    """The log-likelihood of a continuation, computed directly."""
    before = tokenizer(context).input_ids if context else [tokenizer.eos_token_id]
    ids = torch.tensor([before + tokenizer(context + continuation).input_ids[len(before) if context else 0 :]])
    with torch.no_grad():
        log_q = model(ids).logits[0].log_softmax(-1)
    return sum(log_q[t - 1, ids[0, t]].item() for t in range(len(before), ids.shape[1]))


@pytest.mark.parametrize("name", list(ITEMS))
def test_scores_equal_direct_computation(tasks, nano, name):
    model, tokenizer = nano
    result = zero_shot(model, tokenizer, tasks[name], batch_size=3)
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
    assert result.scores == [float(x) for x in expected]
    assert select_one(result.results, metric="acc").value == pytest.approx(sum(expected) / len(expected))
    assert result.chance == {"questions": pytest.approx(1 / 3), "words": 0}.get(name, 0.5)


def test_evenly_spaced():
    assert evenly_spaced(9, 3) == [0, 3, 6]
    assert evenly_spaced(9, 20) == evenly_spaced(9, None) == list(range(9))


@pytest.mark.parametrize("kind", ["file", "task of lm-eval", "group of lm-eval"])
def test_limited_items_are_evenly_spaced(tasks, nano, kind, tmp_path):
    """Of a file as of other definitions: the same items."""
    task = tasks["questions"]
    expected = torch.tensor(zero_shot(*nano, task).scores)[[0, 3, 6]]
    if kind != "file":
        names = ["own_task", "own_other"]
        definition = yaml.safe_load((task.directory / "questions.yaml").read_text())
        for name in names:
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**definition, "task": name}))
        (tmp_path / "own_group.yaml").write_text(yaml.safe_dump({"group": "own_group", "task": names}))
        task = Task("own_task" if kind == "task of lm-eval" else "own_group")
    limited = zero_shot(*nano, task, limit=3, include=tmp_path)
    if kind != "group of lm-eval":
        assert limited.scores == expected.tolist()
    for result in select(limited.results, metric="acc"):
        assert result.value == pytest.approx(expected.mean().item())
        assert result.n in (3, None)


def test_batch_size_does_not_change_scores(tasks, nano):
    model, tokenizer = nano
    student = subquad.linearize(model, "gated_deltanet").eval()
    alone, batched = (zero_shot(student, tokenizer, tasks["endings"], batch_size=n) for n in (1, 8))
    assert alone.scores == batched.scores
    assert [result.value for result in alone.results] == pytest.approx([r.value for r in batched.results])


def first_word(text):
    """As lm-eval's exact match compares it."""
    definition = yaml.safe_load((Path(harness.__file__).parent / "tasks" / "generated_words.yaml").read_text())
    for pattern in definition["metric_list"][0]["regexes_to_ignore"]:
        text = re.sub(pattern, "", text)
    return text


def test_first_word():
    words = {
        ' "Signs," he said': "Signs",
        "signs": "signs",
        "  ": "",
        "": "",
        "it's so": "it's",
        "—no": "no",
        "...": "",
    }
    assert {text: first_word(text) for text in words} == words


def test_generated_words_of_padded_batches_equal_single_rows(tmp_path, nano):
    model, tokenizer = nano
    contexts = [
        "def main(argv=None):\n    ",
        "import",
        "class Foo(object):\n    def __init__(self, x):\n        self.x =",
    ]
    for used in (model, subquad.linearize(model, "gla").eval()):
        items = []
        for text in contexts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            out = used.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
            written = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            word = first_word(written)
            items += [{"context": text, "continuation": end} for end in (word, word + "x")]
        (tmp_path / "words.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        (task,) = find_tasks(None, tmp_path)
        assert zero_shot(used, tokenizer, task.generated).scores == [1, 0] * len(contexts)


def test_unknown_tasks_are_refused_with_the_nearest_name(data, monkeypatch):
    monkeypatch.setattr(harness, "hub_problem", lambda: None)
    with pytest.raises(UserError, match="did you mean 'questions'"):
        find_tasks(["question"], data)
    with pytest.raises(UserError, match="did you mean 'arc_easy'"):
        find_tasks(["arc_eazy"], None)
    assert [task.name for task in find_tasks(["words", "piqa"], data)] == ["words", "piqa"]
    assert find_tasks(None, None) == [Task(name) for name in HUB_TASKS]


FIRST = b'{"context": "a", "continuation": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.txt", b"", r"holds no NAME\.jsonl"),
        ("odd.jsonl", b'{"question": "?"}\n', r"odd\.jsonl: .*query"),
        ("odd.jsonl", b"[1]\n", r"odd\.jsonl: line 1 is not a JSON object"),
        ("odd.jsonl", b"\n", r"odd\.jsonl: got no items"),
        ("odd.jsonl", FIRST + b'{"context": \n', r"odd\.jsonl: line 2 is not a JSON object"),
        ("odd.jsonl", FIRST + b'{"context": "c"}\n', r"odd\.jsonl: item 2 has no continuation"),
        ("odd.jsonl", b"\xff\n", r"odd\.jsonl: got 0xff at byte 0"),
        ("cut.jsonl.gz", gzip.compress(FIRST * 1000, mtime=0)[:40], r"cut\.jsonl\.gz: damaged"),
    ],
)
def test_errors_name_the_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_tasks(None, tmp_path)
    with pytest.raises(UserError, match=r"data: .*missing"):
        find_tasks(None, tmp_path / "missing")


COMMAND_LINE = """
import sys
sys.modules["fla"] = None
import subquad
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.mark.slow
@pytest.mark.sample
def test_scores_equal_the_lm_eval_command_line(tmp_path, tasks, nano):
    """`lm_eval --model hf` on a transformer and on a student, which `import subquad` registers."""
    model, tokenizer = nano
    student = subquad.linearize(model, "gla")
    for name, task in tasks.items():
        shutil.copy(task.directory / f"{name}.yaml", tmp_path)
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
                # another process may sum in another order: a perplexity of 3e6 differed by 7e-7 of itself
                assert result.value == pytest.approx(expected[name][f"{result.metric},none"], rel=1e-5), (name, result)
