"""Sources: what comes out of each, the held-out split, and what is refused in which words."""

import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest

from subquad.config import Data
from subquad.data import check_data, corpora, documents, readers, sources, stdlib
from subquad.utils import UserError

PROSE = "First line.\nSecond line.\n\nAnother paragraph, ünï.\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(name: str, content: str | bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def refusal(source: str, split: str = "all") -> str:
    with pytest.raises(UserError) as caught:
        list(documents(source, split))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_standard_library_keeps_its_own_split():
    read = {part: list(documents("python-stdlib", part)) for part in ("train", "validation", "all")}
    for split in ("train", "validation"):
        assert sorted(read[split]) == sorted(text for text in stdlib.documents(split))
    assert sorted(read["train"] + read["validation"]) == sorted(read["all"])
    assert 25 < len(read["validation"]) < 70


def test_standard_library_begins_with_a_mixture_of_files():
    first = [path.parent.name for path in sources.resolve("python-stdlib").files[:40]]
    assert len(set(first)) > 8


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress], ids=["plain", "gz", "xz"])
def test_text_with_separators(pack):
    suffix = {bytes: "", gzip.compress: ".gz", lzma.compress: ".xz"}[pack]
    text = "One.\n\nStill one.\n<|endoftext|>\nTwo <|endoftext|> inside.\n  <|endoftext|>  \n\n<|endoftext|>\nThree."
    name = put(f"a.txt{suffix}", pack(text.encode()))
    assert list(documents(name, "all")) == ["One.\n\nStill one.", "Two <|endoftext|> inside.", "Three."]


def test_text_without_separators_is_cut_at_blank_lines():
    paragraph = "word " * 200 + "\n"
    name = put("a.txt", (paragraph + "\n") * 100)
    found = list(documents(name, "all"))
    assert len(found) > 3
    assert all(readers.PASSAGE_CHARACTERS <= len(text) < readers.PASSAGE_CHARACTERS + 1100 for text in found[:-1])
    assert all(text.endswith("word ") for text in found)
    assert "\n\n".join(found) == ((paragraph + "\n") * 100).strip("\n")
    assert list(documents(put("b.txt", PROSE), "all")) == [PROSE.strip("\n")]


def test_text_without_blank_lines_is_cut_at_last():
    found = list(documents(put("a.txt", "a line of text\n" * 40_000), "all"))
    assert max(map(len, found)) < 11 * readers.PASSAGE_CHARACTERS
    assert all(set(text.split("\n")) == {"a line of text"} for text in found)


def test_line_ends_and_byte_order_mark():
    name = put("a.txt", b"\xef\xbb\xbfOne.\r\nTwo.\r\n<|endoftext|>\r\nThree.\r\n")
    assert list(documents(name, "all")) == ["One.\nTwo.", "Three."]


def test_json_lines():
    lines = [json.dumps({"text": t, "id": i}) for i, t in enumerate(["a\nb", "", "  ", "ü"])]
    assert list(documents(put("a.jsonl", "\n".join(lines) + "\n\n"), "all")) == ["a\nb", "ü"]
    assert list(documents(put("b.jsonl.gz", gzip.compress("\n".join(lines).encode())), "all")) == ["a\nb", "ü"]
    assert list(documents(put("c.jsonl", '{"text": "half \\ud800 a character"}'), "all")) == ["half ? a character"]


def test_directory():
    put("corpus/b/x.txt", "from text")
    put("corpus/a/y.jsonl", '{"text": "from json"}')
    put("corpus/z.py", "from = 'python'\n")
    put("corpus/deep/er/readme.MD", "from markdown")
    put("corpus/packed.txt.xz", lzma.compress(b"from xz"))
    put("corpus/.git/hidden.txt", "hidden")
    put("corpus/.hidden.txt", "hidden")
    put("corpus/__pycache__/x.py", "hidden")
    put("corpus/picture.png", b"\x89PNG\x00")
    found = list(documents("corpus", "all"))
    assert sorted(found) == ["from = 'python'\n", "from json", "from markdown", "from text", "from xz"]
    assert found == list(documents("corpus/", "all")) == list(documents(str(Path("corpus").resolve()), "all"))


