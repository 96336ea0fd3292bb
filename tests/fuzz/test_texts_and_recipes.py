"""Hostile recipes, layer types and texts: each is refused by a UserError or works, in bounded memory and time."""

import contextlib
import gzip
import io
import itertools
import json
import resource

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from subquad.config import load_recipe, load_study
from subquad.data.corpora import OPENERS, documents
from subquad.evaluate.lm_eval import find_tasks
from subquad.modeling.layer_types import resolve_layer_types
from subquad.utils import UserError
from tests.helpers.fuzzing import JSON, cheap, damaged, mutated, to_json

RECIPE = {
    "teacher": "nano",
    "data": {"source": {"python-stdlib": 2, "books.txt": {"weight": 1, "column": "text"}}, "seq_len": 64},
    "student": {"mixer": "gla", "layer_types": {"0,2": "attention", "default": {"mixer": "gla", "window": 8}}},
    "stages": {
        "hidden": {"tokens": 1000, "lr": 1e-3, "param_groups": {"mixer": {"lr": 1e-2}}},
        "end_to_end": {"tokens": 2000, "lr": 1e-4, "lora": {"rank": 4}, "batch_size": 4, "micro_batch_size": 2},
    },
    "evaluation": {"eval_tokens": 512},
    "seed": 0,
}
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def refused_or_read(read, *args):
    with contextlib.suppress(UserError):
        return read(*args)


@cheap
@given(mutated(RECIPE), st.sampled_from([load_recipe, load_study]))
def test_recipes_with_mistakes(tmp_path, recipe, load):
    (tmp_path / "recipe.yaml").write_bytes(to_json(recipe))
    refused_or_read(load, tmp_path / "recipe.yaml")


@cheap
@given(damaged(yaml.safe_dump(RECIPE).encode()), st.sampled_from([load_recipe, load_study]))
def test_damaged_recipes(tmp_path, content, load):
    (tmp_path / "recipe.yaml").write_bytes(content)
    refused_or_read(load, tmp_path / "recipe.yaml")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
RECURSIVE = "student: &a {mixer: gla, layer_types: *a}\n"
DEEP = "student: " + "[" * 50_000 + "]" * 50_000
LONG_NUMBER = f"seed: {'9' * 100_000}\n"
MANY_KEYS = "student: {mixer: gla, mixer_kwargs: {" + ", ".join(f"k{i}: 1" for i in range(20_000)) + "}}\n"
COMBINATIONS = "\n".join(f"k{i}: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" for i in range(12))


@pytest.mark.parametrize("text", [BOMB, RECURSIVE, DEEP, LONG_NUMBER, MANY_KEYS, COMBINATIONS], ids=str.__len__)
@pytest.mark.parametrize("load", [load_recipe, load_study])
def test_small_recipes_that_claim_much(tmp_path, text, load):
    path = tmp_path / "recipe.yaml"
    path.write_text("teacher: nano\ndata: python-stdlib\nstages: {hidden: {tokens: 1, lr: 1}}\n" + text)
    with pytest.raises(UserError):
        load(path)


@cheap
@given(
    st.one_of(
        JSON, mutated({"default": "gla", "0,2": "attention", "3-4": {"mixer": "xlstm", "window": 8, "sinks": 4}})
    ),
    st.integers(1, 6),
)
def test_layer_types(layer_types, layers):
    specs = refused_or_read(resolve_layer_types, layer_types, layers)
    assert specs is None or len(specs) == layers


@cheap
@given(
    st.lists(st.one_of(mutated({"text": "A line.", "n": 1}), mutated({"messages": MESSAGES})), max_size=4),
    st.sampled_from(["text", "messages"]),
)
def test_json_lines(tmp_path, rows, column):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(map(to_json, rows)))
    refused_or_read(lambda: list(documents(str(tmp_path / "a.jsonl"), "all", column=column, chat=column == "messages")))


def parquet_bytes() -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["one", "two", None] * 30, "n": range(90)}), buffer)
    return buffer.getvalue()


FILES = {
    ".parquet": parquet_bytes(),
    ".jsonl": json.dumps({"text": "one"}).encode() * 20,
    ".jsonl.gz": gzip.compress(b'{"text": "one"}\n' * 50, mtime=0),
    ".txt": "Ä text\n<|endoftext|>\nmore\n".encode() * 10,
}


@cheap
@given(st.data(), st.sampled_from(sorted(FILES)))
def test_damaged_texts(tmp_path, data, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data.draw(damaged(FILES[suffix])))
    refused_or_read(lambda: list(itertools.islice(documents(str(path), "all"), 1000)))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".txt.xz", ".jsonl.zst", ".parquet.gz"])
def test_compressed_bombs(tmp_path, suffix):
    """A few hundred kilobytes that expand to half a gigabyte without a line end."""
    path, content = tmp_path / f"a{suffix}", b"\0" * 2**20 if suffix == ".parquet.gz" else b"x" * 2**20
    with OPENERS["." + suffix.split(".")[-1]](path, "wb") as file:
        for _ in range(512):
            file.write(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"expands|parquet"):
        list(documents(str(path), "all"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 400_000  # kB


ITEMS = {
    "last_words": {"context": "The sky is", "continuation": " blue"},
    "choices": {"query": "2 + 2 is", "choices": ["3", "4"], "gold": 1},
    "contexts": {"context_options": ["A is", "B is"], "continuation": " here", "gold": 0},
    "pairs": {"sentence_good": "He is.", "sentence_bad": "He are."},
}


@cheap
@given(st.data(), st.sampled_from(sorted(ITEMS)))
def test_benchmark_items(tmp_path, own_cache, data, form):
    rows = [ITEMS[form], data.draw(mutated(ITEMS[form]))]
    (tmp_path / "items.jsonl").write_bytes(b"\n".join(map(to_json, rows)))
    before = sorted(tmp_path.rglob("*"))
    refused_or_read(find_tasks, None, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
