"""Compressed files, parquet and conversations in tables: their documents, and errors."""

import gzip
import importlib
import json
import lzma
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from subquad.config import Data
from subquad.data import check_data, documents
from subquad.data.chat import Conversation
from subquad.utils import UserError

zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd.compress}
TEXTS = ["first ünï", "second\nof two lines", "third"]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parquet(name: str = "x.parquet", **columns) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table(columns), name)
    content = Path(name).read_bytes()
    Path(name).unlink()
    return content


def error_of(name: str, content: bytes, **settings) -> str:
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(documents(name, "all", **settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_format_in_every_compression(suffix):
    contents = {
        "a.txt": "\n<|endoftext|>\n".join(TEXTS).encode(),
        "a.jsonl": "\n".join(json.dumps({"text": text}) for text in TEXTS).encode(),
        "a.parquet": parquet(id=[1, 2, 3], text=TEXTS),
    }
    for name, content in contents.items():
        Path(name + suffix).write_bytes(COMPRESS[suffix](content))
        assert list(documents(name + suffix, "all")) == TEXTS
    Path("a.md" + suffix).write_bytes(COMPRESS[suffix](TEXTS[1].encode()))
    assert list(documents("a.md" + suffix, "all")) == [TEXTS[1]]
    assert len(list(documents(".", "all"))) == 3 * len(TEXTS) + 1


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_of_several_frames(suffix):
    parts = [b"one\n", b"", b"two\n" * 50_000]
    Path(f"a.md{suffix}").write_bytes(b"".join(map(COMPRESS[suffix], parts)))
    assert list(documents(f"a.md{suffix}", "all")) == [b"".join(parts).decode()]


def test_carriage_returns_are_removed():
    for suffix, compress in COMPRESS.items():
        Path(f"a.txt{suffix}").write_bytes(compress(b"\xef\xbb\xbfOne.\r\nTwo.\r\n<|endoftext|>\r\nThree.\r\n"))
        assert list(documents(f"a.txt{suffix}", "all")) == ["One.\nTwo.", "Three."]
    Path("a.jsonl").write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert list(documents("a.jsonl", "all")) == ["a", "b"]


def test_columns_by_name():
    Path("a.parquet").write_bytes(parquet(body=["x", "y"], text=["no", "no"]))
    assert list(documents("a.parquet", "all", column="body")) == ["x", "y"]
    large = pyarrow.array(["x", "", "y"], pyarrow.large_string()), pyarrow.array(["x", "y", "x"]).dictionary_encode()
    Path("b.parquet").write_bytes(parquet(large=large[0], coded=large[1]))
    assert list(documents("b.parquet", "all", column="large")) == ["x", "y"]
    assert list(documents("b.parquet", "all", column="coded")) == ["x", "y", "x"]
    Path("a.jsonl").write_text('{"body": "x", "text": 5}')
    assert list(documents("a.jsonl", "all", column="body")) == ["x"]


def test_conversations_in_parquet():
    # Tables have every key in every row, null where a message lacks it.
    talks = [[{**TALK[0], "name": None}, {**TALK[1], "name": "bot"}], []]
    Path("a.parquet").write_bytes(parquet(messages=talks))
    (found,) = documents("a.parquet", "all", column="messages", chat=True)
    assert found == Conversation((TALK[0], {**TALK[1], "name": "bot"}), "a.parquet: row 1")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt.zst", b"not packed", "a.txt.zst: damaged .zst file, after byte 0 of its content ("),
        ("a.txt.zst", zstd.compress(b"text\n" * 99)[:-3], "a.txt.zst: damaged .zst file, after byte"),
        ("a.txt.zst", zstd.compress(b"good\n\xe9"), "a.txt.zst: got 0xe9 at byte 5"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 99)[:-30], "a.jsonl.xz: damaged .xz file, after byte"),
        ("a.parquet", b"PAR1", "a.parquet: damaged .parquet file, after row 0 ("),
        ("a.parquet", b"", "a.parquet: damaged .parquet file, after row 0 ("),
        ("a.parquet.gz", b"PAR1", "a.parquet.gz: damaged .gz file, after row 0 ("),
    ],
)
def test_damaged_files_raise_with_the_position(name, content, expected):
    assert error_of(name, content).startswith(expected)


def test_damage_within_parquet():
    whole = parquet(text=[f"{i} " * 50 for i in range(5000)])
    broken = bytearray(whole)
    broken[200:4000] = bytes(3800)
    assert error_of("a.parquet", bytes(broken)).startswith("a.parquet: damaged .parquet file, after row ")
    assert error_of("a.parquet", whole[:-100]).startswith("a.parquet: damaged .parquet file, after row 0 (")


def test_errors_in_parquet():
    assert error_of("a.parquet", parquet(body=["x"], id=[1])).startswith("a.parquet: got the keys ['body', 'id']")
    assert error_of("a.parquet", parquet(text=["x", None])).startswith("a.parquet: row 2: text: got NoneType")
    assert error_of("a.parquet", parquet(text=[1])).startswith("a.parquet: row 1: text: got int")
    array = pyarrow.array([b"ok", b"a\xff"]).view(pyarrow.string())
    assert error_of("a.parquet", parquet(text=array)).startswith("a.parquet: row 2: invalid at byte 1")
    Path("a.parquet").write_bytes(parquet(text=pyarrow.array([], pyarrow.string())))
    with pytest.raises(UserError, match=r"data.source 'a.parquet': got no text"):
        check_data(Data(source="a.parquet"))
