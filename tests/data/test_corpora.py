"""Sources: their documents in every format and compression, the validation split, and errors."""

import contextlib
import gzip
import hashlib
import importlib
import json
import lzma
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from subquad.config import Data
from subquad.data import check_data, corpora, documents, sources
from subquad.data.chat import Conversation
from subquad.utils import UserError

zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd.compress}
TEXTS = ["first ünï", "second\nof two lines", "third"]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
PROSE = "First line.\nSecond line.\n\nAnother paragraph, ünï.\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def parquet(**columns) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


MANY_ROWS = parquet(text=[f"{i} " * 50 for i in range(5000)])
INVALID_UTF8 = pyarrow.array([b"ok", b"a\xff"]).view(pyarrow.string())


def error_of(source: str, split: str = "all") -> str:
    with pytest.raises(UserError) as caught:
        list(documents(source, split))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_standard_library_is_split_by_file():
    found = {split: list(documents("python-stdlib", split)) for split in ("train", "validation", "all")}
    for path in sources.resolve("python-stdlib").files:
        name = path.relative_to(sysconfig.get_path("stdlib")).as_posix()
        split = "validation" if hashlib.sha256(name.encode()).digest()[:4] < b"\x0c\xcc\xcc\xcd" else "train"
        with contextlib.suppress(UnicodeDecodeError):
            assert path.read_text(encoding="utf-8") in found[split], name
    assert sorted(found["train"] + found["validation"]) == sorted(found["all"])
    assert 25 < len(found["validation"]) < 70


def test_standard_library_order_mixes_directories():
    first = [path.parent.name for path in sources.resolve("python-stdlib").files[:40]]
    assert len(set(first)) > 8


def test_text_with_separators():
    text = "One.\n\nStill one.\n<|endoftext|>\nTwo <|endoftext|> inside.\n  <|endoftext|>  \n\n<|endoftext|>\nThree."
    assert list(documents(write("a.txt", text), "all")) == ["One.\n\nStill one.", "Two <|endoftext|> inside.", "Three."]


def test_text_without_separators_is_cut_at_blank_lines():
    paragraph = "word " * 200 + "\n"
    name = write("a.txt", (paragraph + "\n") * 100)
    found = list(documents(name, "all"))
    assert len(found) > 3
    assert all(corpora.PASSAGE_CHARACTERS <= len(text) < corpora.PASSAGE_CHARACTERS + 1100 for text in found[:-1])
    assert all(text.endswith("word ") for text in found)
    assert "\n\n".join(found) == ((paragraph + "\n") * 100).strip("\n")
    assert list(documents(write("b.txt", PROSE), "all")) == [PROSE.strip("\n")]


def test_text_without_blank_lines_is_cut_at_a_line_end():
    found = list(documents(write("a.txt", "a line of text\n" * 40_000), "all"))
    assert max(map(len, found)) < 11 * corpora.PASSAGE_CHARACTERS
    assert all(set(text.split("\n")) == {"a line of text"} for text in found)


