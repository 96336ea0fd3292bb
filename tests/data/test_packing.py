"""Rows of tokens: what stands in them, their order, and the cache behind them."""

import json
import logging
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from subquad.config import Data
from subquad.data import packing, token_rows
from subquad.data.encoding import TOKEN
from subquad.utils import UserError, cache_dir

EOS = 256


@pytest.fixture
def source(tmp_path):
    """Three documents and a separate held-out one."""
    path = tmp_path / "a.jsonl"
    texts = ["first document", "second, somewhat longer document", "third"]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (tmp_path / "valid.txt").write_text("held-out text")
    return Data(source=str(path), validation=str(tmp_path / "valid.txt"), seq_len=8)


@pytest.fixture
def long_source(tmp_path):
    """A text of 400,000 bytes in 400 documents, each of other content."""
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i:03d} " * 250}) for i in range(400)))
    (tmp_path / "valid.txt").write_text("held-out text")
    return Data(source=str(path), validation=str(tmp_path / "valid.txt"), seq_len=64)


def stream(rows, tokenizer) -> str:
    """The text of an epoch's rows in the order in which they stand in the file."""
    return tokenizer.decode(in_file(rows).flatten().tolist())


def in_file(rows) -> torch.Tensor:
    """[rows, context] in the order in which they stand in the first file."""
    return torch.from_numpy((rows._tokens[0] & TOKEN).astype("int64"))


def epoch(rows, number: int = 0) -> torch.Tensor:
    return torch.stack([r["input_ids"] for r in rows.take(len(rows), start=number * len(rows))])


def test_documents_follow_each_other_behind_the_separator(source, tokenizer):
    rows = token_rows(source, tokenizer, "train")
    expected = "<|endoftext|>first document<|endoftext|>second, somewhat longer document<|endoftext|>third"
    assert len(rows) == (14 + 32 + 5 + 3) // 8
    assert stream(rows, tokenizer) == expected[: len(stream(rows, tokenizer))]
    row = rows[0]["input_ids"]
    assert (row.dtype, row.shape) == (torch.int64, (8,))


def test_separator_is_the_end_else_the_beginning_else_nothing(source, make_tokenizer):
    both = make_tokenizer(bos_token="<s>", eos_token="</s>")
    assert stream(token_rows(source, both, "train"), both).startswith("</s>first")
    begin = make_tokenizer(bos_token="<s>")
    assert stream(token_rows(source, begin, "train"), begin).startswith("<s>first")
    assert stream(token_rows(source, make_tokenizer(), "train"), make_tokenizer()).startswith("first documentsecond")


def test_order_is_a_permutation_by_the_seed(long_source, tokenizer):
    rows = token_rows(long_source, tokenizer, "train", seed=1)
    first = epoch(rows)
    assert torch.equal(first, epoch(token_rows(long_source, tokenizer, "train", seed=1)))
    other = epoch(token_rows(long_source, tokenizer, "train", seed=2))
    assert not torch.equal(first, other)
    written = in_file(rows)
    assert not torch.equal(first, written)
    for permuted in (first, other, epoch(rows, 1)):
        assert sorted(permuted.tolist()) == sorted(written.tolist())
    assert not torch.equal(epoch(rows, 1), first)


def test_rows_go_on_over_epochs_from_anywhere(source, tokenizer):
    rows = token_rows(source, tokenizer, "train", seed=3)
    n = len(rows)
    straight = [rows[i]["input_ids"].tolist() for i in range(3 * n)]
    assert [rows[i]["input_ids"].tolist() for i in reversed(range(3 * n))] == straight[::-1]
    assert [r["input_ids"].tolist() for r in rows.take(n + 2, start=n - 1)] == straight[n - 1 : 2 * n + 1]
    assert [r["input_ids"].tolist() for r in rows] == straight[:n]
    assert len(rows.take(n + 2)) == n + 2
    for wrong in (-1, n + 2):
        with pytest.raises(IndexError):
            rows.take(n + 2)[wrong]
    with pytest.raises(IndexError):
        rows[-1]


def test_worker_processes_read_the_same(long_source, tokenizer):
    rows = token_rows(long_source, tokenizer, "train")
    rows[0]
    assert len(pickle.dumps(rows)) < 1000
    view = pickle.loads(pickle.dumps(rows)).take(20, start=3)
    loaded = [batch["input_ids"] for batch in DataLoader(view, batch_size=4, num_workers=1)]
    assert torch.equal(torch.cat(loaded), torch.stack([r["input_ids"] for r in view]))


def test_training_and_held_out_rows_share_no_text(tmp_path, tokenizer):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"{i:07d}" for i in range(4000)))
    corpus = Data(source=str(path), seq_len=16)
    numbers = [
        set(re.findall(r"\d{7}", stream(token_rows(corpus, tokenizer, split), tokenizer)))
        for split in ("train", "validation")
    ]
    assert numbers[0] & numbers[1] == set()
    assert len(numbers[0]) > 3700
    assert len(numbers[1]) > 190


