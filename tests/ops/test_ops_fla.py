"""The `fla` backend: its selection, the fallback to PyTorch, and its results in Triton's interpreter or on a GPU."""

import json
import logging
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

from subquad import ops
from subquad.ops import fla
from subquad.ops.checks import Inputs
from subquad.ops.recurrence import unchecked_step
from tests.helpers.ops import (
    VARIANT_IDS,
    VARIANTS,
    assert_close,
    definition,
    differentiate,
    draw,
    draw_mlstm,
    run_mlstm,
    ungrouped,
)

ROOT = Path(__file__).parents[2]


def missing_packages():
    """Searches the path, since `fla` may be hidden in this process but not in the interpreter's."""
    return [name for name in ("fla", "triton") if PathFinder.find_spec(name) is None]


def interpreted_errors(*arguments):
    if missing_packages():
        pytest.skip(f"needs {' and '.join(missing_packages())}: pip install triton fla-core==0.6.0")
    script = Path(__file__).with_name("fla_interpreted.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.sample
def test_one_chunk_and_one_step_kernel_in_the_interpreter():
    worst = interpreted_errors("scalar", "delta", "chunk", "packed") | interpreted_errors(
        "channel", "additive", "step", "batch"
    )
    worst |= interpreted_errors("scalar", "additive", "chunk", "grouped")
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["batch", "packed", "grouped"])
@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_chunk_kernels_in_the_interpreter(variant, layout):
    worst = interpreted_errors(variant[0], "delta" if variant[1] else "additive", "chunk", layout)
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["moderate", "extreme"])
@pytest.mark.parametrize("layout", ["batch", "packed", "grouped"])
@pytest.mark.parametrize("op", ["mlstm", "normalized"])
def test_normalizers_by_chunk_kernels_in_the_interpreter(op, layout, gates):
    """Also where input gates of mLSTM reach from exp(-20) to exp(20)."""
    worst = interpreted_errors(gates, "additive", op, layout)
    assert max(worst.values()) < 1e-5, worst
    if layout == "batch":
        worst = interpreted_errors(gates, "additive", op, layout, "refused")
        assert max(worst.values()) < 1e-5, worst


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["batch", "packed"])
def test_short_conv_in_the_interpreter(layout):
    worst = interpreted_errors("none", "additive", "short_conv", layout)
    assert max(worst.values()) < 1e-6, worst


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[0] != "channel"], ids=str)
def test_per_channel_kernels_replace_those_of_a_decay_per_head(variant):
    """Where `fla` refuses the latter."""
    worst = interpreted_errors(variant[0], "delta" if variant[1] else "additive", "chunk", "batch", "refused")
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_step_kernels_in_the_interpreter(variant):
    worst = interpreted_errors(variant[0], "delta" if variant[1] else "additive", "step", "batch")
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("backend", ["torch", "fla"])
def test_chunk_on_a_gpu(variant, backend, queries):
    if backend == "fla" and not fla.installed():
        pytest.skip("fla or triton is missing, or hidden in this process")
    case = draw(variant, T=300, H=4, K=64, V=64, log_decay=None if variant[0] == "none" else -0.1, queries=queries)
    on_gpu = {n: None if x is None else x.cuda() for n, x in case.items()}
    got = differentiate(ops.chunk, on_gpu, torch.float32, backend=backend)
    tolerance = 1e-6 if backend == "torch" else 5e-3  # fla multiplies in TF32
    assert_close({n: x.cpu() for n, x in got.items()}, definition(case), tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "fla"])
@pytest.mark.parametrize("queries", [1, 3])
def test_mlstm_on_a_gpu(queries, backend):
    if backend == "fla" and not fla.installed():
        pytest.skip("fla or triton is missing, or hidden in this process")
    case = draw_mlstm(300, H=4, K=64, V=64, queries=queries, state=True)
    case["q"], case["k"], case["n"] = (case[name].abs() for name in ("q", "k", "n"))  # no normalizer near zero
    on_gpu = {n: x.cuda() for n, x in case.items()}
    got = differentiate(run_mlstm("chunk", backend=backend), on_gpu, torch.float32)
    expected = differentiate(ungrouped(run_mlstm("step")), case)
    assert_close({n: x.cpu() for n, x in got.items()}, expected, 1e-5 if backend == "torch" else 5e-3)