def test_home_directory(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    put("a.txt", "at home")
    assert list(documents("~/a.txt", "all")) == ["at home"]


# ---------------------------------------------------------------------- held-out text


def test_of_many_documents_one_in_twenty_is_held_out():
    texts = [f"document {i}" for i in range(2000)]
    name = put("a.jsonl", "\n".join(json.dumps({"text": t}) for t in texts))
    train, valid = list(documents(name, "train")), list(documents(name, "validation"))
    assert sorted(train + valid) == sorted(texts)
    assert 60 < len(valid) < 140
    shuffled = put("b.jsonl", "\n".join(json.dumps({"text": t}) for t in reversed(texts)))
    assert list(documents(shuffled, "validation")) == valid[::-1]


@pytest.mark.parametrize("count", [1, 2, 30, 200])
def test_of_few_documents_the_end_is_held_out(count):
    texts = [f"document {i}\n" + "some words in a line\n" * 40 for i in range(count)]
    name = put("a.jsonl", "\n".join(json.dumps({"text": t}) for t in texts))
    train, valid = "".join(documents(name, "train")), "".join(documents(name, "validation"))
    assert train + valid == "".join(texts)
    assert 0.03 < len(valid) / len(train + valid) < 0.09
    assert train.endswith("\n")


def test_a_single_line_is_split_too():
    name = put("a.txt", "x" * 100)
    assert (list(documents(name, "train")), list(documents(name, "validation"))) == (["x" * 95], ["x" * 5])
    tiny = put("b.txt", "xy")
    assert (list(documents(tiny, "train")), list(documents(tiny, "validation"))) == (["x"], ["y"])


def test_a_held_out_source_leaves_all_of_the_other_for_training():
    train, valid = put("train.txt", PROSE), put("valid.txt", "other")
    corpus = Data(source=train, validation=valid)
    for split, expected in (("train", train), ("validation", valid)):
        ((source, part, weight),) = sources.parts_of(corpus, split)
        assert (source.name, part, weight) == (expected, "all", 1)
    assert sources.parts_of(Data(source=train), "validation")[0][1] == "validation"
    # the nano teacher knows the training side of the standard library by heart
    assert sources.parts_of(Data(source=train, validation="python-stdlib"), "validation")[0][1] == "validation"


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"good\nbad \xff here", "a.txt: not UTF-8 at byte 9 (0xff); convert it to UTF-8"),
        (
            "a.txt.gz",
            gzip.compress(b"good\n\xe9", mtime=0),
            "a.txt.gz: not UTF-8 at byte 5 (0xe9); convert it to UTF-8",
        ),
        ("a.txt", b"text\nwith\0zero", "a.txt: not text: a zero byte at byte 9"),
        ("a.py", b"x = 1\n\0", "a.py: not text: a zero byte at byte 6"),
        ("a.txt.gz", b"not packed", "a.txt.gz: damaged .gz file, behind byte 0 of its content"),
        ("a.txt.xz", b"not packed", "a.txt.xz: damaged .xz file, behind byte 0 of its content"),
        ("a.txt.gz", gzip.compress(PROSE.encode(), mtime=0)[:-9], "a.txt.gz: damaged .gz file"),
        ("a.jsonl", '{"text": "a"}\nnot json', "a.jsonl:2: not JSON (Expecting value"),
        ("a.jsonl", '{"txt": "a", "id": 1}', "a.jsonl:1: no text under the key 'text'; found 'txt', 'id'"),
        ("a.jsonl", '{"text": 5}', "a.jsonl:1: no text under the key 'text'; found int"),
        ("a.jsonl", "[1]", "a.jsonl:1: no text under the key 'text'; found list"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not JSON ("),
        ("a.csv", b"a,b", "corpus 'a.csv': unknown kind of file; expected .txt, .jsonl, .parquet, .md,"),
        ("a", "text", "corpus 'a': unknown kind of file; expected .txt, .jsonl, .parquet, .md,"),
    ],
)
def test_what_is_not_text_is_refused_with_its_place(name, content, expected):
    assert expected in refusal(put(name, content))


