"""Packed rows: their content, their order, and the token cache."""

import json
import logging
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from subquad.config import Data
from subquad.data import packing, token_rows
from subquad.data.encoding import DOC_START
from subquad.utils import UserError, cache_dir
from tests.helpers.token_rows import in_file_order

EOS = 256


@pytest.fixture
def source(tmp_path):
    """Three documents, and another for validation."""
    path = tmp_path / "a.jsonl"
    texts = ["first document", "second, somewhat longer document", "third"]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (tmp_path / "valid.txt").write_text("validation text")
    return Data(source=str(path), validation=str(tmp_path / "valid.txt"), seq_len=8)


@pytest.fixture
def long_source(tmp_path):
    """400 different documents of 1,000 bytes."""
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i:03d} " * 250}) for i in range(400)))
    (tmp_path / "valid.txt").write_text("validation text")
    return Data(source=str(path), validation=str(tmp_path / "valid.txt"), seq_len=64)


def text_of(rows, tokenizer) -> str:
    """The text of all rows in file order."""
    return tokenizer.decode(in_file_order(rows)["input_ids"].tolist())


def epoch(rows, number: int = 0) -> torch.Tensor:
    return torch.stack([r["input_ids"] for r in rows.take(len(rows), start=number * len(rows))])


def test_documents_are_concatenated_with_separators(source, tokenizer):
    rows = token_rows(source, tokenizer, "train")
    expected = "<|endoftext|>first document<|endoftext|>second, somewhat longer document<|endoftext|>third"
    assert len(rows) == (14 + 32 + 5 + 3) // 8
    assert text_of(rows, tokenizer) == expected[: len(text_of(rows, tokenizer))]
    row = rows[0]["input_ids"]
    assert (row.dtype, row.shape) == (torch.int64, (8,))


def test_separator_is_eos_or_bos_or_nothing(source, make_tokenizer):
    both = make_tokenizer(bos_token="<s>", eos_token="</s>")
    assert text_of(token_rows(source, both, "train"), both).startswith("</s>first")
    with_bos = make_tokenizer(bos_token="<s>")
    assert text_of(token_rows(source, with_bos, "train"), with_bos).startswith("<s>first")
    assert text_of(token_rows(source, make_tokenizer(), "train"), make_tokenizer()).startswith("first documentsecond")


def test_order_is_a_seeded_permutation(long_source, tokenizer):
    rows = token_rows(long_source, tokenizer, "train", seed=1)
    first = epoch(rows)
    assert torch.equal(first, epoch(token_rows(long_source, tokenizer, "train", seed=1)))
    other = epoch(token_rows(long_source, tokenizer, "train", seed=2))
    assert not torch.equal(first, other)
    stored = in_file_order(rows)["input_ids"].view(first.shape)
    assert not torch.equal(first, stored)
    for permuted in (first, other, epoch(rows, 1)):
        assert sorted(permuted.tolist()) == sorted(stored.tolist())
    assert not torch.equal(epoch(rows, 1), first)


def test_rows_continue_across_epochs_from_any_index(source, tokenizer):
    rows = token_rows(source, tokenizer, "train", seed=3)
    n = len(rows)
    in_order = [rows[i]["input_ids"].tolist() for i in range(3 * n)]
    assert [rows[i]["input_ids"].tolist() for i in reversed(range(3 * n))] == in_order[::-1]
    assert [r["input_ids"].tolist() for r in rows.take(n + 2, start=n - 1)] == in_order[n - 1 : 2 * n + 1]
    assert [r["input_ids"].tolist() for r in rows] == in_order[:n]
    assert len(rows.take(n + 2)) == n + 2
    with pytest.raises(IndexError):
        rows.take(n + 2)[n + 2]
    with pytest.raises(IndexError):
        rows[-1]


def test_data_loader_workers_read_the_same_rows(long_source, tokenizer):
    rows = token_rows(long_source, tokenizer, "train")
    rows[0]
    assert len(pickle.dumps(rows)) < 5000  # the rows are in files
    view = pickle.loads(pickle.dumps(rows)).take(20, start=3)
    loaded = [batch["input_ids"] for batch in DataLoader(view, batch_size=4, num_workers=1)]
    assert torch.equal(torch.cat(loaded), torch.stack([r["input_ids"] for r in view]))


def test_training_and_validation_rows_share_no_text(tmp_path, tokenizer):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"{i:07d}" for i in range(4000)))
    data = Data(source=str(path), seq_len=16)
    numbers = [
        set(re.findall(r"\d{7}", text_of(token_rows(data, tokenizer, split), tokenizer)))
        for split in ("train", "validation")
    ]
    assert numbers[0] & numbers[1] == set()
    assert len(numbers[0]) > 3700
    assert len(numbers[1]) > 190


# ---------------------------------------------------------------------- limits


