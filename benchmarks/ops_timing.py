"""How fast the ops are on this machine, beside every peer that is installed; knows nothing of models.

All contestants of a size run interleaved in one process, so that a busy machine disturbs them alike; a time is a
median, forward and backward together. The floor is the matrix multiplications of our own chunk form at the rate that a
batch of 64 x 64 products reaches here.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import ops
from subquad.ops.engine.segments import DEFAULT_CHUNK

Call = Callable[[], object]


@dataclass(frozen=True)
class Size:
    T: int = 2048
    B: int = 1
    H: int = 9
    K: int = 64
    V: int = 64


@dataclass
class Row:
    """One contestant at one size: milliseconds forward and backward, and its share of the matmul rate if it is ours."""

    name: str
    size: Size
    milliseconds: float
    fastest: float
    samples: int
    share_of_matmul_rate: float | None = None


@dataclass
class Token:
    """One decoded token: microseconds; how many remain when states have 4 x 4 numbers, so that Python and the launching
    of ops are all there is; and how many times as long SDPA takes."""

    name: str
    microseconds: float
    launches: float | None
    ratio: float


def variants() -> dict[str, Callable[[dict], tuple]]:
    """Our kinds, by name: from the arguments to the op's result."""
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
    """Random arguments of every kind; gates as a model has them, half-lives of ten tokens and up."""
    gen = torch.Generator().manual_seed(seed)
    B, T, H = size.B, size.T, size.H
    q, k, v = (torch.randn(B, T, H, n, generator=gen) for n in (size.K, size.K, size.V))
    made = {
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
    return {name: x.requires_grad_() for name, x in made.items()}


def baselines() -> tuple[dict[str, Callable[[dict], object]], dict[str, str]]:
    """Other implementations by name, and why those that are not here are not."""
    found: dict[str, Callable[[dict], object]] = {"sdpa": _sdpa}
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
        except (ImportError, AttributeError) as why:
            missing[name] = f"{type(why).__name__}: {why}"
    if not torch.cuda.is_available():
        missing["fla"] = "its kernels need a CUDA device"
    return found, missing


def _heads_first(a: dict, *names: str) -> list[Tensor]:
    return [a[name].transpose(1, 2) for name in names]


def _sdpa(a: dict) -> Tensor:
    q, k, v = _heads_first(a, "q", "k", "v")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _model_function(model: str, function: str) -> Callable:
    """A function of `transformers` in its PyTorch form: with `fla` visible it would bind kernels that need a GPU."""
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
    peer = _model_function("qwen3_next", "torch_chunk_gated_delta_rule")
    return lambda a: peer(a["q"], a["unit_k"], a["v"], a["scalar"], a["beta"])[0]


def _transformers_kda() -> Callable[[dict], object]:
    peer = _model_function("kimi_linear", "chunk_kimi_delta_attention")
    return lambda a: peer(a["q"], a["unit_k"], a["v"], a["channel"], a["beta"])[0]


def _transformers_mamba2() -> Callable[[dict], object]:
    peer = _model_function("mamba2", "mamba2_chunk_scan")

    def call(a: dict) -> Tensor:
        ones = -torch.ones(a["q"].shape[2])
        o = peer(a["v"], -a["scalar"], ones, a["k"], a["q"], chunk_size=256)
        return o[0] if isinstance(o, tuple) else o

    return call


def _transformers_mlstm() -> Callable[[dict], object]:
    peer = _model_function("xlstm", "mlstm_chunkwise_native_autograd")
    return lambda a: peer(*_heads_first(a, "q", "k", "v"), *_contiguous_gates(a))


def _mlstm_kernels(form: str) -> Callable[[dict], object]:
    module = importlib.import_module("mlstm_kernels.torch.chunkwise.native")
    peer = getattr(module, f"mlstm_chunkwise__{form}")
    return lambda a: peer(*(x.contiguous() for x in _heads_first(a, "q", "k", "v")), *_contiguous_gates(a))


def _contiguous_gates(a: dict) -> list[Tensor]:
    return [x.contiguous() for x in _heads_first(a, "input_gate", "forget_gate")]


def forward_backward(function: Callable[[dict], object], a: dict[str, Tensor]) -> Call:
    """A call that runs `function` and its backward pass by every argument it uses."""

    def output() -> Tensor:
        result = function(a)
        o = result[0] if isinstance(result, tuple) else result
        assert isinstance(o, Tensor)
        return o

    o = output()
    cotangent = torch.randn(o.shape)
    used = torch.autograd.grad(o, list(a.values()), cotangent, allow_unused=True)
    leaves = [x for x, grad in zip(a.values(), used, strict=True) if grad is not None]
    return lambda: torch.autograd.grad(output(), leaves, cotangent)


def time_interleaved(calls: dict[str, Call], samples: int = 9, seconds: float = 30.0) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns, until all have their samples or the time is over (three at least).

    The first round warms up and is not counted.
    """
    times = {name: [_milliseconds(call)] for name, call in calls.items()}
    # One call of some peers takes longer than everything else together: theirs stays the only one.
    quick = [name for name in calls if times[name][0] < 1e3 * seconds / 10]
    begun, order = time.perf_counter(), random.Random(0)
    for name in quick:
        times[name].clear()
    for turn in range(samples):
        # In another order each turn: who follows a large peer finds cold caches and returned pages.
        for name in order.sample(quick, len(quick)):
            times[name].append(_milliseconds(calls[name]))
        if turn >= 2 and time.perf_counter() - begun > seconds:
            break
    return times


def _milliseconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def matmul_rate() -> float:
    """Floating-point operations a second of a batch of 64 x 64 products that stays in the cache."""
    x, y = torch.randn(2, 144, 64, 64)
    out = torch.empty_like(x)
    times = time_interleaved({"bmm": lambda: torch.bmm(x, y, out=out)}, samples=200)["bmm"]
    return 2 * 144 * 64**3 / (statistics.median(times) * 1e-3)


def matmul_operations(kind: str, size: Size) -> float:
    """Floating-point operations in the matrix products of our chunk form, forward and backward."""
    C, K, V = DEFAULT_CHUNK, size.K, size.V + (kind in ("mlstm", "normalized"))
    chunks = size.B * size.H * -(-size.T // C)
    if kind in ("delta", "gated_delta", "kda"):
        inside = C * C * (16 * K + 10 * V) + 2 * C**3 / 3
        return chunks * (inside + 22 * C * K * V)
    return chunks * (C * C * (6 * K + 6 * V) + 12 * C * K * V)


def measure(size: Size, names: list[str] | None = None, seconds: float = 60.0) -> tuple[list[Row], dict[str, str]]:
    """Every kind of ours and every peer (or those named) at one size; and the missing peers, with the reason."""
    ours, (others, missing) = variants(), baselines()
    a = arguments(size)
    contestants = {n: f for n, f in (ours | others).items() if names is None or n in names}
    calls = {}
    for name, function in contestants.items():
        try:
            calls[name] = forward_backward(function, a)
        except (RuntimeError, ValueError, TypeError) as why:
            missing[name] = f"T = {size.T}: {why}"
    rate = matmul_rate()
    rows = []
    for name, times in time_interleaved(calls, seconds=seconds).items():
        median = statistics.median(times)
        share = matmul_operations(name, size) / (median * 1e-3) / rate if name in ours else None
        rows.append(Row(name, size, median, min(times), len(times), share))
    return rows, missing


def measure_decode(size: Size, context: int = 8192) -> list[Token]:
    """One token: each kind from its state, in place, and SDPA over a key/value cache of `context` tokens."""
    calls = {name: (call, _decoding(Size(1, size.B, size.H, 4, 4))[name]) for name, call in _decoding(size).items()}
    cache = torch.randn(2, size.B, size.H, context, size.K)
    q = torch.randn(size.B, size.H, 1, size.K)
    flat: dict[str, Call] = {"sdpa": lambda: F.scaled_dot_product_attention(q, cache[0], cache[1])}
    for name, (call, small) in calls.items():
        flat |= {name: call, f"launches of {name}": small}
    with torch.no_grad():
        times = {n: 1e3 * statistics.median(x) for n, x in time_interleaved(flat, samples=200, seconds=30.0).items()}
    tokens = [Token(n, times[n], times[f"launches of {n}"], times["sdpa"] / times[n]) for n in calls]
    return [*tokens, Token(f"sdpa over {context}", times["sdpa"], None, 1.0)]


def _decoding(size: Size) -> dict[str, Call]:
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


def peak_memory(kind: str, size: Size) -> int:
    """Bytes by which one forward and backward pass raises the peak of a fresh process."""
    program = (
        "from benchmarks import ops_timing as bench\n"
        f"size, function = bench.{size!r}, bench.variants()[{kind!r}]\n"
        "bench.forward_backward(function, bench.arguments(bench.Size(64)))()\n"
        "a = bench.arguments(size)\n"
        "before = bench.peak_rss()\n"
        "bench.forward_backward(function, a)\n"
        "print(bench.peak_rss() - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


def peak_rss() -> int:
    """Bytes of memory that this process has held at most. On Linux the kernel's figure for its own memory: `ru_maxrss`
    begins with what the process held that started it."""
    try:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine() -> dict[str, str | int]:
    """What the figures belong to."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), model)
    except OSError:
        pass
    return {
        "processor": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(rows: list[Row]) -> str:
    """The rows of one size as text, with ratios to SDPA where it ran."""
    sdpa = next((r.milliseconds for r in rows if r.name == "sdpa"), None)
    lines = [f"{'':26s} {'ms':>9s} {'min':>9s} {'x SDPA':>8s} {'of matmul rate':>15s}"]
    for row in sorted(rows, key=lambda r: r.milliseconds):
        ratio = f"{sdpa / row.milliseconds:8.2f}" if sdpa else " " * 8
        share = "" if row.share_of_matmul_rate is None else f"{row.share_of_matmul_rate:14.0%}"
        lines.append(f"{row.name:26s} {row.milliseconds:9.2f} {row.fastest:9.2f} {ratio} {share}")
    return "\n".join(lines)