def test_json_lines():
    lines = [json.dumps({"text": t, "id": i}) for i, t in enumerate(["a\nb", "", "  ", "ü"])]
    assert list(documents(write("a.jsonl", "\n".join(lines) + "\n\n"), "all")) == ["a\nb", "ü"]
    assert list(documents(write("c.jsonl", '{"text": "half \\ud800 a character"}'), "all")) == ["half ? a character"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_format_in_every_compression(suffix):
    contents = {
        "a.txt": "\n<|endoftext|>\n".join(TEXTS).encode(),
        "a.jsonl": "\n".join(json.dumps({"text": text}) for text in TEXTS).encode(),
        "a.parquet": parquet(id=[1, 2, 3], text=TEXTS),
    }
    for name, content in contents.items():
        write(name + suffix, COMPRESS[suffix](content))
        assert list(documents(name + suffix, "all")) == TEXTS
    write("a.md" + suffix, COMPRESS[suffix](TEXTS[1].encode()))
    assert list(documents("a.md" + suffix, "all")) == [TEXTS[1]]
    assert len(list(documents(".", "all"))) == 3 * len(TEXTS) + 1


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_of_several_frames(suffix):
    parts = [b"one\n", b"", b"two\n" * 50_000]
    write(f"a.md{suffix}", b"".join(map(COMPRESS[suffix], parts)))
    assert list(documents(f"a.md{suffix}", "all")) == [b"".join(parts).decode()]


def test_carriage_returns_are_removed():
    for suffix, compress in COMPRESS.items():
        write(f"a.txt{suffix}", compress(b"\xef\xbb\xbfOne.\r\nTwo.\r\n<|endoftext|>\r\nThree.\r\n"))
        assert list(documents(f"a.txt{suffix}", "all")) == ["One.\nTwo.", "Three."]
    write("a.jsonl", b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert list(documents("a.jsonl", "all")) == ["a", "b"]


def test_columns_by_name():
    write("a.parquet", parquet(body=["x", "y"], text=["no", "no"]))
    assert list(documents("a.parquet", "all", column="body")) == ["x", "y"]
    large = pyarrow.array(["x", "", "y"], pyarrow.large_string()), pyarrow.array(["x", "y", "x"]).dictionary_encode()
    write("b.parquet", parquet(large=large[0], coded=large[1]))
    assert list(documents("b.parquet", "all", column="large")) == ["x", "y"]
    assert list(documents("b.parquet", "all", column="coded")) == ["x", "y", "x"]
    write("a.jsonl", '{"body": "x", "text": 5}')
    assert list(documents("a.jsonl", "all", column="body")) == ["x"]


def test_conversations_in_parquet():
    # Tables have every key in every row, null where a message lacks it.
    talks = [[{**TALK[0], "name": None}, {**TALK[1], "name": "bot"}], []]
    write("a.parquet", parquet(messages=talks))
    (found,) = documents("a.parquet", "all", column="messages", chat=True)
    assert found == Conversation((TALK[0], {**TALK[1], "name": "bot"}), "a.parquet: row 1")


def test_directory():
    write("texts/b/x.txt", "from text")
    write("texts/a/y.jsonl", '{"text": "from json"}')
    write("texts/z.py", "from = 'python'\n")
    write("texts/deep/er/readme.MD", "from markdown")
    write("texts/packed.txt.xz", lzma.compress(b"from xz"))
    write("texts/.git/hidden.txt", "hidden")
    write("texts/.hidden.txt", "hidden")
    write("texts/__pycache__/x.py", "hidden")
    write("texts/picture.png", b"\x89PNG\x00")
    found = list(documents("texts", "all"))
    assert sorted(found) == ["from = 'python'\n", "from json", "from markdown", "from text", "from xz"]
    assert found == list(documents("texts/", "all")) == list(documents(str(Path("texts").resolve()), "all"))


def test_home_directory(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    write("a.txt", "at home")
    assert list(documents("~/a.txt", "all")) == ["at home"]


# ---------------------------------------------------------------------- the validation split


def test_many_documents_are_split_by_hash():
    texts = [f"document {i}" for i in range(2000)]
    name = write("a.jsonl", "\n".join(json.dumps({"text": t}) for t in texts))
    train, valid = list(documents(name, "train")), list(documents(name, "validation"))
    assert sorted(train + valid) == sorted(texts)
    assert 60 < len(valid) < 140
    shuffled = write("b.jsonl", "\n".join(json.dumps({"text": t}) for t in reversed(texts)))
    assert list(documents(shuffled, "validation")) == valid[::-1]


@pytest.mark.parametrize("count", [1, 2, 30, 200])
def test_few_documents_are_split_at_the_end(count):
    texts = [f"document {i}\n" + "some words in a line\n" * 40 for i in range(count)]
    name = write("a.jsonl", "\n".join(json.dumps({"text": t}) for t in texts))
    train, valid = "".join(documents(name, "train")), "".join(documents(name, "validation"))
    assert train + valid == "".join(texts)
    assert 0.03 < len(valid) / len(train + valid) < 0.09
    assert train.endswith("\n")


def test_a_single_line_is_split():
    name = write("a.txt", "x" * 100)
    assert (list(documents(name, "train")), list(documents(name, "validation"))) == (["x" * 95], ["x" * 5])
    tiny = write("b.txt", "xy")
    assert (list(documents(tiny, "train")), list(documents(tiny, "validation"))) == (["x"], ["y"])


def test_with_a_validation_source_the_other_is_used_whole():
    train, valid = write("train.txt", PROSE), write("valid.txt", "other")
    data = Data(source=train, validation=valid)
    for split, expected in (("train", train), ("validation", valid)):
        (source,) = sources.resolve_sources(data, split)
        assert (source.name, source.part, source.weight) == (expected, "all", 1)
    assert sources.resolve_sources(Data(source=train), "validation")[0].part == "validation"
    # The nano teacher was trained on the training files of the standard library.
    assert sources.resolve_sources(Data(source=train, validation="python-stdlib"), "validation")[0].part == "validation"


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"good\nbad \xff here", "a.txt: got 0xff at byte 9, expected UTF-8"),
        ("a.txt.gz", gzip.compress(b"good\n\xe9", mtime=0), "a.txt.gz: got 0xe9 at byte 5"),
        ("a.txt", b"text\nwith\0zero", "a.txt: got a zero byte at byte 9"),
        ("a.py", b"x = 1\n\0", "a.py: got a zero byte at byte 6"),
        ("a.txt.gz", b"not packed", "a.txt.gz: damaged .gz file, after byte 0"),
        ("a.txt.xz", b"not packed", "a.txt.xz: damaged .xz file, after byte 0"),
        ("a.txt.gz", gzip.compress(PROSE.encode(), mtime=0)[:-9], "a.txt.gz: damaged .gz file"),
        ("a.txt.zst", b"not packed", "a.txt.zst: damaged .zst file, after byte 0 of its content ("),
        ("a.txt.zst", zstd.compress(b"text\n" * 99)[:-3], "a.txt.zst: damaged .zst file, after byte"),
        ("a.txt.zst", zstd.compress(b"good\n\xe9"), "a.txt.zst: got 0xe9 at byte 5"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 99)[:-30], "a.jsonl.xz: damaged .xz file, after byte"),
        ("a.parquet", b"PAR1", "a.parquet: damaged .parquet file, after row 0 ("),
        ("a.parquet", b"", "a.parquet: damaged .parquet file, after row 0 ("),
        ("a.parquet.gz", b"PAR1", "a.parquet.gz: damaged .gz file, after row 0 ("),
        ("a.parquet", MANY_ROWS[:200] + bytes(3800) + MANY_ROWS[4000:], "a.parquet: damaged .parquet file, after row "),
        ("a.parquet", MANY_ROWS[:-100], "a.parquet: damaged .parquet file, after row 0 ("),
        ("a.parquet", parquet(body=["x"], id=[1]), "a.parquet: got the keys ['body', 'id']"),
        ("a.parquet", parquet(text=["x", None]), "a.parquet: row 2: text: got NoneType"),
        ("a.parquet", parquet(text=[1]), "a.parquet: row 1: text: got int"),
        ("a.parquet", parquet(text=INVALID_UTF8), "a.parquet: row 2: invalid at byte 1"),
        ("a.jsonl", '{"text": "a"}\nnot json', "a.jsonl:2: not JSON (Expecting value"),
        ("a.jsonl", '{"txt": "a", "id": 1}', "a.jsonl:1: got the keys ['txt', 'id']"),
        ("a.jsonl", '{"text": 5}', "a.jsonl:1: text: got int"),
        ("a.jsonl", "[1]", "a.jsonl:1: got list"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not JSON ("),
        ("a.csv", b"a,b", "data.source 'a.csv': unknown file type; expected .txt, .jsonl, .parquet, .md,"),
        ("a", "text", "data.source 'a': unknown file type"),
    ],
)
def test_errors_name_the_file_and_the_position(name, content, expected):
    assert expected in error_of(write(name, content))


def test_missing_sources_name_the_nearest_file():
    write("folder/books.txt", PROSE)
    expected = "data.source 'folder/boks.txt': no such file or directory; did you mean 'books.txt'?"
    assert error_of("folder/boks.txt") == expected
    assert "; expected 'python-stdlib', a file, a directory or a hub id" in error_of("folder/zzzz.jsonl")
    assert error_of("nofolder/a.txt").endswith("; the directory 'nofolder' does not exist either")
    assert "no such file or directory" in error_of("/no/such/folder/at/all")
    write("empty/picture.png", b"")
    assert error_of("empty").startswith("data.source 'empty': no text in this directory; expected files .txt, .jsonl,")


def test_errors_are_raised_at_the_call():
    with pytest.raises(UserError):
        documents("nowhere.txt", "train")
    with pytest.raises(ValueError, match="split: got 'test'"):
        documents("python-stdlib", "test")


def test_check_data():
    good, empty, bad = write("a.txt", PROSE), write("b.txt", " \n\n"), write("c.txt", b"\xff")
    short = write("g.txt", "ä" * 15)  # two bytes each, and two tokens that a document may add
    check_data(Data(source=good, seq_len=32))
    check_data(Data(source=short, seq_len=32))
    check_data(Data(source="python-stdlib", validation=good, seq_len=32))
    for data, expected in [
        (Data(source=empty), "data.source 'b.txt': got no text"),
        (
            Data(source=write("e.parquet", parquet(text=pyarrow.array([], pyarrow.string())))),
            "'e.parquet': got no text",
        ),
        (Data(source=good, validation=empty, seq_len=32), "data.validation 'b.txt': got no text"),
        (
            Data(source=short, seq_len=33),
            "data.source 'g.txt': got at most 32 tokens, expected at least data.seq_len = 33",
        ),
        (Data(source=good, validation=bad, seq_len=32), "c.txt: got 0xff at byte 0"),
        (Data(source="d.txt"), "data.source 'd.txt': no such file or directory; did you mean "),
    ]:
        with pytest.raises(UserError) as caught:
            check_data(data)
        assert expected in str(caught.value)


# ---------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub with three datasets."""

    def load_dataset(name, subset, split, streaming):
        if (subset, split, streaming) == ("en", "test", False):
            return [{"body": "other"}]
        assert (subset, split, streaming) == (None, "train", True)
        if name == "owner/good":
            return [{"text": f"text {i}"} for i in range(3)]
        if name == "owner/images":
            return [{"image": 1, "label": 2}]
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("subquad.hub.hub_problem", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)


@pytest.mark.usefixtures("hub")
def test_hub_dataset():
    assert list(documents("owner/good", "all")) == ["text 0", "text 1", "text 2"]
    assert "".join((*documents("owner/good", "train"), *documents("owner/good", "validation"))) == "text 0text 1text 2"
    expected = (
        "data.source 'owner/images': row 1: got the keys ['image', 'label'], expected an object with the key 'text'"
    )
    assert error_of("owner/images") == expected
    hint = "; expected 'python-stdlib', a file, a directory or a hub id; and not readable from the hub: no route"
    assert error_of("owner/none") == f"data.source 'owner/none': no such file{hint}"
    assert "no such file; did you mean 'python-stdlib'?; and not" in error_of("python-stdlb")


@pytest.mark.usefixtures("hub")
def test_hub_dataset_by_subset_split_and_column():
    data = Data(source="owner/any", subset="en", split="test", streaming=False, column="body", validation="owner/any")
    (source,) = sources.resolve_sources(data, "train")
    assert list(corpora.read(source)) == ["other"]
    settings = ({}, {"subset": "en"}, {"split": "x"}, {"part": "train"}, {"column": "x"})
    assert len({json.dumps(sources.resolve("owner/any", **each).fingerprint()) for each in settings}) == 5
