"""Documents within rows: masked or joined, and the loss at their boundaries."""

import json
from itertools import pairwise

import pytest
import torch

from subquad.config import Data
from subquad.data import token_rows
from tests.helpers.token_rows import in_file_order


@pytest.fixture
def make_data(tmp_path):
    def write(*texts: str, **settings) -> Data:
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
        return Data(**{"source": str(path), "validation": str(path), "seq_len": 8, **settings})

    return write


def expected_positions(lengths: list[int], seq_len: int) -> list[int]:
    positions: list[int] = []
    for length in lengths:
        last = 0
        for i in range(length):
            last = 0 if i == 0 or len(positions) % seq_len == 0 else last + 1
            positions.append(last)
    return positions[: len(positions) // seq_len * seq_len]


@pytest.mark.parametrize(
    "texts",
    [
        ["short", "a document that spans several rows", "x", "y", "the last of them"],
        ["one document, much longer than any row " * 20],
        ["a", "b", "c", "d", "e", "f", "g", "h", "i"],
        ["1234567", "1234567", "1234567"],
        ["123456", "12345678", "1234567"],
    ],
    ids=["mixed", "long", "tiny", "one row each", "about one row each"],
)
def test_positions_restart_at_each_document_and_row(make_data, tokenizer, texts):
    rows = token_rows(make_data(*texts), tokenizer, "train")
    found = in_file_order(rows)
    assert set(found) == {"input_ids", "position_ids"}
    assert found["position_ids"].tolist() == expected_positions([1 + len(t) for t in texts], 8)
    row = rows[0]
    assert {key: (value.dtype, value.shape) for key, value in row.items()} == {
        "input_ids": (torch.int64, (8,)),
        "position_ids": (torch.int64, (8,)),
    }


def test_positions_identify_the_document_of_each_token(make_data, tokenizer):
    """Masking relies on this: within a row, t minus its position is where the document of t begins."""
    texts = ["ab", "cdef", "g", "hijklmnopqrstuvw"]
    rows = token_rows(make_data(*texts, seq_len=6), tokenizer, "train")
    found = in_file_order(rows)
    for ids, positions in zip(found["input_ids"].view(-1, 6), found["position_ids"].view(-1, 6), strict=True):
        begin = torch.arange(6) - positions
        for t in range(6):
            part = tokenizer.decode(ids[begin[t] : t + 1].tolist()).removeprefix("<|endoftext|>")
            assert any(part in text for text in texts)


def test_joined_documents_have_no_positions(make_data, tokenizer, make_tokenizer):
    data = make_data("short", "another", "third one", document_masking=False)
    for t in (tokenizer, make_tokenizer(), make_tokenizer(bos_token="<s>")):
        assert set(token_rows(data, t, "train")[0]) == {"input_ids"}


def test_document_masking_is_not_in_the_cache_key(make_data, tokenizer, cache):
    data = make_data("short", "another")
    masked, joined = (
        in_file_order(token_rows(data.model_copy(update={"document_masking": masking}), tokenizer, "train"))
        for masking in (True, False)
    )
    assert torch.equal(masked["input_ids"], joined["input_ids"])
    assert ("position_ids" in masked, "position_ids" in joined) == (True, False)
    assert len(cache()) == 1


def test_end_of_text_tokens_are_in_the_loss_and_other_document_starts_are_not(make_data, tokenizer, make_tokenizer):
    data = make_data("short", "another", "third one")
    assert "labels" not in token_rows(data, tokenizer, "train")[0]
    with_bos = make_tokenizer(bos_token="<s>")
    found = in_file_order(token_rows(data, with_bos, "train"))
    assert torch.equal(found["labels"] == -100, found["input_ids"] == with_bos.bos_token_id)
    without = make_tokenizer()
    found = in_file_order(token_rows(data, without, "train"))
    assert [i for i, label in enumerate(found["labels"].tolist()) if label == -100] == [0, 5, 12]
    kept = found["labels"] != -100
    assert torch.equal(found["labels"][kept], found["input_ids"][kept])


def test_documents_of_one_token_without_a_separator(make_data, make_tokenizer):
    found = in_file_order(token_rows(make_data(*"abcdefgh"), make_tokenizer(), "train"))
    assert found["position_ids"].tolist() == [0] * 8
    assert found["labels"].tolist() == [-100] * 8


def test_special_tokens_in_a_text_do_not_start_a_document(make_data, tokenizer):
    found = in_file_order(token_rows(make_data("ab<|endoftext|>cd", "efgh<|endoftext|>ijkl"), tokenizer, "train"))
    assert found["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, *range(8)]


def test_windows_line_ends(make_data, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\r\nTwo.\r\n<|endoftext|>\r\nThree and more.\r\n")
    data = Data(source=str(tmp_path / "a.txt"), validation=str(tmp_path / "a.txt"), seq_len=4)
    found = in_file_order(token_rows(data, tokenizer, "train"))
    assert tokenizer.decode(found["input_ids"].tolist()) == "<|endoftext|>One.\nTwo.<|endoftext|>Three and mor"


def test_token_ids_beyond_two_bytes(make_data, make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    tokenizer.add_tokens([f"word{i} " for i in range(100_000)])
    text = "word0 word99999 word70000 " * 8
    found = in_file_order(token_rows(make_data(text, "x" * 20), tokenizer, "train"))["input_ids"].tolist()
    assert found[1:4] == [tokenizer.convert_tokens_to_ids(f"word{i} ") for i in (0, 99999, 70000)]


def test_epochs_differ_only_in_the_order_of_rows(make_data, tokenizer):
    rows = token_rows(make_data(*(f"document {i}" for i in range(20))), tokenizer, "train", seed=1)
    n = len(rows)
    epochs = [
        sorted((tuple(r["input_ids"].tolist()), tuple(r["position_ids"].tolist())) for r in rows.take(n, start=e * n))
        for e in range(3)
    ]
    assert all(first == second for first, second in pairwise(epochs))