@pytest.fixture
def fla_calls(monkeypatch):
    """Pretends that `fla` is installed, and records its calls, which return None."""
    calls = []
    monkeypatch.setattr(fla, "installed", lambda: True)
    monkeypatch.setattr(fla, "run_kernel", lambda op, *args, **kwargs: calls.append(op))
    return calls


def small():
    return {n: None if x is None else x.float() for n, x in draw(("scalar", True), T=4).items()}


def test_cpu_tensors_use_pytorch(fla_calls, monkeypatch):
    monkeypatch.delenv(fla.BACKEND_VARIABLE, raising=False)
    ops.chunk(**small())
    ops.step(**small())
    assert fla_calls == []


def test_argument_overrides_variable_overrides_device(fla_calls, monkeypatch):
    monkeypatch.setenv(fla.BACKEND_VARIABLE, "fla")
    ops.chunk(**small())
    ops.step(**small())
    assert fla_calls == ["chunk", "step"]
    ops.chunk(**small(), backend="torch")
    assert fla_calls == ["chunk", "step"]
    monkeypatch.setenv(fla.BACKEND_VARIABLE, "torch")
    ops.step(**small(), backend="fla")
    assert fla_calls == ["chunk", "step", "step"]
    assert fla.use_fla("auto", small()["q"]) is False


def test_cuda_tensors_use_fla(monkeypatch):
    class OnCuda:
        device = torch.device("cuda")

    monkeypatch.delenv(fla.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(fla, "installed", lambda: True)
    assert fla.use_fla(None, OnCuda())
    monkeypatch.setattr(fla, "installed", lambda: False)
    assert not fla.use_fla(None, OnCuda())


def test_unknown_and_missing_backends_raise(monkeypatch):
    with pytest.raises(ValueError, match="backend: got 'triton'"):
        ops.chunk(**small(), backend="triton")
    monkeypatch.setenv(fla.BACKEND_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"{fla.BACKEND_VARIABLE}: got 'cuda'"):
        ops.step(**small())
    monkeypatch.setattr(fla, "installed", lambda: False)
    with pytest.raises(ValueError, match=r'backend: got .*pip install "\.\[gpu\]"'):
        ops.chunk(**small(), backend="fla")


def test_hidden_fla_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    assert not fla.installed()


def test_unsupported_calls_fall_back_with_one_log_line(monkeypatch, caplog):
    monkeypatch.setattr(fla, "installed", lambda: True)
    fla.warn_once.cache_clear()
    case = draw(("scalar", True), T=70)
    with caplog.at_level(logging.WARNING, "subquad.ops"):
        got = differentiate(ops.chunk, case, backend="fla")
        differentiate(ops.chunk, case, backend="fla")
    assert_close(got, definition(case), 1e-13)
    (record,) = caplog.records
    assert "ops.chunk" in record.getMessage()
    assert "float64" in record.getMessage()


@pytest.mark.parametrize(
    ("op", "change", "reason"),
    [
        ("chunk", {"q": torch.zeros(1, 4, 2, 300)}, "256"),
        ("chunk", {"v": torch.zeros(1, 4, 2, 8)}, "16"),
        ("chunk", {"q": torch.zeros(1, 0, 2, 16)}, "empty"),
        ("step", {"gradients": True}, "backward"),
        ("step", {"q": torch.zeros(1, 4, 4, 16)}, "one query head"),
    ],
    ids=["wide", "narrow", "empty", "gradients", "grouped"],
)
def test_unsupported_reasons(op, change, reason):
    arguments = {"q": torch.zeros(1, 4, 2, 16), "v": torch.zeros(1, 4, 2, 16), "gradients": False}
    assert reason in fla.unsupported_reason(op, beta=torch.zeros(1, 4, 2), **arguments | change)
    assert fla.unsupported_reason("chunk", beta=None, **arguments) is None


def test_a_compiled_step_is_pytorchs(monkeypatch):
    """A region that is compiled once for all layers has no place for fla's kernels and log lines."""
    monkeypatch.setattr(fla, "installed", lambda: True)
    q, k, v = (torch.randn(1, 1, heads, 16) for heads in (2, 1, 1))
    region = torch.compiler.nested_compile_region(lambda q, k, v: unchecked_step(Inputs(q, k, v), backend="fla")[0])
    compiled = torch.compile(lambda q, k, v: region(q, k, v) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), ops.step(q, k, v, backend="torch")[0] * 2)
