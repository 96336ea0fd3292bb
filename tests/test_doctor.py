"""`subquad doctor`: what it finds, and what it advises where something is missing."""

import importlib.metadata
import json

import pytest
import torch

from subquad.cli import doctor, main
from subquad.ops import fla


def report(capsys, *argv):
    code = main(["doctor", *argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return {(f["section"], f["name"]): f for f in json.loads(out)}


def test_this_machine(capsys):
    found = report(capsys, "--seconds", "0.05")
    assert found["versions", "torch"]["value"] == importlib.metadata.version("torch")
    assert {section for section, _ in found} == {"versions", "extras", "devices", "kernels", "resources", "speed"}
    assert all(f["problem"] is None for (section, _), f in found.items() if section == "versions")
    rate = found["speed", "training step of nano"]["value"]
    assert int(rate.split()[0].replace(",", "")) > 0
    assert main(["doctor", "--seconds", "0"]) == 0
    text = capsys.readouterr().out
    assert "tokens/s" not in text
    assert text.splitlines()[0] == "versions"


def test_other_versions_than_those_that_were_tested(monkeypatch):
    versions = {"torch": "2.3.0", "safetensors": None}
    known = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: versions.get(name, known(name)))
    found = {finding.name: finding for finding in doctor.versions()}
    assert found["torch"].problem.startswith("tests pass with <2.14,>=2.11: pip install")
    assert found["safetensors"].value == "missing"
    assert found["numpy"].problem is None


def test_missing_extras_name_the_command(monkeypatch):
    known = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name in ("ray", "gguf") else known(name))
    found = {finding.name: finding.value for finding in doctor.extras()}
    assert found["cluster"] == 'missing ray: pip install ".[cluster]" in a clone of Subquad'
    assert found["export"] == 'missing gguf: pip install ".[export]" in a clone of Subquad'
    assert found["report"] == "installed"


@pytest.mark.parametrize(
    ("chosen", "installed", "device", "value", "problem"),
    [
        (None, True, "cpu", "PyTorch, since the device is cpu", None),
        (None, False, "cuda", "PyTorch, since fla is not installed", "the kernels of fla are faster"),
        (None, True, "cuda", "fla (Triton), since the device is cuda", None),
        ("torch", True, "cuda", "PyTorch, since SUBQUAD_BACKEND=torch", None),
        ("fla", False, "cuda", "none", "needs flash-linear-attention"),
        ("flash", True, "cpu", "none", "SUBQUAD_BACKEND: got 'flash'"),
    ],
)
def test_kernels_and_why(monkeypatch, chosen, installed, device, value, problem):
    monkeypatch.setattr(fla, "installed", lambda: installed)
    monkeypatch.setattr(fla, "refuses_scalar_decay", lambda: False)
    empty = torch.empty(0)
    monkeypatch.setattr(torch, "empty", lambda *args, device: type("Fake", (), {"device": device})())
    monkeypatch.delenv(fla.BACKEND_VARIABLE, raising=False)
    if chosen is not None:
        monkeypatch.setenv(fla.BACKEND_VARIABLE, chosen)
    assert empty.numel() == 0
    (found,) = doctor.kernels(torch.device(device))
    assert found.value == value
    assert problem is None if found.problem is None else problem in found.problem


def test_a_full_or_foreign_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "new"))
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert "1 GB free" in next(doctor.resources()).value
    assert "larger disk" in next(doctor.resources()).problem
    monkeypatch.setattr(doctor.os, "access", lambda *args: False)
    assert "cannot be written" in next(doctor.resources()).problem


def test_a_busy_machine(monkeypatch):
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (64.0, 0, 0))
    assert "OMP_NUM_THREADS" in list(doctor.resources())[-1].problem
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (0.0, 0, 0))
    assert list(doctor.resources())[-1].problem is None


def test_only_the_device_is_an_option(capsys):
    """Dtype and attention would change nothing."""
    assert main(["doctor", "--seconds", "0", "--dtype", "bfloat16"]) == 2
    assert "unknown option --dtype" in capsys.readouterr().err
