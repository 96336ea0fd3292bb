"""Tokenizing in several processes: the same tokens as in one, and no processes left afterwards."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from subquad.data import encoding
from subquad.data.chat import Conversation
from subquad.data.encoding import DOC_START, TOKEN_MASK, Encoder, token_stream
from subquad.utils import UserError
from tests.data.conftest import byte_tokenizer

DOCUMENTS = [f"document {i} " + "word " * (i * 7 % 50) for i in range(300)]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TALKS = [Conversation.from_messages(TALK * (i % 9 + 1), f"talk {i}") for i in range(300)]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
    "{% if m['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)


@pytest.fixture
def chat():
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    return Encoder(tokenizer, assistant_only_loss=True)


@pytest.fixture
def workers(monkeypatch):
    """Batches of a few documents, and two worker processes after the first batch; lists the numbers of workers."""
    started, loader = [], encoding.DataLoader
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(encoding, "IN_PROCESS_BATCHES", 1)
    monkeypatch.setattr(encoding.os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(
        encoding,
        "DataLoader",
        lambda *args, **options: started.append(options["num_workers"]) or loader(*args, **options),
    )
    return started


def tokens(encoder, documents, limit=10**9) -> np.ndarray:
    return np.concatenate(list(token_stream(encoder, iter(documents), limit, "a source")))


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


def test_tokens_do_not_depend_on_the_number_of_processes(chat, workers):
    one, before, state = chat.encode(TALKS), children(), torch.get_rng_state()
    assert np.array_equal(tokens(chat, TALKS), one)
    cut = tokens(chat, TALKS, limit=8000)
    assert np.array_equal(cut, one[: len(cut)])
    assert len(cut) >= 8000 > np.flatnonzero(cut & DOC_START)[-1]
    assert workers == [2, 2]
    assert children() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_plain_text_and_small_text_start_no_worker(chat, workers):
    assert np.array_equal(tokens(chat, DOCUMENTS), chat.encode(DOCUMENTS))
    assert np.array_equal(tokens(chat, TALKS[:3]), chat.encode(TALKS[:3]))
    assert workers == []


@pytest.mark.parametrize("characters", [1, 500, 10**6])
def test_tokens_do_not_depend_on_the_batch_size(chat, monkeypatch, characters):
    expected = tokens(chat, DOCUMENTS, limit=5000)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", characters)
    assert np.array_equal(tokens(chat, DOCUMENTS, limit=5000), expected)


def unreadable():
    yield from TALKS[:200]
    raise UserError("a.txt: got 0xff at byte 5")


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        (unreadable, UserError, r"^a.txt: got 0xff at byte 5$"),
        (
            lambda: [*TALKS, Conversation(({"role": "bad", "content": "hi"},), "a.jsonl:7")],
            UserError,
            r"^a.jsonl:7: the chat template rejects this conversation \(no such role\)$",
        ),
        (lambda: [*TALKS, TALKS[0], ["not a conversation"]], RuntimeError, "AttributeError: .*has no attribute"),
    ],
    ids=["reading", "template", "bug"],
)
def test_errors_stop_the_workers(chat, workers, documents, error, message):
    chat.assistant_only_loss = False
    before = children()
    with pytest.raises(error, match=message):
        tokens(chat, documents())
    assert workers == [2]
    assert children() == before


def test_killed_worker_raises(chat, workers):
    before = children()

    def kill_workers():
        for _ in token_stream(chat, iter(TALKS * 20), 10**9, "a source"):
            for process in set(children()) - set(before):
                process.kill()

    with pytest.raises(RuntimeError, match=r"^DataLoader worker .* (exited unexpectedly|is killed by signal)"):
        kill_workers()


def test_encoder_matches_the_tokenizer(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    texts = ["a text", "ünï <|endoftext|> inside", ""]
    found = Encoder(tokenizer).encode(texts)
    expected = [token for text in texts for token in [256, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
    assert (found & TOKEN_MASK).tolist() == expected
    assert np.flatnonzero(found & DOC_START).tolist() == [0, 7, len(found) - 1]
    assert Encoder(make_tokenizer()).encode(["", "x", ""]).tolist() == [
        make_tokenizer()("x")["input_ids"][0] | DOC_START
    ]


SCRIPT = """
import os, sys, time
mode = sys.argv[1]
from subquad.config import Data
from subquad.data import encoding, packing
from tests.data.test_workers import TALKS, TEMPLATE, byte_tokenizer

def talks(source):
    for i, talk in enumerate(TALKS):
        if i == 150:
            print("half", flush=True)
            time.sleep(60 if mode == "hang" else 0.5)
        yield talk

packing.read = talks
encoding.BATCH_CHARACTERS, encoding.IN_PROCESS_BATCHES = 500, 1
os.sched_getaffinity = lambda process: {0, 1}
tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
tokenizer.chat_template = TEMPLATE
print(len(packing.token_rows(Data(source="README.md", seq_len=8), tokenizer, "train")), flush=True)
"""


def start_process(mode: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, mode]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes)


def test_killed_process_leaves_no_cache_and_two_at_once_share_one(cache, chat):
    killed = start_process("hang")
    assert killed.stdout.readline() == "half\n", killed.communicate()
    workers = psutil.Process(killed.pid).children()
    assert len(workers) == 2
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    psutil.wait_procs(workers, timeout=15)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert all(".incomplete" in str(path) for path in cache())

    both = [start_process("slow") for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (path,) = cache()  # the incomplete file of the killed process is gone
    assert ".incomplete" not in str(path)
    chat.assistant_only_loss = False
    count = len(chat.encode(TALKS)) // 8
    # One tokenized, the other waited for it.
    assert sorted(out for out, _ in outputs) == [f"{count}\n", f"half\n{count}\n"]
