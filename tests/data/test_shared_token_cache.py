"""Processes that need the same tokens at once: one tokenizes them, the others wait."""

import json
import os
import signal

import pytest
import torch

from subquad.config import Data
from subquad.data import encoding, packing, token_rows
from tests.helpers.together import note, run_together

WRITER_KILLED_AFTER = 20
"""Arrays of tokens; 16 are written at once."""


@pytest.mark.parametrize("killed", [False, True])
def test_one_of_four_processes_tokenizes(killed, tokenizer, tmp_path, monkeypatch, cache):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"document {i} " * 20}) for i in range(1000)))
    (tmp_path / "valid.txt").write_text("validation text")
    data = Data(source=str(text), validation=str(tmp_path / "valid.txt"), seq_len=64)
    stream, log = packing.token_stream, tmp_path / "writers.log"

    def noted(*args):
        first = note(log) == 1
        for number, tokens in enumerate(stream(*args)):
            if killed and first and number == WRITER_KILLED_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)
            yield tokens

    def tokenize(index):
        rows = token_rows(data, tokenizer, "train")
        torch.save(torch.stack([row["input_ids"] for row in rows]), tmp_path / f"{index}.pt")

    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(encoding, "IN_PROCESS_BATCHES", 10**6)
    monkeypatch.setattr(packing, "token_stream", noted)
    codes = run_together(4, tokenize)
    assert sorted(codes) == ([-signal.SIGKILL] if killed else [0]) + [0, 0, 0]
    assert len(log.read_text().split()) == 1 + killed
    found = [torch.load(path) for path in tmp_path.glob("*.pt")]
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "another"))
    tokenize("alone")
    assert len(found) == 4 - killed
    assert all(rows.equal(torch.load(tmp_path / "alone.pt")) for rows in found)
    assert len(cache()) == 1
