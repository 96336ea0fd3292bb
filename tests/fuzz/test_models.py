"""Hostile model directories and files: the command line refuses each with a message, or runs; it executes nothing of
them, writes nothing, and needs bounded memory and time."""

import io
import json
import resource
import shutil
import struct
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hypothesis import given
from hypothesis import strategies as st

import subquad
from subquad.cli import main
from tests.helpers.fuzzing import at_most, damaged, mutated, to_json, with_model
from tests.helpers.gguf_files import write_gguf
from tests.helpers.recipes import save_tiny_teacher
from tests.helpers.teachers import tiny_teacher

COMMANDS = (["inspect", "DIR"], ["generate", "DIR", "ab", "--tokens", "2"])


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and error messages of a command."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), at_most(60):
        code = main(list(arguments))
    return code, err.getvalue()


def check(directory, command) -> None:
    before = sorted(path.name for path in directory.parent.rglob("*"))
    code, message = run(*(str(directory) if word == "DIR" else word for word in command))
    assert code in (0, 2)
    assert code == 0 or any(line.startswith("subquad: ") for line in message.splitlines())  # after progress
    assert sorted(path.name for path in directory.parent.rglob("*")) == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A student and its teacher."""
    directory = tmp_path_factory.mktemp("models")
    save_tiny_teacher(directory / "teacher")
    teacher, tokenizer = subquad.load_teacher(directory / "teacher")
    student = subquad.linearize(teacher, "gated_deltanet", layer_types={"default": "gated_deltanet", "1": "attention"})
    student.save_pretrained(directory / "student")
    tokenizer.save_pretrained(directory / "student")
    return directory


@pytest.fixture
def copies(saved, tmp_path):
    """Gives a fresh copy of a model."""

    def copy(name: str):
        target = tmp_path / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(saved / name, target)
        return target

    return copy


@with_model
@given(st.data(), st.sampled_from(COMMANDS))
@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_files_with_mistakes(copies, model, file, data, command):
    directory = copies(model)
    valid = json.loads((directory / file).read_text())
    (directory / file).write_bytes(to_json(data.draw(mutated(valid))))
    check(directory, command)


@with_model
@given(st.data())
@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_damaged_files(copies, model, file, data):
    directory = copies(model)
    (directory / file).write_bytes(data.draw(damaged((directory / file).read_bytes(), head=400)))
    check(directory, COMMANDS[1])


def header(tensors: dict, size: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


CLAIMS = {
    "header": header({}, 2**60),
    "offsets": header(
        {"model.embed_tokens.weight": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}}
    ),
    "shape": header({"model.embed_tokens.weight": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 8]}})
    + b"0" * 8,
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_weights_that_claim_much(copies, model, claim):
    directory = copies(model)
    (directory / "model.safetensors").write_bytes(CLAIMS[claim])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run("generate", str(directory), "ab")[0] == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 500_000  # kB


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hostname"])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_shards_outside_of_the_directory(copies, model, name):
    directory = copies(model)
    (directory / "model.safetensors").rename(directory.parent / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("generate", str(directory), "ab")[0] == 2


CODE = "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\n"


@pytest.mark.parametrize("key", ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"])
def test_code_of_a_directory_is_not_executed(copies, key):
    directory = copies("teacher")
    (directory / "code.py").write_text(CODE)
    for file in ("config.json", "tokenizer_config.json"):
        values = json.loads((directory / file).read_text())
        values["auto_map"] = {key: ["code.Own", "code.Own"] if key == "AutoTokenizer" else "code.Own"}
        (directory / file).write_text(json.dumps({**values, "model_type": "own"} if file == "config.json" else values))
    code, message = run("generate", str(directory), "ab")
    assert code == 2
    assert message.count("\n") <= 3
    assert not (directory / "executed").exists()


def test_pickled_weights_execute_nothing(copies):
    """`torch.load` with weights_only refuses what a pickle would call."""
    import pickle

    class Attack:
        def __reduce__(self):
            return exec, (f"open({str(directory / 'executed')!r}, 'w')",)

    directory = copies("teacher")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"model.embed_tokens.weight": Attack()}))
    assert run("generate", str(directory), "ab")[0] == 2
    assert not (directory / "executed").exists()


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_gguf(path, tiny_teacher(vocab_size=258))
    return path.read_bytes()


@with_model
@given(st.data())
def test_damaged_gguf_files(gguf_bytes, tmp_path, data):
    (tmp_path / "a.gguf").write_bytes(data.draw(damaged(gguf_bytes, head=4000)))
    check(tmp_path / "a.gguf", COMMANDS[1])


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "keys"])
def test_gguf_headers_that_claim_much(gguf_bytes, tmp_path, at):
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes[:at] + struct.pack("<Q", 2**60) + gguf_bytes[at + 8 :])
    assert run("generate", str(path), "ab")[0] == 2
