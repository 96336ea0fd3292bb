"""A tokenizer that puts a token in front of every text (Gemma, Llama 3): training, evaluation, generation and recall
tasks read the same beginning."""

import itertools
import json
import random

import pytest
import torch
from tokenizers import processors

from subquad.config import Data
from subquad.data import token_rows
from subquad.data.encoding import text_prefix
from subquad.data.recall_tasks import PromptSource, make_items
from tests.helpers.teachers import byte_tokenizer

BOS, EOS = 1, 0
TEXTS = ["x" * n for n in (5, 40, 3, 90, 17, 200)]


@pytest.fixture
def tokenizer():
    found = byte_tokenizer()
    found.bos_token = found.convert_ids_to_tokens(BOS)
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{found.bos_token} $A", special_tokens=[(found.bos_token, BOS)]
    )
    return found


def rows_of(tokenizer, path, texts, **options):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = Data(source=str(path), validation=str(path), **options)
    rows = token_rows(data, tokenizer, "train")
    return [rows[i] for i in range(len(rows))]


def test_prefix(tokenizer):
    assert tokenizer("a").input_ids[0] == BOS
    assert text_prefix(tokenizer) == [BOS]
    assert text_prefix(byte_tokenizer()) == []


@pytest.mark.parametrize("document_masking", [True, False])
@pytest.mark.parametrize("seq_len", [7, 32])
def test_every_row_and_document_begins_as_a_text(tokenizer, tmp_path, seq_len, document_masking):
    rows = rows_of(tokenizer, tmp_path / "a.jsonl", TEXTS, seq_len=seq_len, document_masking=document_masking)
    letters = 0
    for row in rows:
        ids = row["input_ids"].tolist()
        assert len(ids) == seq_len
        assert ids[0] == BOS
        assert (BOS, BOS) not in itertools.pairwise(ids)
        assert all(b == BOS for a, b in itertools.pairwise(ids) if a == EOS)  # a text ends where the next one begins
        letters += sum(token not in (BOS, EOS) for token in ids)
        if document_masking:
            begins = (row["position_ids"] == 0).tolist()
            assert begins == [token == BOS for token in ids]
            labels = row["labels"].tolist()  # no document predicts the beginning of the next
            assert labels == [-100 if token == BOS else token for token in ids]
    total = sum(map(len, TEXTS))
    assert (
        total - seq_len < letters <= total + len(rows)
    )  # a row that starts with a text takes one token of the next row


def test_rows_hold_the_text_in_order(tokenizer, tmp_path):
    text = "".join(random.Random(0).choices("abcdefgh", k=300))
    rows = rows_of(tokenizer, tmp_path / "a.jsonl", [text], seq_len=11)
    pieces = {tokenizer.decode(row["input_ids"][1:]) for row in rows}
    expected = {text[max(0, 10 * i - 1) : max(10, 10 * i + 9)] for i in range(30)}
    assert pieces == expected


@pytest.mark.parametrize("template_has_it", [True, False])
def test_never_twice_behind_a_chat_template(tokenizer, tmp_path, template_has_it):
    bos = tokenizer.bos_token if template_has_it else ""
    tokenizer.chat_template = bos + "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
    chat = [{"role": "user", "content": "hello " * 4}, {"role": "assistant", "content": "good day " * 9}]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for _ in range(9)))
    data = Data(source=str(path), validation=str(path), seq_len=24, column="messages")
    rows = token_rows(data, tokenizer, "train")
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer(whole, add_special_tokens=False).input_ids.count(BOS) == int(template_has_it)
    for i in range(len(rows)):
        ids, positions = rows[i]["input_ids"], rows[i]["position_ids"]
        assert torch.equal(ids == BOS, positions == 0) if template_has_it else BOS not in ids


def test_recall_tasks_and_rows_begin_alike(tokenizer, tmp_path):
    haystack = torch.tensor(tokenizer("the cat sat on the mat. " * 200, add_special_tokens=False).input_ids)
    source = PromptSource(tokenizer, haystack, random.Random(0))
    items = list(make_items("needle_number", source, 300, [0.5], 2))
    row = rows_of(tokenizer, tmp_path / "a.jsonl", TEXTS, seq_len=32)[0]
    starts = {item.context[0] for item in items} | {int(row["input_ids"][0]), tokenizer("hello").input_ids[0]}
    assert starts == {BOS}
