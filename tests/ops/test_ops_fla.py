"""The `fla` backend: when it is chosen, what falls back, and its numbers, in Triton's interpreter or on a GPU."""

import json
import logging
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch
from ops_cases import KIND_IDS, KINDS, assert_close, definition, differentiate, draw

from subquad import ops
from subquad.ops import fla

ROOT = Path(__file__).parents[2]


def missing():
    """What is not on the path; `fla` may be hidden from this process, but the interpreter has one of its own."""
    return [name for name in ("fla", "triton") if PathFinder.find_spec(name) is None]


def interpreted(*arguments):
    if missing():
        pytest.skip(f"needs {' and '.join(missing())}: pip install triton fla-core==0.6.0")
    script = Path(__file__).with_name("fla_interpreted.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.sample
def test_a_chunk_and_a_step_kernel_in_the_interpreter():
    worst = interpreted("scalar", "delta", "chunk", "packed") | interpreted("channel", "additive", "step", "batch")
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["batch", "packed"])
@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_chunk_kernels_in_the_interpreter(kind, packed):
    worst = interpreted(kind[0], "delta" if kind[1] else "additive", "chunk", packed)
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_step_kernels_in_the_interpreter(kind):
    worst = interpreted(kind[0], "delta" if kind[1] else "additive", "step", "batch")
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("backend", ["torch", "fla"])
def test_on_a_gpu(kind, backend):
    if backend == "fla" and not fla.installed():
        pytest.skip("fla or triton is missing, or hidden in this process")
    case = draw(kind, T=300, H=4, K=64, V=64, log_decay=None if kind[0] == "none" else -0.1)
    on_gpu = {n: None if x is None else x.cuda() for n, x in case.items()}
    got = differentiate(ops.chunk, on_gpu, torch.float32, backend=backend)
    tolerance = 1e-6 if backend == "torch" else 5e-3  # fla multiplies in TF32
    assert_close({n: x.cpu() for n, x in got.items()}, definition(case), tolerance)


@pytest.fixture
def pretend(monkeypatch):
    """`fla` as if installed; records what it is asked, and answers nothing."""
    asked = []
    monkeypatch.setattr(fla, "installed", lambda: True)
    monkeypatch.setattr(fla, "run", lambda op, *args, **kwargs: asked.append(op))
    return asked


def small():
    return {n: None if x is None else x.float() for n, x in draw(("scalar", True), T=4).items()}


def test_cpu_tensors_stay_with_pytorch(pretend, monkeypatch):
    monkeypatch.delenv(fla.VARIABLE, raising=False)
    ops.chunk(**small())
    ops.step(**small())
    assert pretend == []


def test_argument_beats_variable_beats_device(pretend, monkeypatch):
    monkeypatch.setenv(fla.VARIABLE, "fla")
    ops.chunk(**small())
    ops.step(**small())
    assert pretend == ["chunk", "step"]
    ops.chunk(**small(), backend="torch")
    assert pretend == ["chunk", "step"]
    monkeypatch.setenv(fla.VARIABLE, "torch")
    ops.step(**small(), backend="fla")
    assert pretend == ["chunk", "step", "step"]
    assert fla.wanted("auto", small()["q"]) is False


def test_cuda_tensors_go_to_fla(monkeypatch):
    class OnCuda:
        device = torch.device("cuda")

    monkeypatch.delenv(fla.VARIABLE, raising=False)
    monkeypatch.setattr(fla, "installed", lambda: True)
    assert fla.wanted(None, OnCuda())
    monkeypatch.setattr(fla, "installed", lambda: False)
    assert not fla.wanted(None, OnCuda())


def test_unknown_or_missing_backends_are_refused(monkeypatch):
    with pytest.raises(ValueError, match='backend: got \'triton\', expected "auto", "torch" or "fla"'):
        ops.chunk(**small(), backend="triton")
    monkeypatch.setenv(fla.VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"{fla.VARIABLE}: got 'cuda'"):
        ops.step(**small())
    monkeypatch.setattr(fla, "installed", lambda: False)
    with pytest.raises(ValueError, match=r'backend: got "fla", which needs .* pip install "subquad\[gpu\]"'):
        ops.chunk(**small(), backend="fla")


def test_hidden_modules_count_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    assert not fla.installed()


def test_what_fla_lacks_falls_back_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(fla, "installed", lambda: True)
    fla._say_once.cache_clear()
    case = draw(("scalar", True), T=70)
    with caplog.at_level(logging.WARNING, "subquad.ops"):
        got = differentiate(ops.chunk, case, backend="fla")
        differentiate(ops.chunk, case, backend="fla")
    assert_close(got, definition(case), 1e-13)
    assert [r.getMessage() for r in caplog.records] == [
        "ops.chunk: computed by PyTorch instead of fla: fla computes in float32 at most"
    ]


@pytest.mark.parametrize(
    ("op", "change", "reason"),
    [
        ("chunk", {"q": torch.zeros(1, 4, 2, 300)}, "heads of 256"),
        ("chunk", {"q": torch.zeros(1, 0, 2, 8)}, "empty"),
        ("step", {"gradients": True}, "no backward"),
    ],
    ids=["wide", "empty", "gradients"],
)
def test_reasons(op, change, reason):
    arguments = {"q": torch.zeros(1, 4, 2, 8), "v": torch.zeros(1, 4, 2, 8), "log_decay": None, "gradients": False}
    assert reason in fla.lacks(op, beta=torch.zeros(1, 4, 2), **arguments | change)
    assert fla.lacks("chunk", beta=None, **arguments) is None
