"""Tokenizing in several processes: the same tokens as in one, and no processes left afterwards."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from subquad.data import encoding
from subquad.data.chat import Conversation
from subquad.data.encoding import DOC_START, TOKEN_MASK, Encoder, token_stream
from subquad.data.workers import Workers
from subquad.utils import UserError

DOCUMENTS = [f"document {i} " + "word " * (i * 7 % 50) for i in range(300)]


@pytest.fixture
def small(monkeypatch):
    """Batches of a few documents, and worker processes after the first batch."""
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(encoding, "IN_PROCESS_BATCHES", 1)


def tokens(tokenizer, limit=None, jobs=1, documents=DOCUMENTS) -> np.ndarray:
    return np.concatenate(list(token_stream(Encoder(tokenizer), iter(documents), limit, "a source", jobs)))


TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TALKS = [Conversation.from_messages(TALK * (i % 9 + 1), f"talk {i}") for i in range(300)]


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.usefixtures("small")
def test_tokens_do_not_depend_on_the_number_of_processes(tokenizer):
    one = tokens(tokenizer)
    before = children()
    assert np.array_equal(tokens(tokenizer, jobs=2), one)
    cut = tokens(tokenizer, limit=20_000)
    assert np.array_equal(tokens(tokenizer, limit=20_000, jobs=2), cut)
    assert children() == before
    assert np.array_equal(cut, one[: len(cut)])
    assert len(cut) >= 20_000 > np.flatnonzero(cut & DOC_START)[-1]


@pytest.mark.usefixtures("small")
def test_conversations_use_worker_processes_by_default(tokenizer, monkeypatch):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    encoder = Encoder(tokenizer, assistant_only_loss=True)
    one = np.concatenate(list(token_stream(encoder, iter(TALKS), None, "a source", 1)))
    started = []
    monkeypatch.setattr(encoding, "usable_processors", lambda: 2)
    monkeypatch.setattr(encoding, "Workers", lambda *a: started.append(a[1]) or Workers(*a))
    found = np.concatenate(list(token_stream(encoder, iter(TALKS), None, "a source")))
    assert np.array_equal(found, one)
    assert started == [2]
    tokens(tokenizer, jobs=None)
    assert started == [2]  # plain text needs no workers


@pytest.mark.parametrize("characters", [1, 500, 10**6])
def test_tokens_do_not_depend_on_the_batch_size(tokenizer, monkeypatch, characters):
    expected = tokens(tokenizer, limit=5000)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", characters)
    assert np.array_equal(tokens(tokenizer, limit=5000), expected)


@pytest.mark.usefixtures("small")
def test_reading_error_stops_the_workers(tokenizer):
    def broken():
        yield from DOCUMENTS[:200]
        raise UserError("a.txt: got 0xff at byte 5")

    before = children()
    with pytest.raises(UserError, match="got 0xff at byte 5"):
        tokens(tokenizer, jobs=2, documents=broken())
    assert children() == before


def test_worker_errors_are_raised(tokenizer):
    with Workers(Encoder(tokenizer), 1) as workers:
        assert list(workers.map([["a"], ["bc"]]))[1].tolist() == [256 | DOC_START, *tokenizer("bc")["input_ids"]]
        with pytest.raises(RuntimeError, match="has no attribute"):
            list(workers.map([[5]]))
        (process,) = children()
        process.kill()
        with pytest.raises(RuntimeError, match="status -9"):
            list(workers.map([["a"]]))


def test_small_text_starts_no_worker(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "Workers", None)
    assert len(tokens(tokenizer, jobs=2)) == len(tokens(tokenizer, jobs=1))


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
import sys, time, types
root, mode = sys.argv[1:]
sys.path.insert(0, root)
# Packages without their __init__, which imports torch.
for name, path in {"subquad": "subquad", "subquad.data": "subquad/data"}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [f"{root}/{path}"]
from subquad.data import encoding
from subquad.data.chat import Conversation
from subquad.data.cache import cached_token_file
from tests.data.conftest import byte_tokenizer

def documents():
    for i in range(100):
        if i == 60:
            print("half", flush=True)
            time.sleep(60 if mode == "hang" else 0.5)
        yield f"document {i} " * 10

encoding.BATCH_CHARACTERS, encoding.IN_PROCESS_BATCHES = 2000, 1 if mode == "hang" else 1000
encoder = encoding.Encoder(byte_tokenizer(eos_token="<|endoftext|>"))
tokens = lambda: encoding.token_stream(encoder, documents(), None, "a source", 2)
print(cached_token_file("key", "a source", tokens), flush=True)
"""


def start_process(mode: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[2]), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_process_leaves_no_cache_and_two_at_once_share_one(cache):
    killed = start_process("hang")
    assert killed.stdout.readline() == "half\n", killed.communicate()
    workers = psutil.Process(killed.pid).children()
    assert len(workers) == 2
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert not list(cache.glob("*.tokens"))
    assert len(list(cache.glob("*.partial"))) == 1

    both = [start_process("slow") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (file,) = cache.iterdir()  # the partial file of the killed process is gone
    printed = sorted((out for out, _ in outputs), key=len)
    # One tokenized, the other waited for it.
    assert printed[1] == f"half\n{printed[0]}"
    assert str(file) in printed[0]


LOCK = """
import logging, sys, types
(root,) = sys.argv[1:]
for name, path in {"subquad": "subquad", "subquad.data": "subquad/data"}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [f"{root}/{path}"]
import numpy as np
from subquad.data.cache import cached_token_file

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")

def tokens():
    print("tokenizing", flush=True)
    if sys.stdin.readline() == "fail\\n":
        raise RuntimeError("failed")
    yield np.arange(5)

print(cached_token_file("key", "a source", tokens)[1], flush=True)
"""


def test_process_waits_after_another_has_failed(cache):
    """The first fails while the second waits; the third must wait for the second."""
    command = [sys.executable, "-c", LOCK, str(Path(__file__).parents[2])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **pipes)
    assert first.stdout.readline() == "tokenizing\n"
    second = subprocess.Popen(command, **pipes)
    assert second.stdout.readline() == "waiting for another process that is tokenizing a source\n"
    assert "RuntimeError: failed" in first.communicate("fail\n", timeout=60)[1]
    assert second.stdout.readline() == "tokenizing\n"
    third = subprocess.Popen(command, **pipes)
    assert third.stdout.readline() == "waiting for another process that is tokenizing a source\n"
    assert second.communicate("go on\n", timeout=60) == ("5\n", "")
    assert third.communicate("go on\n", timeout=60) == ("5\n", "")
    (file,) = cache.iterdir()
    assert file.suffix == ".tokens"
