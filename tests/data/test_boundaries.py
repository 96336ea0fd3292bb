"""Documents within rows: kept apart or joined, and what counts at their borders."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from subquad.config import Data
from subquad.data import token_rows
from subquad.data.cache import HEADER


@pytest.fixture
def corpus(tmp_path):
    def write(*texts: str, **settings) -> Data:
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
        return Data(**{"source": str(path), "validation": str(path), "seq_len": 8, **settings})

    return write


def in_file(rows) -> dict[str, torch.Tensor]:
    """Every key of the rows, one after the other as they stand in the file."""
    items = [rows._item(row, rows.streams[0].follows) for row in rows._tokens[0]]
    return {key: torch.cat([item[key] for item in items]) for key in items[0]}


def expected_positions(lengths: list[int], context: int) -> list[int]:
    positions: list[int] = []
    for length in lengths:
        last = 0
        for i in range(length):
            last = 0 if i == 0 or len(positions) % context == 0 else last + 1
            positions.append(last)
    return positions[: len(positions) // context * context]


@pytest.mark.parametrize(
    "texts",
    [
        ["short", "a document that spans several rows", "x", "y", "the last of them"],
        ["one document, much longer than any row " * 20],
        ["a", "b", "c", "d", "e", "f", "g", "h", "i"],
        ["1234567", "1234567", "1234567"],
        ["123456", "12345678", "1234567"],
    ],
    ids=["mixed", "long", "tiny", "of the context", "around the context"],
)
def test_positions_restart_at_each_document_and_row(corpus, tokenizer, texts):
    rows = token_rows(corpus(*texts), tokenizer, "train")
    found = in_file(rows)
    assert set(found) == {"input_ids", "position_ids"}
    assert found["position_ids"].tolist() == expected_positions([1 + len(t) for t in texts], 8)
    row = rows[0]
    assert {key: (value.dtype, value.shape) for key, value in row.items()} == {
        "input_ids": (torch.int64, (8,)),
        "position_ids": (torch.int64, (8,)),
    }


def test_positions_say_which_tokens_share_a_document(corpus, tokenizer):
    """What attention and state need: position t - position within a row is the place where t's document begins."""
    texts = ["ab", "cdef", "g", "hijklmnopqrstuvw"]
    rows = token_rows(corpus(*texts, seq_len=6), tokenizer, "train")
    found = in_file(rows)
    for ids, positions in zip(found["input_ids"].view(-1, 6), found["position_ids"].view(-1, 6), strict=True):
        begin = torch.arange(6) - positions
        for t in range(6):
            own = tokenizer.decode(ids[begin[t] : t + 1].tolist()).removeprefix("<|endoftext|>")
            assert any(own in text for text in texts)


def test_joined_documents_have_no_positions(corpus, tokenizer, make_tokenizer):
    some = corpus("short", "another", "third one", document_masking=False)
    for t in (tokenizer, make_tokenizer(), make_tokenizer(bos_token="<s>")):
        assert set(token_rows(some, t, "train")[0]) == {"input_ids"}


def test_documents_joined_or_apart_share_a_cache(corpus, tokenizer, cache):
    some = corpus("short", "another")
    ids = [
        in_file(token_rows(some.model_copy(update={"documents": d}), tokenizer, "train"))["input_ids"]
        for d in ("joined", "separate")
    ]
    assert torch.equal(*ids)
    assert len(list(cache.iterdir())) == 1


def test_an_end_of_text_counts_and_what_nothing_foretells_does_not(corpus, tokenizer, make_tokenizer):
    some = corpus("short", "another", "third one")
    assert "labels" not in token_rows(some, tokenizer, "train")[0]
    begin = make_tokenizer(bos_token="<s>")
    found = in_file(token_rows(some, begin, "train"))
    assert torch.equal(found["labels"] == -100, found["input_ids"] == begin.bos_token_id)
    bare = make_tokenizer()
    found = in_file(token_rows(some, bare, "train"))
    assert [i for i, label in enumerate(found["labels"].tolist()) if label == -100] == [0, 5, 12]
    kept = found["labels"] != -100
    assert torch.equal(found["labels"][kept], found["input_ids"][kept])


def test_documents_of_one_token_without_an_end(corpus, make_tokenizer):
    found = in_file(token_rows(corpus(*"abcdefgh"), make_tokenizer(), "train"))
    assert found["position_ids"].tolist() == [0] * 8
    assert found["labels"].tolist() == [-100] * 8


def test_special_tokens_in_a_text_begin_no_document(corpus, tokenizer):
    found = in_file(token_rows(corpus("ab<|endoftext|>cd", "efgh<|endoftext|>ijkl"), tokenizer, "train"))
    assert found["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, *range(8)]


def test_line_ends_of_other_systems(corpus, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\r\nTwo.\r\n<|endoftext|>\r\nThree and more.\r\n")
    some = Data(source=str(tmp_path / "a.txt"), validation=str(tmp_path / "a.txt"), seq_len=4)
    found = in_file(token_rows(some, tokenizer, "train"))
    assert tokenizer.decode(found["input_ids"].tolist()) == "<|endoftext|>One.\nTwo.<|endoftext|>Three and mor"


def test_tokens_of_two_bytes_and_more(corpus, make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    tokenizer.add_tokens([f"word{i} " for i in range(100_000)])
    text = "word0 word99999 word70000 " * 8
    found = in_file(token_rows(corpus(text, "x" * 20), tokenizer, "train"))["input_ids"].tolist()
    assert found[1:4] == [tokenizer.convert_tokens_to_ids(f"word{i} ") for i in (0, 99999, 70000)]


def test_a_cache_of_an_older_format_is_rebuilt(corpus, tokenizer, cache, caplog):
    some = corpus("short", "another")
    before = in_file(token_rows(some, tokenizer, "train"))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    Path(path).write_bytes(HEADER.pack(b"SUBQTOK1", *HEADER.unpack(whole[: HEADER.size])[1:]) + whole[HEADER.size :])
    after = in_file(token_rows(some, tokenizer, "train"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "is damaged (an older format); tokenising" in caplog.text
    assert path.read_bytes() == whole


def test_rows_differ_only_in_order_from_epoch_to_epoch(corpus, tokenizer):
    rows = token_rows(corpus(*(f"document {i}" for i in range(20))), tokenizer, "train", seed=1)
    n = len(rows)
    epochs = [
        sorted((tuple(r["input_ids"].tolist()), tuple(r["position_ids"].tolist())) for r in rows.take(n, start=e * n))
        for e in range(3)
    ]
    assert all(one == other for one, other in pairwise(epochs))
