"""Mixtures: the share of each source among any first rows, the order of each source, and errors."""

import pickle
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from subquad.config import Data, MixtureSource, load_recipe
from subquad.data import check_data, sources, token_rows
from subquad.data.packing import MixtureSchedule
from subquad.utils import UserError


@pytest.mark.parametrize(
    "weights", [[1], [0.7, 0.3], [1, 2], [0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [3, 1, 1, 1, 1, 1], [0.123456, 1e-3, 7]]
)
def test_schedule_keeps_shares_to_within_one_row(weights):
    schedule = MixtureSchedule(weights)
    counts = [0] * len(weights)
    for i in range(1500):
        source, row = schedule[i]
        assert row == counts[source]
        counts[source] += 1
        for k, weight in enumerate(weights):
            assert abs(counts[k] - (i + 1) * weight / sum(weights)) < 1
            assert counts[k] <= schedule.max_count(k, i + 1) < counts[k] + 2
            assert schedule.count(k, i + 1) == counts[k]


def test_schedule_supports_random_access_and_pickling():
    schedule = MixtureSchedule([0.7, 0.2, 0.1])
    in_order = [schedule[i] for i in range(100)]
    assert MixtureSchedule([7, 2, 1])[99] == in_order[99]
    assert [pickle.loads(pickle.dumps(schedule))[i] for i in reversed(range(100))] == in_order[::-1]
    assert MixtureSchedule([7, 2, 1])[10**15] == (in_order[0][0], 7 * 10**14)


@pytest.fixture
def mixture(tmp_path):
    """Three sources whose rows name them: 40 of a, 4 of b, 100 of c."""
    names = {}
    for letter, count, weight in (("a", 40, 0.5), ("b", 4, 0.25), ("c", 100, 0.25)):
        path = tmp_path / f"{letter}.txt"
        path.write_text("\n<|endoftext|>\n".join(f"{letter}{i:02d}{letter * 4}" for i in range(count)))
        names[str(path)] = weight
    return Data(source=names, validation=next(iter(names)), seq_len=8)


def texts(rows, tokenizer) -> list[str]:
    return [tokenizer.decode(row["input_ids"][1:].tolist()) for row in rows]


def test_rows_of_a_mixture(mixture, tokenizer):
    rows = token_rows(mixture, tokenizer, "train", seed=5)
    assert len(rows) == 144
    found = texts(rows, tokenizer)
    letters = [text[0] for text in found]
    for n in range(1, len(found)):
        counts = Counter(letters[:n])
        for letter, share in (("a", 0.5), ("b", 0.25), ("c", 0.25)):
            assert abs(counts[letter] - share * n) < 1
    for letter, count in (("a", 40), ("b", 4), ("c", 100)):
        of_source = [text for text in found if text[0] == letter]
        epochs = [of_source[i : i + count] for i in range(0, len(of_source), count)]
        # A source is used completely before a row repeats.
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert sorted(of_source[:count]) != of_source[:count]
    b = [text for text in found if text[0] == "b"]
    assert len({tuple(b[i : i + 4]) for i in range(0, 36, 4)}) > 4  # another order in each epoch


def test_order_depends_on_the_seed_alone(mixture, tokenizer):
    rows = token_rows(mixture, tokenizer, "train", seed=5)
    in_order = [rows[i]["input_ids"].tolist() for i in range(300)]
    again = token_rows(mixture, tokenizer, "train", seed=5)
    assert [again[i]["input_ids"].tolist() for i in reversed(range(300))] == in_order[::-1]
    assert texts(token_rows(mixture, tokenizer, "train", seed=6), tokenizer) != texts(rows, tokenizer)
    loaded = DataLoader(rows.take(40, start=90), batch_size=4, num_workers=2)
    assert torch.cat([batch["input_ids"] for batch in loaded]).tolist() == in_order[90:130]


def test_limit_is_shared_among_sources(mixture, tokenizer):
    rows = token_rows(mixture, tokenizer, "train", limit=80, seed=1)
    assert len(rows) == 10
    found = texts(rows, tokenizer)
    assert Counter(text[0] for text in found) in ({"a": 5, "b": 3, "c": 2}, {"a": 5, "b": 2, "c": 3})
    assert all(int(text[1:3]) < {"a": 5, "b": 3, "c": 3}[text[0]] for text in found)


def test_without_a_validation_source_each_source_is_split(mixture, tokenizer, tmp_path):
    split_mixture = mixture.model_copy(update={"validation": None})
    train, valid = (
        set(texts(token_rows(split_mixture, tokenizer, split), tokenizer)) for split in ("train", "validation")
    )
    assert {text[0] for text in valid} == {"a", "b", "c"}
    assert not train & valid


def test_errors_name_the_source(mixture, tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("xy")
    short = mixture.model_copy(update={"source": {**mixture.source, str(tmp_path / "short.txt"): MixtureSource()}})
    with pytest.raises(UserError, match=r"short.txt': got 3 tokens of training text"):
        token_rows(short, tokenizer, "train")
    (tmp_path / "empty.txt").write_text("\n")
    for name, expected in (("empty.txt", r"empty.txt': got no text"), ("b.tx", "no such file")):
        wrong = mixture.model_copy(update={"source": {**mixture.source, str(tmp_path / name): MixtureSource()}})
        with pytest.raises(UserError, match=expected):
            check_data(wrong)


# ---------------------------------------------------------------------- in a recipe


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("teacher: nano\ndata: {source: a.txt}\nstages: {hidden: {tokens: 1000, lr: 1e-3}}\n")
    return lambda change: load_recipe(path, [change])


def test_mixture_in_a_recipe(recipe, tmp_path):
    full = "data.source={python-stdlib: 1, o/chat: {weight: 2, column: messages, split: train_sft}, b.txt: 3e-1}"
    loaded = recipe(full)
    assert loaded.data.source["python-stdlib"].weight == 1
    assert loaded.data.source["o/chat"].split == "train_sft"
    (tmp_path / "again.yaml").write_text(loaded.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == loaded


def test_settings_of_a_source_default_to_those_of_the_data():
    mixture = {"a": 1, "b": {"column": "messages", "subset": "x"}, "c": {"chat": True, "split": "test"}}
    found = sources.resolve_sources(Data(source=mixture, column="body", streaming=False), "train")
    assert [(s.column, s.chat, s.split, s.subset) for s in found] == [
        ("body", False, "train", None),
        ("messages", True, "train", "x"),
        ("messages", True, "test", None),
    ]
    assert not any(s.streaming for s in found)
    chat = sources.resolve_sources(Data(source={"a": 1, "b": {"column": "text"}}, chat=True), "train")
    assert [(s.column, s.chat) for s in chat] == [("messages", True), ("text", False)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("{a.txt: 0}", "data.source.a.txt.weight: got 0, expected a number greater than 0"),
        ("{a.txt: -0.5}", "data.source.a.txt.weight: got -0.5"),
        ("{a.txt: .nan}", "data.source.a.txt.weight: got nan"),
        ("{a.txt: .inf}", "data.source.a.txt.weight: got inf"),
        ("{a.txt: much}", "data.source.a.txt.weight: got 'much'"),
        ("{a.txt: true}", "data.source.a.txt.weight: got true"),
        ("{a.txt: {weight: 0}}", "data.source.a.txt.weight: got 0"),
        ("{a.txt: {weigth: 1}}", "unknown key 'data.source.a.txt.weigth'; did you mean 'data.source.a.txt.weight'?"),
        ("{a.txt: {chat: yes}}", "data.source.a.txt.chat: got 'yes'"),
        ("{a.txt: {column: 5}}", "data.source.a.txt.column: got 5"),
        ("{}", "data.source: got {}, expected the name of a source, or a mapping"),
        ("5", "data.source: got 5"),
        ("", "data.source: got null"),
    ],
)
def test_invalid_mixture(recipe, change, expected):
    with pytest.raises(UserError) as caught:
        recipe(f"data.source={change}")
    assert str(caught.value).startswith(f"--set data.source={change}: {expected}")