def test_limit_reads_only_as_much_as_it_needs(long_source, tokenizer, monkeypatch):
    read = []
    original = packing.read
    monkeypatch.setattr(packing, "read", lambda source: (read.append(t) or t for t in original(source)))
    rows = token_rows(long_source, tokenizer, "train", limit=1000)
    assert len(rows) == 16  # 1,000 tokens, rounded up to whole rows of 64
    assert len(read) <= 2 * packing.MIN_CACHED_TOKENS // 1000 + 2
    found = epoch(token_rows(long_source, tokenizer, "train", limit=1000)).tolist()
    assert set(map(tuple, found)) <= set(map(tuple, epoch(token_rows(long_source, tokenizer, "train")).tolist()))


def test_similar_limits_share_a_cache_file(long_source, tokenizer, cache):
    for limit in (1, 1000, 60_000):
        token_rows(long_source, tokenizer, "train", limit=limit)
    assert len(cache()) == 1
    assert len(token_rows(long_source, tokenizer, "train", limit=70_000)) == 1094
    assert len(cache()) == 2
    assert len(token_rows(long_source, tokenizer, "train", limit=10**9)) == 400 * 1001 // 64


# ---------------------------------------------------------------------- the cache


def test_cache_directory(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SUBQUAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/subquad")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "subquad"


def test_text_is_tokenized_once(source, tokenizer, cache, monkeypatch):
    before = epoch(token_rows(source, tokenizer, "train"))
    monkeypatch.setattr(packing, "token_stream", None)
    # Padding and truncation of earlier calls do not change the fingerprint.
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert torch.equal(epoch(token_rows(source, tokenizer, "train")), before)
    assert len(cache()) == 1


def test_text_and_tokenizer_are_in_the_cache_key(source, tokenizer, make_tokenizer, cache):
    token_rows(source, tokenizer, "train")
    token_rows(source, tokenizer, "validation")
    assert len(cache()) == 2
    token_rows(source, make_tokenizer(eos_token="</s>"), "train")
    assert len(cache()) == 3
    stat = os.stat(source.source)
    Path(source.source).write_text('{"text": "another text altogether"}')
    os.utime(source.source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert "another" in text_of(token_rows(source, tokenizer, "train"), tokenizer)
    assert len(cache()) == 4


def flip(path):
    raw = path.read_bytes()
    at = raw.index(np.uint32(EOS | DOC_START).tobytes())
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])


DAMAGE = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "Expected to be able to read"),
    "a bit flipped": (flip, "wrong checksum"),
    "empty": (lambda path: path.write_bytes(b""), "length 0"),
    "something else": (lambda path: path.write_bytes(b"x" * 200), "Expected to read"),
    "removed": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_rebuilt_with_a_warning(source, tokenizer, cache, caplog, damage):
    before = epoch(token_rows(source, tokenizer, "train"))
    (path,) = cache()
    whole = path.read_bytes()
    apply_damage, message = DAMAGE[damage]
    apply_damage(path)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(epoch(token_rows(source, tokenizer, "train")), before)
    assert len(caplog.records) == 1
    assert f"token cache {path.parent} is damaged" in caplog.text
    assert message in caplog.text
    assert path.read_bytes() == whole


def test_interrupted_write_leaves_no_file(source, tokenizer, cache, monkeypatch):
    original = packing.token_stream

    def interrupted(*args):
        yield from original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "token_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        token_rows(source, tokenizer, "train")
    assert cache() == []


def test_unwritable_cache_is_a_user_error(source, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"token cache .*SUBQUAD_CACHE"):
        token_rows(source, tokenizer, "train")


# ---------------------------------------------------------------------- errors and warnings


def test_too_little_text(source, tokenizer):
    short = source.model_copy(update={"seq_len": 64})
    with pytest.raises(UserError, match=r"^data.source '.*': got 54 tokens .*data.seq_len = 64"):
        token_rows(short, tokenizer, "train")
    with pytest.raises(UserError, match=r"^data.validation '.*valid.txt': got 16 tokens of validation text"):
        token_rows(short, tokenizer, "validation")


def test_empty_text(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="got 0 tokens of training text"):
        token_rows(Data(source=str(tmp_path / "empty.txt")), tokenizer, "train")


def test_invalid_text_leaves_no_cache(tmp_path, tokenizer, cache):
    (tmp_path / "bad.txt").write_bytes(b"good text\n\n\xff")
    with pytest.raises(UserError, match=r"bad\.txt: got 0xff at byte 11"):
        token_rows(Data(source=str(tmp_path / "bad.txt"), seq_len=2), tokenizer, "train")
    assert cache() == []


def test_long_documents_cause_no_warning(source, tokenizer, caplog, capfd):
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    try:
        token_rows(source, tokenizer, "train")  # documents of more than the tokenizer's 16 tokens
    finally:
        transformers_logging.disable_propagation()
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_standard_library(tokenizer):
    data = Data(source="python-stdlib", seq_len=512)
    rows = token_rows(data, tokenizer, "train", limit=20_000)
    assert len(rows) == 40
    assert "import" in text_of(rows, tokenizer)