# ---------------------------------------------------------------------- limits


def test_a_limit_reads_no_more_than_it_takes(long_source, tokenizer, monkeypatch):
    read = []
    original = packing.part_documents
    monkeypatch.setattr(packing, "part_documents", lambda *a: (read.append(t) or t for t in original(*a)))
    rows = token_rows(long_source, tokenizer, "train", limit=1000)
    assert len(rows) == 16  # 1,000 tokens, rounded up to whole rows of 64
    assert len(read) <= 2 * packing.SMALLEST_LIMIT // 1000 + 2
    found = epoch(token_rows(long_source, tokenizer, "train", limit=1000)).tolist()
    assert set(map(tuple, found)) <= set(map(tuple, epoch(token_rows(long_source, tokenizer, "train")).tolist()))


def test_similar_limits_share_a_cache_file(long_source, tokenizer, cache):
    for limit in (1, 1000, 60_000):
        token_rows(long_source, tokenizer, "train", limit=limit)
    assert len(list(cache.iterdir())) == 1
    assert len(token_rows(long_source, tokenizer, "train", limit=70_000)) == 1094
    assert len(list(cache.iterdir())) == 2
    assert len(token_rows(long_source, tokenizer, "train", limit=10**9)) == 400 * 1001 // 64


# ---------------------------------------------------------------------- the cache


def test_cache_place(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SUBQUAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/subquad")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "subquad"


def test_text_is_tokenised_once(source, tokenizer, cache, monkeypatch):
    before = epoch(token_rows(source, tokenizer, "train"))
    monkeypatch.setattr(packing, "token_stream", None)
    # what a tokenizer was last called with is no part of what it is
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert torch.equal(epoch(token_rows(source, tokenizer, "train")), before)
    assert [p.suffix for p in cache.iterdir()] == [".tokens"]


def test_another_text_or_tokenizer_is_another_file(source, tokenizer, make_tokenizer, cache):
    token_rows(source, tokenizer, "train")
    token_rows(source, tokenizer, "validation")
    assert len(list(cache.iterdir())) == 2
    token_rows(source, make_tokenizer(eos_token="</s>"), "train")
    assert len(list(cache.iterdir())) == 3
    stat = os.stat(source.source)
    Path(source.source).write_text('{"text": "another text altogether"}')
    os.utime(source.source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert "another" in stream(token_rows(source, tokenizer, "train"), tokenizer)
    assert len(list(cache.iterdir())) == 4


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "cut off": (cut_off, "bytes, expected"),
    "a bit flipped": (flip, "its checksum is wrong"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "something else": (lambda path: path.write_bytes(b"x" * 200), "another format"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_rebuilt_and_said_aloud(source, tokenizer, cache, caplog, damage):
    before = epoch(token_rows(source, tokenizer, "train"))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    spoil, message = DAMAGE[damage]
    spoil(path)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(epoch(token_rows(source, tokenizer, "train")), before)
    assert len(caplog.records) == 1
    assert f"{path} is damaged" in caplog.text
    assert message in caplog.text
    assert path.read_bytes() == whole


def test_an_interrupted_write_leaves_nothing(source, tokenizer, cache, monkeypatch):
    original = packing.token_stream

    def interrupted(*args):
        yield from original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "token_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        token_rows(source, tokenizer, "train")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_users_error(source, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*; set SUBQUAD_CACHE to another directory"):
        token_rows(source, tokenizer, "train")


# ---------------------------------------------------------------------- what is refused and what is not said


def test_too_little_text(source, tokenizer):
    short = source.model_copy(update={"seq_len": 64})
    with pytest.raises(UserError) as caught:
        token_rows(short, tokenizer, "train")
    assert str(caught.value) == (
        f"corpus {short.source!r} has 54 tokens of training text, too few for one row; "
        "expected at least data.seq_len = 64"
    )
    with pytest.raises(UserError, match=r"valid.txt' has 14 tokens of held-out text, too few for one row"):
        token_rows(short, tokenizer, "validation")


def test_an_empty_text(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="has 0 tokens of training text"):
        token_rows(Data(source=str(tmp_path / "empty.txt")), tokenizer, "train")


def test_bad_text_leaves_no_cache(tmp_path, tokenizer, cache):
    (tmp_path / "bad.txt").write_bytes(b"good text\n\n\xff")
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 at byte 11"):
        token_rows(Data(source=str(tmp_path / "bad.txt"), seq_len=2), tokenizer, "train")
    assert list(cache.iterdir()) == []


def test_long_documents_raise_no_warning(source, tokenizer, caplog, capfd):
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    try:
        token_rows(source, tokenizer, "train")  # documents of more than the tokenizer's 16 tokens
    finally:
        transformers_logging.disable_propagation()
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_standard_library(tokenizer):
    corpus = Data(source="python-stdlib", seq_len=512)
    rows = token_rows(corpus, tokenizer, "train", limit=20_000)
    assert len(rows) == 40
    assert "import" in stream(rows, tokenizer)
