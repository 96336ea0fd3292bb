"""Time and memory of the operators and of every installed baseline.

All calls of one size are timed interleaved in one process, so that other load on the machine affects them alike. A time
is a median, forward and backward together. The lower bound is the time of the matrix products of the chunk form at the
rate that batched 64 x 64 products reach on this machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ROOT, Call, time_interleaved
from subquad import ops
from subquad.ops.engine.segments import DEFAULT_CHUNK


@dataclass(frozen=True)
class Size:
    T: int = 2048
    B: int = 1
    H: int = 9
    K: int = 64
    V: int = 64


@dataclass
class Timing:
    """Median and fastest milliseconds, forward and backward, of a variant or baseline at one size."""

    name: str
    size: Size
    milliseconds: float
    fastest: float
    samples: int
    share_of_matmul_rate: float | None = None  # of variants only


@dataclass
class DecodeTiming:
    """One decoded token: microseconds, the same for states of 4 x 4 elements (the cost of dispatch), and speedup over
    SDPA."""

    name: str
    microseconds: float
    launches: float | None
    speedup: float


def variants() -> dict[str, Callable[[dict], tuple]]:
    """The operators by name, as functions of `arguments`."""
    return {
        "none": lambda a: ops.chunk(a["q"], a["k"], a["v"]),
        "scalar": lambda a: ops.chunk(a["q"], a["k"], a["v"], a["scalar"]),
        "channel": lambda a: ops.chunk(a["q"], a["k"], a["v"], a["channel"]),
        "delta": lambda a: ops.chunk(a["q"], a["unit_k"], a["v"], None, a["beta"]),
        "gated_delta": lambda a: ops.chunk(a["q"], a["unit_k"], a["v"], a["scalar"], a["beta"]),
        "kda": lambda a: ops.chunk(a["q"], a["unit_k"], a["v"], a["channel"], a["beta"]),
        "mlstm": lambda a: ops.mlstm(a["q"], a["k"], a["v"], a["input_gate"], a["forget_gate"]),
        "normalized": lambda a: ops.normalized(a["q"], a["k"], a["v"]),
    }


def arguments(size: Size, seed: int = 0) -> dict[str, Tensor]:
    """Random arguments of all operators; gates as in a model, with half-lives of at least ten tokens."""
    gen = torch.Generator().manual_seed(seed)
    B, T, H = size.B, size.T, size.H
    q, k, v = (torch.randn(B, T, H, n, generator=gen) for n in (size.K, size.K, size.V))
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "unit_k": F.normalize(k, dim=-1),
        "scalar": -0.1 * torch.rand(B, T, H, generator=gen),
        "channel": -0.1 * torch.rand(B, T, H, size.K, generator=gen),
        "beta": torch.rand(B, T, H, generator=gen),
        "input_gate": torch.randn(B, T, H, generator=gen),
        "forget_gate": 3 + torch.randn(B, T, H, generator=gen),
    }
    return {name: x.requires_grad_() for name, x in tensors.items()}


def baselines() -> tuple[dict[str, Callable[[dict], object]], dict[str, str]]:
    """Other implementations by name, and the reasons for those that are missing."""
    found: dict[str, Callable[[dict], object]] = {"sdpa": sdpa}
    missing = {}
    for name, load in (
        ("transformers gated_delta", _transformers_gated_delta),
        ("transformers kda", _transformers_kda),
        ("transformers mamba2", _transformers_mamba2),
        ("transformers mlstm", _transformers_mlstm),
        ("mlstm_kernels autograd", lambda: _mlstm_kernels("native_autograd")),
        ("mlstm_kernels custom", lambda: _mlstm_kernels("native_custbw")),
    ):
        try:
            found[name] = load()
        except (ImportError, AttributeError) as error:
            missing[name] = f"{type(error).__name__}: {error}"
    if not torch.cuda.is_available():
        missing["fla"] = "its kernels need a CUDA device"
    return found, missing


def _heads_first(a: dict, *names: str) -> list[Tensor]:
    return [a[name].transpose(1, 2) for name in names]


def sdpa(a: dict) -> Tensor:
    q, k, v = _heads_first(a, "q", "k", "v")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _model_function(model: str, function: str) -> Callable:
    """A PyTorch function of `transformers`. Without a GPU `fla` is hidden, whose kernels it would otherwise bind."""
    name = f"transformers.models.{model}.modeling_{model}"
    if name not in sys.modules and not torch.cuda.is_available():
        before = sys.modules.get("fla")
        sys.modules["fla"] = None  # type: ignore[assignment]
        try:
            importlib.import_module(name)
        finally:
            del sys.modules["fla"]
            if before is not None:
                sys.modules["fla"] = before
    return getattr(importlib.import_module(name), function)


def _transformers_gated_delta() -> Callable[[dict], object]:
    baseline = _model_function("qwen3_next", "torch_chunk_gated_delta_rule")
    return lambda a: baseline(a["q"], a["unit_k"], a["v"], a["scalar"], a["beta"])[0]


def _transformers_kda() -> Callable[[dict], object]:
    baseline = _model_function("kimi_linear", "chunk_kimi_delta_attention")
    return lambda a: baseline(a["q"], a["unit_k"], a["v"], a["channel"], a["beta"])[0]


def _transformers_mamba2() -> Callable[[dict], object]:
    baseline = _model_function("mamba2", "mamba2_chunk_scan")

    def call(a: dict) -> Tensor:
        ones = -torch.ones(a["q"].shape[2])
        o = baseline(a["v"], -a["scalar"], ones, a["k"], a["q"], chunk_size=256)
        return o[0] if isinstance(o, tuple) else o

    return call


def _transformers_mlstm() -> Callable[[dict], object]:
    baseline = _model_function("xlstm", "mlstm_chunkwise_native_autograd")
    return lambda a: baseline(*_heads_first(a, "q", "k", "v"), *_contiguous_gates(a))


def _mlstm_kernels(form: str) -> Callable[[dict], object]:
    module = importlib.import_module("mlstm_kernels.torch.chunkwise.native")
    baseline = getattr(module, f"mlstm_chunkwise__{form}")
    return lambda a: baseline(*(x.contiguous() for x in _heads_first(a, "q", "k", "v")), *_contiguous_gates(a))


def _contiguous_gates(a: dict) -> list[Tensor]:
    return [x.contiguous() for x in _heads_first(a, "input_gate", "forget_gate")]


def forward_backward(function: Callable[[dict], object], a: dict[str, Tensor]) -> Call:
    """A call that runs `function` and its backward pass with respect to every argument that it uses."""

    def output() -> Tensor:
        result = function(a)
        o = result[0] if isinstance(result, tuple) else result
        assert isinstance(o, Tensor)
        return o

    o = output()
    cotangent = torch.randn_like(o)
    used = torch.autograd.grad(o, list(a.values()), cotangent, allow_unused=True)
    leaves = [x for x, grad in zip(a.values(), used, strict=True) if grad is not None]
    return lambda: torch.autograd.grad(output(), leaves, cotangent)


def matmul_rate() -> float:
    """Floating-point operations per second of a batch of 64 x 64 products that fits in the cache."""
    x, y = torch.randn(2, 144, 64, 64)
    out = torch.empty_like(x)
    times = time_interleaved({"bmm": lambda: torch.bmm(x, y, out=out)}, samples=200)["bmm"]
    return 2 * 144 * 64**3 / (statistics.median(times) * 1e-3)


def matmul_operations(variant: str, size: Size) -> float:
    """Floating-point operations in the matrix products of the chunk form, forward and backward."""
    C, K, V = DEFAULT_CHUNK, size.K, size.V + (variant in ("mlstm", "normalized"))
    chunks = size.B * size.H * -(-size.T // C)
    if variant in ("delta", "gated_delta", "kda"):
        inside = C * C * (16 * K + 10 * V) + 2 * C**3 / 3
        return chunks * (inside + 22 * C * K * V)
    return chunks * (C * C * (6 * K + 6 * V) + 12 * C * K * V)


def measure(size: Size, only: list[str] | None = None, seconds: float = 60.0) -> tuple[list[Timing], dict[str, str]]:
    """Times all variants and baselines, or those named, at one size; also returns why baselines are missing."""
    own, (found, missing) = variants(), baselines()
    a = arguments(size)
    functions = {n: f for n, f in (own | found).items() if only is None or n in only}
    calls = {}
    for name, function in functions.items():
        try:
            calls[name] = forward_backward(function, a)
        except (RuntimeError, ValueError, TypeError) as error:
            missing[name] = f"T = {size.T}: {error}"
    rate = matmul_rate()
    results = []
    for name, times in time_interleaved(calls, seconds=seconds).items():
        median = statistics.median(times)
        share = matmul_operations(name, size) / (median * 1e-3) / rate if name in own else None
        results.append(Timing(name, size, median, min(times), len(times), share))
    return results, missing


def measure_decode(size: Size, context: int = 8192) -> list[DecodeTiming]:
    """One token: each variant from its state, in place, and SDPA over a key/value cache of `context` tokens."""
    large, small = _decode_calls(size), _decode_calls(Size(1, size.B, size.H, 4, 4))
    cache = torch.randn(2, size.B, size.H, context, size.K)
    q = torch.randn(size.B, size.H, 1, size.K)
    calls: dict[str, Call] = {"sdpa": lambda: F.scaled_dot_product_attention(q, cache[0], cache[1])}
    for name in large:
        calls |= {name: large[name], f"launches of {name}": small[name]}
    with torch.no_grad():
        times = {n: 1e3 * statistics.median(x) for n, x in time_interleaved(calls, samples=200, seconds=30.0).items()}
    timings = [DecodeTiming(n, times[n], times[f"launches of {n}"], times["sdpa"] / times[n]) for n in large]
    return [*timings, DecodeTiming(f"sdpa over {context}", times["sdpa"], None, 1.0)]


def _decode_calls(size: Size) -> dict[str, Call]:
    a = {name: x.detach() for name, x in arguments(Size(1, size.B, size.H, size.K, size.V)).items()}
    S = torch.zeros(size.B, size.H, size.K, size.V)

    def step(k: str, log_decay: str | None, beta: str | None) -> Call:
        decay, strength = (None if name is None else a[name] for name in (log_decay, beta))
        return lambda: ops.step(a["q"], a[k], a["v"], decay, strength, initial_state=S, inplace=True)

    return {
        "none": step("k", None, None),
        "scalar": step("k", "scalar", None),
        "channel": step("k", "channel", None),
        "gated_delta": step("unit_k", "scalar", "beta"),
        "kda": step("unit_k", "channel", "beta"),
    }


def peak_memory(variant: str, size: Size) -> int:
    """Bytes by which one forward and backward pass raises the peak of a new process."""
    program = (
        "from benchmarks import ops_timing as t\n"
        "from benchmarks.common import peak_rss\n"
        f"size, function = t.{size!r}, t.variants()[{variant!r}]\n"
        "t.forward_backward(function, t.arguments(t.Size(64)))()\n"
        "a = t.arguments(size)\n"
        "before = peak_rss()\n"
        "t.forward_backward(function, a)\n"
        "print(peak_rss() - before)\n"
    )
    command = [sys.executable, "-c", program]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()[-1])
