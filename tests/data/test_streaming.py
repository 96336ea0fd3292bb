"""Streamed text: the rows of any format, the same after a resume at any row, shared out among processes."""

import gzip
import json
import re
from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from tokenizers.processors import TemplateProcessing

from subquad.config import Data
from subquad.data import StreamedDataset, corpora, streaming, token_rows
from subquad.utils import UserError
from tests.data.conftest import byte_tokenizer
from tests.helpers.token_rows import in_file_order

COUNT = 240


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Shards and batches of tokens that are smaller than these texts."""
    monkeypatch.setattr(corpora, "SHARD_BYTES", 1500)
    monkeypatch.setattr(streaming, "BATCH_CHARACTERS", 300)


def record(i: int) -> dict[str, str]:
    return {"text": f"doc{i:04d} " + "abc" * (i % 9)}


def jsonl(records) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def write_parquet(path, records):
    Dataset.from_list(records).to_parquet(path, batch_size=50)


WRITERS = {
    "jsonl": lambda path, records: path.write_bytes(jsonl(records)),
    "jsonl.gz": lambda path, records: path.write_bytes(gzip.compress(jsonl(records))),
    "jsonl.zst": lambda path, records: path.write_bytes(corpora.zstd.compress(jsonl(records))),
    "parquet": write_parquet,
    "txt": lambda path, records: path.write_text("\n<|endoftext|>\n".join(r["text"] for r in records)),
}


@pytest.fixture
def write(tmp_path):
    """Writes `COUNT` documents into some files of a format. Data with them as training text, all or the train split."""

    def data(kind="jsonl", files=4, split=False, **changes):
        directory = tmp_path / f"{kind}{files}"
        directory.mkdir()
        for k in range(files):
            WRITERS[kind](directory / f"{k}.{kind}", [record(i) for i in range(k, COUNT, files)])
        (tmp_path / "valid.txt").write_text("x" * 100)
        validation = None if split else str(tmp_path / "valid.txt")
        return Data(source=str(directory), validation=validation, **{"seq_len": 16, "shuffle_buffer": 7, **changes})

    return data


def stream(data, process=0, processes=1, tokenizer=None, seed=3) -> StreamedDataset:
    tokenizer = tokenizer or byte_tokenizer(eos_token="<|endoftext|>")
    beginning = token_rows(data, tokenizer, "train", limit=100)
    return StreamedDataset(data, tokenizer, beginning, seed=seed, process=process, processes=processes)


def ids(rows, start, stop):
    return [rows[i]["input_ids"].tolist() for i in range(start, stop)]


def check_resume(make, states_of=lambda state: [state], total=420, step=19):
    """Rows from any row on are those of a stream that was not interrupted; `total` is more than an epoch."""
    rows = make()
    states, whole = [], []
    for i in range(total):
        # accelerate has read the next batch when a checkpoint is saved
        row = rows[i]["input_ids"].tolist()
        states.append(json.dumps(rows.state(max(0, i - 2))))
        whole.append(row)
    for i in range(2, total, step):
        again = make()
        again.load_state(states_of(json.loads(states[i])))
        assert ids(again, i - 2, min(i + 18, total)) == whole[i - 2 : i + 18], i
    return whole


@pytest.mark.parametrize(
    ("kind", "files", "buffer"),
    [("jsonl", 4, 7), ("jsonl", 1, 1), ("jsonl.gz", 3, 64), ("jsonl.zst", 1, 10), ("parquet", 2, 7), ("txt", 5, 30)],
)
def test_resume_at_any_row(kind, files, buffer, write):
    data = write(kind, files, shuffle_buffer=buffer)
    whole = check_resume(lambda: stream(data))
    assert len({tuple(row) for row in whole}) > 250
    assert ids(stream(data, seed=4), 0, 150) != whole[:150]


@pytest.mark.parametrize("files", [1, 4])
def test_resume_of_one_of_two_processes(files, write):
    data = write("jsonl.gz", files, split=True)
    check_resume(lambda: stream(data, 1, 2), lambda state: [{}, state], total=200)


@pytest.mark.parametrize(
    ("kind", "processes", "streamed"),
    [("json", 1, True), ("parquet", 2, True), ("json", 3, True), ("parquet", 1, False)],
)
def test_resume_of_a_dataset_of_the_hub(kind, processes, streamed, write, monkeypatch):
    """Two shards: whole ones for one or two processes, every third row for three."""
    local = write("jsonl" if kind == "json" else kind, 2)
    files = sorted(map(str, corpora.Path(local.source).iterdir()))

    def load(name, subset, split, streaming):
        return load_dataset(kind, data_files=files, split=split, streaming=streaming)

    monkeypatch.setattr("subquad.hub.hub_problem", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", load)
    data = local.model_copy(update={"source": "owner/texts", "streaming": streamed})
    whole = check_resume(
        lambda: stream(data, processes - 1, processes),
        lambda state: [{}] * (processes - 1) + [state],
        total=420 // processes,
    )
    assert len({tuple(row) for row in whole}) > 300 // processes


@pytest.mark.parametrize(("files", "processes"), [(1, 1), (4, 1), (4, 3), (1, 2)])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_processes_share_an_epoch_out(kind, files, processes, write):
    """Every document once, in one of the processes: as parts of files, as files, or every second one."""
    data = write(kind, files, shuffle_buffer=1)
    found = Counter()
    for process in range(processes):
        rows = stream(data, process, processes)
        tokens = [t for row in iter_first_epoch(rows) for t in row]
        found.update(re.findall(r"doc(\d{4})", rows.streams[0].encoder.tokenizer.decode(tokens)))
    assert len(found) == COUNT
    assert sum(found.values()) <= COUNT + processes  # the last row may have a document of the next epoch


def iter_first_epoch(rows):
    for i in range(10**6):
        yield rows[i]["input_ids"].tolist()
        if rows.state(i + 1)["sources"][0]["epoch"]:
            return


@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("special", [{"eos_token": "<e>"}, {"bos_token": "<b>", "eos_token": "<e>"}, {}])
def test_rows_have_the_form_of_packed_rows(special, masking, write):
    """In file order, since one shard is read and a block is one row."""
    data = write("txt", 1, shuffle_buffer=1, document_masking=masking)
    tokenizer = byte_tokenizer(**special)
    if "bos_token" in special:
        bos = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<b> $A", special_tokens=[("<b>", bos)])
    packed = in_file_order(token_rows(data, tokenizer, "train"))
    rows = stream(data, tokenizer=tokenizer)
    items = [rows[i] for i in range(len(packed["input_ids"]) // 16)]
    assert items[0].keys() == packed.keys()
    for key, expected in packed.items():
        assert torch.equal(torch.cat([item[key] for item in items]), expected), key


def test_a_resume_reads_from_its_shard_on(write, monkeypatch):
    data = write("jsonl.gz", 6)
    rows = stream(data)
    last = [rows.state(i) for i in range(300) if rows[i]][-1]
    opened = []
    read = corpora._documents_of
    monkeypatch.setattr(corpora, "_documents_of", lambda *args: opened.append(args[0]) or read(*args))
    again = stream(data)
    opened.clear()
    again.load_state([last])
    assert ids(again, 299, 300) == ids(rows, 299, 300)
    assert len(opened) <= 2


def test_parts_of_a_file_are_its_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(record(i) for i in range(50)).replace(b"\n", b"\r\n"))
    source = corpora.resolve(str(path))
    expected = [record(i)["text"] for i in range(50)]
    for size in (1, 37, 500, 10**4):
        monkeypatch.setattr(corpora, "SHARD_BYTES", size)
        found = [d["document"] for shard in corpora.shards(source) for d in corpora.shard_documents([shard], source)]
        assert found == expected
    path.write_bytes(jsonl(record(i) for i in range(50)) + b"{]\n")
    monkeypatch.setattr(corpora, "SHARD_BYTES", 700)
    with pytest.raises(UserError, match=r"a.jsonl: after byte 1400, line \d+: not JSON"):
        list(corpora.shard_documents(corpora.shards(source), source))


def test_a_mixture_keeps_shares_and_is_resumed(write, tmp_path):
    (tmp_path / "few.txt").write_text("\n<|endoftext|>\n".join(f"few{i}" for i in range(30)))
    big = write("parquet", 3, split=True)
    data = big.model_copy(update={"source": Data(source={big.source: 0.7, str(tmp_path / "few.txt"): 0.3}).source})
    whole = check_resume(lambda: stream(data))
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    shares = ["few" in tokenizer.decode(row) for row in whole]
    assert all(abs(sum(shares[:n]) - 0.3 * n) < 1 for n in range(1, len(shares)))


def test_state_of_other_processes_or_other_files_is_refused(write):
    data = write()
    rows = stream(data)
    state = rows.state(0)
    with pytest.raises(UserError, match="got 1 processes for a run that was started with 2"):
        rows.load_state([state, state])
    path = next(corpora.Path(data.source).iterdir())
    path.write_bytes(path.read_bytes() + jsonl([record(1)]))
    with pytest.raises(UserError, match="got other files than those with which the run was started"):
        stream(data).load_state([state])


def test_a_process_without_text_is_refused(write):
    rows = stream(write("jsonl.gz", 1), 0, 1)
    rows.streams[0].rows = rows.streams[0].rows.take(0)
    with pytest.raises(UserError, match="got no training text for process 0"):
        rows[0]


@pytest.mark.parametrize("count", [COUNT, 40])
@pytest.mark.parametrize("hub", [False, True])
def test_streamed_text_has_the_split_of_packed_text(hub, count, write, monkeypatch):
    """By hashes, or of few documents by characters."""
    data = write("jsonl", 2, split=True)
    if hub:
        rows = IterableDataset.from_generator(lambda: map(record, range(count)))
        monkeypatch.setattr("subquad.hub.hub_problem", lambda: None)
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
        data = data.model_copy(update={"source": "owner/texts"})
    elif count < COUNT:
        for path in corpora.Path(data.source).iterdir():
            path.write_bytes(jsonl(record(i) for i in range(count // 2)))
    expected = sorted(corpora.documents(data.source, "train"))
    assert count * 0.8 < len(expected) <= count
    (own,) = stream(data).streams
    assert sorted(own.read(own.rows)) == expected