def test_what_does_not_exist_is_refused_with_the_nearest_name(monkeypatch):
    put("folder/books.txt", PROSE)
    assert (
        refusal("folder/boks.txt") == "corpus 'folder/boks.txt': no such file or directory; did you mean 'books.txt'?"
    )
    assert "; expected 'python-stdlib', a file, a directory or a hub id" in refusal("folder/zzzz.jsonl")
    assert refusal("nofolder/a.txt").endswith("; there is no directory 'nofolder' either")
    assert "no such file or directory" in refusal("/no/such/folder/at/all")
    put("empty/picture.png", b"")
    assert refusal("empty").startswith(
        "corpus 'empty': no text in this directory; expected files .txt, .jsonl, .parquet, .md,"
    )
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    assert refusal("python-stdlb") == (
        "corpus 'python-stdlb': no such file or directory, and a data set of the hub needs "
        '`pip install "subquad[data]"`; '
        "did you mean 'python-stdlib'?"
    )
    assert "`pip install \"subquad[data]\"`; expected 'python-stdlib', a file," in refusal("owner/name")


def test_mistakes_show_before_anything_is_read():
    with pytest.raises(UserError):
        documents("nowhere.txt", "train")
    with pytest.raises(ValueError, match="expected 'train', 'validation' or 'all'"):
        documents("python-stdlib", "test")


def test_check_corpus():
    good, empty, bad = put("a.txt", PROSE), put("b.txt", " \n\n"), put("c.txt", b"\xff")
    check_data(Data(source=good))
    check_data(Data(source="python-stdlib", validation=good))
    for corpus, expected in [
        (Data(source=empty), "corpus 'b.txt' is empty; expected text"),
        (Data(source=good, validation=empty), "corpus 'b.txt' is empty; expected text"),
        (Data(source=good, validation=bad), "c.txt: not UTF-8 at byte 0"),
        (Data(source="d.txt"), "corpus 'd.txt': no such file or directory; did you mean "),
    ]:
        with pytest.raises(UserError) as caught:
            check_data(corpus)
        assert expected in str(caught.value)


# ---------------------------------------------------------------------- the hub


@pytest.fixture
def hub(here, monkeypatch):
    """A stand-in for the library `datasets` with two data sets on its hub."""
    put(
        "site/datasets.py",
        "def load_dataset(name, subset, split, streaming):\n"
        "    if (subset, split, streaming) == ('en', 'test', False):\n"
        "        return iter([{'body': 'other'}])\n"
        "    assert subset is None and split == 'train' and streaming\n"
        "    if name == 'owner/good':\n"
        "        return iter([{'text': f'text {i}'} for i in range(3)])\n"
        "    if name == 'owner/images':\n"
        "        return iter([{'image': 1, 'label': 2}])\n"
        "    raise ConnectionError('no route\\nto the hub')\n",
    )
    monkeypatch.syspath_prepend(str(here / "site"))
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    yield
    sys.modules.pop("datasets", None)


@pytest.mark.usefixtures("hub")
def test_hub_data_set():
    assert list(documents("owner/good", "all")) == ["text 0", "text 1", "text 2"]
    assert (
        "".join(documents("owner/good", "train")) + "".join(documents("owner/good", "validation"))
        == "text 0text 1text 2"
    )
    assert refusal("owner/images") == "corpus 'owner/images': no column 'text'; found image, label"
    assert refusal("owner/none") == (
        "corpus 'owner/none': not a local file, and the hub gave no such data set (no route to the hub)"
    )


@pytest.mark.usefixtures("hub")
def test_hub_data_set_by_subset_split_and_column():
    corpus = Data(source="owner/any", subset="en", split="test", streaming=False, column="body", validation="owner/any")
    ((source, part, _),) = sources.parts_of(corpus, "train")
    assert list(corpora.part_documents(source, part)) == ["other"]
    prints = {
        json.dumps(sources.resolve("owner/any", **s).fingerprint()) for s in ({}, {"subset": "en"}, {"split": "x"})
    }
    assert len(prints) == 3


def test_a_folder_called_datasets_is_not_the_library(here, monkeypatch):
    put("site2/datasets/a.txt", PROSE)
    monkeypatch.setattr(sys, "path", [str(here / "site2")])
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    assert 'needs `pip install "subquad[data]"`' in refusal("owner/name")
