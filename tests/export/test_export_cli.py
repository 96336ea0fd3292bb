"""`subquad linearize --export` and `subquad export` on the command line."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import subquad
from subquad.cli import main
from tests.helpers.disks import full_disk
from tests.helpers.recipes import save_tiny_teacher
from tests.helpers.students import logits


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli")
    save_tiny_teacher(directory / "teacher", num_hidden_layers=3)
    plan = ["--layer-types", "{default: gated_deltanet, 2: attention}"]
    assert (
        main(["linearize", str(directory / "teacher"), *plan, "--export", "qwen3_5", "-o", str(directory / "s")]) == 0
    )
    return directory / "s"


def test_linearize_and_export(student, tmp_path, capsys):
    assert json.loads((student / "config.json").read_text())["layer_specs"][2] == {
        "mixer": "attention",
        "qk_norm": 1e-8,
    }
    assert main(["export", str(student), "--format", "qwen3_5", "-o", str(tmp_path / "served")]) == 0
    out = capsys.readouterr().out
    assert "parameters as qwen3_5 in" in out
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(logits(served, ids), logits(subquad.load_teacher(student)[0], ids), atol=1e-4)
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_text"
    assert config["architectures"] == ["Qwen3_5ForCausalLM"]
    assert main(["export", str(student), "--format", "gguf", "--type", "q8_0", "-o", str(tmp_path / "s.gguf")]) == 0
    assert (tmp_path / "s.gguf").read_bytes()[:4] == b"GGUF"


def test_errors_are_one_line_and_nothing_is_written(student, tmp_path, capsys):
    directory = student.parent / "teacher"
    cases = {
        "is a llama model": [str(directory), "-o", str(tmp_path / "x")],
        "there is no directory": [str(student), "-o", str(tmp_path / "no" / "x")],
        "exists": [str(student), "-o", str(tmp_path)],
    }
    for message, argv in cases.items():
        assert main(["export", "--format", "qwen3_5", *argv]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert main(["linearize", str(directory), "--mixer", "gla", "--export", "qwen3_5", "-o", str(tmp_path / "x")]) == 2
    assert "gla cannot be exported" in capsys.readouterr().err
    assert main(["export", str(student), "--format", "qwen3", "-o", str(tmp_path / "x")]) == 2
    assert "format: unknown 'qwen3'; did you mean 'qwen3_5'?" in capsys.readouterr().err
    assert main(["linearize", str(directory), "--export", "granite_hybrit", "-o", str(tmp_path / "x")]) == 2
    assert "unknown export target 'granite_hybrit'; did you mean 'granite_hybrid'?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["qwen3_5", "gguf"])
@pytest.mark.parametrize("size", [500, 20_000, 60_000])
def test_a_full_disk_leaves_no_files(student, tmp_path, capsys, form, size):
    with full_disk(size):
        assert main(["export", str(student), "--format", form, "-o", str(tmp_path / "served")]) == 2
    assert "MB are free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_nothing_at_its_path(student, tmp_path):
    """It is killed while it writes the weights."""
    program = f"""
import os, signal, safetensors.torch, transformers.modeling_utils
from subquad.cli import main
def save(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
transformers.modeling_utils.safe_save_file = save
main(["export", {str(student)!r}, "--format", "qwen3_5", "-o", {str(tmp_path / "served")!r}])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "served").exists()
