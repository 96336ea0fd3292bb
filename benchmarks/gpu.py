"""Measures a machine with an accelerator, and distills a teacher on it through all stages in a given time.

    python -m benchmarks.gpu --device cuda --seconds 420 --teacher smollm2-135m --text books.txt --output results/gpu
    python -m benchmarks.gpu --device cpu --seconds 60 --output DIR         # the same path on a machine without one

Parts: rates of the device; compilation of the Triton kernels, in a process for each operator, since it takes minutes
one after another; operators, forward and backward, against the same kernel called through fla and against SDPA; the
short convolution; the fused loss against plain logits; a decoded token against the teacher's cache; a distillation with
the tokens per second of each stage. Writes NAME.json and NAME.md, with NAME the device's. A part that fails is
reported, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from benchmarks import decode, loss, ops_timing
from benchmarks.common import ROOT, Parser, machine, markdown_table, positive, run_as_script, write_json
from subquad import ops
from subquad.config import Recipe
from subquad.distill.logging_callbacks import read_jsonl
from subquad.distill.pipeline import distill
from subquad.evaluate.efficiency import peak_memory, timed
from subquad.modeling.cache import CACHE_ARGUMENT, cache_bytes
from subquad.ops import fla
from subquad.utils import run_info

Row = dict[str, Any]
STAGE_SHARES = {"matrix": 0.05, "hidden": 0.25, "end_to_end": 0.7}
"""Of the seconds of the distillation."""
PILOT_STEPS = 30


def median_ms(call: Callable[[], Any], device: torch.device, samples: int = 7) -> float:
    """Median milliseconds of a call, after two warm-ups."""
    times = [timed(call, device)[1] for _ in range(samples + 2)][2:]
    return 1e3 * statistics.median(times)


# ---------------------------------------------------------------------- parts


def rates(args: argparse.Namespace) -> list[Row]:
    """The largest matrix product rate in bfloat16, and the bandwidth of a copy, bytes read and written."""
    n, device = (8192 if args.cuda else 512), args.device
    x, y = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    milliseconds = median_ms(lambda: x @ y, device)
    buffer = torch.empty(2**30 if args.cuda else 2**24, dtype=torch.uint8, device=device)
    copy = median_ms(lambda: buffer.clone(), device)
    args.matmul_rate = 2 * n**3 / milliseconds * 1e3
    return [
        {"rate": f"bfloat16 product of {n} x {n}", "value": args.matmul_rate / 1e12, "unit": "Tflop/s"},
        {"rate": "copy", "value": 2 * buffer.numel() / copy / 1e6, "unit": "GB/s"},
    ]


def compilation(args: argparse.Namespace) -> list[Row]:
    """Fills Triton's cache on disk: every operator once, in processes beside each other."""
    options = [
        "--device",
        str(args.device),
        "--configs",
        str(args.configs),
        "--parts",
        "operators",
        "--lengths",
        "2048",
    ]
    with tempfile.TemporaryDirectory() as directory:
        processes = {
            name: subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu", *options, "--only", name, "--output", directory],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
            )
            for name in (args.only if args.cuda else args.only[:1])
        }
        return [{"compiled": name, "exit code": process.wait()} for name, process in processes.items()]


def limit_autotuning(configs: int) -> None:
    """Lets Triton try the first `configs` configurations of a kernel; all of them take minutes."""
    with contextlib.suppress(ImportError):
        from triton.runtime.autotuner import Autotuner

        prune = Autotuner.prune_configs
        Autotuner.prune_configs = lambda self, kwargs: prune(self, kwargs)[:configs]  # type: ignore[method-assign]


def fla_calls() -> dict[str, Callable[[dict], Any]]:
    """The kernels of fla, called as its own layers call them."""
    if not fla.installed():
        return {}
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.simple_gla import chunk_simple_gla

    return {
        "none": lambda a: chunk_simple_gla(a["q"], a["k"], a["v"], output_final_state=True),
        "scalar": lambda a: chunk_simple_gla(a["q"], a["k"], a["v"], g=a["scalar"].float(), output_final_state=True),
        "channel": lambda a: chunk_gla(a["q"], a["k"], a["v"], g=a["channel"].float(), output_final_state=True),
        "gated_delta": lambda a: chunk_gated_delta_rule(
            a["q"], a["unit_k"], a["v"], g=a["scalar"].float(), beta=a["beta"], output_final_state=True
        ),
        "kda": lambda a: chunk_kda(
            a["q"], a["unit_k"], a["v"], g=a["channel"].float(), beta=a["beta"], output_final_state=True
        ),
    }


def operators(args: argparse.Namespace) -> list[Row]:
    """Forward and backward of every operator; the calls of one row alternate."""
    rows, direct = [], fla_calls() if args.cuda else {}
    for T in args.lengths if args.cuda else (256,):
        size = ops_timing.Size(T, max(1, args.tokens // T) if args.cuda else 1)
        inputs = {
            name: x.detach().to(args.device, torch.bfloat16).requires_grad_()
            for name, x in ops_timing.arguments(size).items()
        }
        sdpa = median_ms(ops_timing.forward_backward(ops_timing.sdpa, inputs), args.device)
        for name in args.only:
            function = ops_timing.variants()[name]
            calls = {"ours": ops_timing.forward_backward(function, inputs)}
            with contextlib.suppress(RuntimeError):  # fla refuses some kernels on some devices
                if name in direct:
                    calls["fla"] = ops_timing.forward_backward(direct[name], inputs)
            times: dict[str, list[float]] = {key: [] for key in calls}
            for sample in range(9):
                for key, call in calls.items():
                    seconds = timed(call, args.device)[1]
                    if sample >= 2:
                        times[key].append(1e3 * seconds)
            ms = {key: statistics.median(values) for key, values in times.items()}
            ratio = ms["ours"] / ms["fla"] if "fla" in ms else None
            rows.append({"op": name, "T": T, "B": size.B, "ms": ms["ours"], "fla_ms": ms.get("fla"),
                         "ours / fla": ratio, "sdpa_ms": sdpa, "x SDPA": sdpa / ms["ours"]})  # fmt: skip
    return rows


def convolution(args: argparse.Namespace) -> list[Row]:
    """Forward and backward of the short convolution (4 taps, SiLU) against `conv1d`."""
    B, T, D = (8, 4096, 1728) if args.cuda else (1, 256, 192)
    x = torch.randn(B, T, D, device=args.device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(D, 4, device=args.device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)

    def conv1d() -> torch.Tensor:
        return F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], groups=D)).mT

    calls = {"short_conv": lambda: ops.short_conv(x, weight, activation="silu")[0], "conv1d": conv1d}
    return [
        {"convolution": name, "B": B, "T": T, "D": D,
         "ms": median_ms(lambda call=call: torch.autograd.grad(call(), (x, weight), grad), args.device)}
        for name, call in calls.items()
    ]  # fmt: skip


def fused_loss(args: argparse.Namespace) -> list[Row]:
    """Stage 3's loss with gradients: the fused form, in chunks of several sizes, and full logits."""
    tokens, vocabulary, hidden = (16384, 49152, 576) if args.cuda else (128, 4096, 192)
    dtype = torch.bfloat16 if args.cuda else torch.float32
    drawn = (x.detach().to(args.device) for x in loss.make_inputs(tokens, vocabulary, hidden, dtype))
    h, H, W, U, labels = drawn
    inputs = h.requires_grad_(), H, W.requires_grad_(), U, labels
    rows = []
    for name, chunk in (("straightforward", 0), ("fused", 512), ("fused", 2048), ("fused", 8192)):
        run = lambda name=name, chunk=chunk: loss.run_once(name, inputs, "forward", chunk)  # noqa: E731
        value, peak = peak_memory(run, args.device)
        rows.append({"loss": name, "chunk": chunk, "value": value, "peak_MB": (peak or 0) / 1e6,
                     "ms": median_ms(run, args.device, 3)})  # fmt: skip
    return rows


def decoding(args: argparse.Namespace) -> list[Row]:
    """One decoding step of a batch of 8 in bfloat16, the teacher's size random weights."""
    size, batch = ("smollm2", 8) if args.cuda else ("nano", 1)
    names = ["gla", "gated_deltanet", "mamba2"]
    config, models = decode.build(size, torch.bfloat16 if args.cuda else torch.float32, names)
    rows, token = [], torch.zeros(batch, 1, dtype=torch.long, device=args.device)
    for name, model in models.items():
        model.to(args.device)
        for context in (1024, 4096, 16384, 65536) if args.cuda else (64, 128):
            if name == decode.TEACHER:
                cache = decode.teacher_cache(config, context, batch, model.dtype, args.device)
            elif context > (1024 if args.cuda else 64):
                break  # a student's step does not depend on the context
            else:
                cache = model.new_cache()
                model(token.expand(-1, 8), use_cache=True, **{CACHE_ARGUMENT: cache})
            with torch.no_grad():
                ms = median_ms(
                    lambda m=model, c=cache: m(token, use_cache=True, **{CACHE_ARGUMENT: c}), args.device, 30
                )
            rows.append({"model": name, "context": context if name == decode.TEACHER else "any", "batch": batch,
                         "ms per step": ms, "cache_MB": cache_bytes(cache) / 1e6})  # fmt: skip
    return rows


# ---------------------------------------------------------------------- distillation


def recipe(args: argparse.Namespace, tokens: dict[str, int], **student: Any) -> Recipe:
    rates = {
        "matrix": {"lr": 1e-3, "param_groups": {"attention_projections": {"lr": 3e-4}}},
        "hidden": {"lr": 2e-3, "param_groups": {"attention_projections": {"lr": 5e-4}}},
        "end_to_end": {"lr": 2e-4, "param_groups": {"mixer": {"lr": 1e-3}, "attention_projections": {"lr": 5e-4}}},
    }
    stages = {name: {"tokens": count, "batch_size": args.batch, **rates[name]} for name, count in tokens.items()}
    return Recipe.model_validate(
        {
            "teacher": args.teacher,
            "data": {"source": args.text, "seq_len": args.seq_len},
            "student": {"mixer": args.mixer, **student},
            "stages": stages,
            "checkpoint": {"save_steps": 100_000},
            "precision": "bfloat16" if args.cuda else "float32",
            "evaluation": {"eval_tokens": 65_536 if args.cuda else 512},
        }
    )


def stage_rates(directory: Path) -> dict[str, float]:
    """Tokens per second of each stage between its first and last log line."""
    records = [r for r in read_jsonl(directory / "metrics.jsonl") if "tokens_per_second" in r]
    found = {}
    for stage in dict.fromkeys(r["stage"] for r in records):
        first, *_, last = [r for r in records if r["stage"] == stage]
        found[stage] = (last["tokens"] - first["tokens"]) / max(1e-9, last["seconds"] - first["seconds"])
    return found


def distillation(args: argparse.Namespace) -> list[Row]:
    """Distills through all stages for the remaining time; its rates come from a short run."""
    loaded = subquad.load_teacher(args.teacher)
    per_step = args.batch * args.seq_len
    with tempfile.TemporaryDirectory() as directory:
        pilot, final = Path(directory, "pilot"), args.student or Path(directory, "final")
        steps = PILOT_STEPS if args.cuda else 3
        short = dict.fromkeys(STAGE_SHARES, steps * per_step)
        distill(recipe(args, short, calibration_tokens=None), pilot, loaded)
        speed = stage_rates(pilot)
        seconds = max(1.0, args.deadline - time.perf_counter())
        tokens = {s: max(2 * per_step, int(share * seconds * speed[s])) for s, share in STAGE_SHARES.items()}
        if args.cuda:
            torch.cuda.reset_peak_memory_stats()
        calibration = {} if args.cuda else {"calibration_tokens": per_step}
        result = distill(recipe(args, tokens, **calibration), final, loaded)
        speed = stage_rates(final)
        args.metrics = read_jsonl(final / "metrics.jsonl")
    parameters = sum(p.numel() for p in loaded[0].parameters())
    operations = {"matrix": 2 * parameters, "hidden": 2 * parameters, "end_to_end": 8 * parameters}  # at least
    rows = [
        {"stage": s, "tokens": tokens[s], "tokens_per_second": speed[s],
         "share of bf16 rate": operations[s] * speed[s] / args.matmul_rate if args.matmul_rate else None}
        for s in tokens
    ]  # fmt: skip
    memory = torch.cuda.max_memory_allocated() / 1e9 if args.cuda else None
    numbers = {name: value for name, value in result.items() if not isinstance(value, dict)}  # no text sample
    return [*rows, {"stage": "all", "tokens": sum(tokens.values()), "peak_GB": memory, **numbers}]


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "rates": rates,
    "compilation": compilation,
    "operators": operators,
    "convolution": convolution,
    "loss": fused_loss,
    "decoding": decoding,
    "distillation": distillation,
}


# ---------------------------------------------------------------------- tables and command


def table(rows: list[Row]) -> str:
    header = list(dict.fromkeys(name for row in rows for name in row))
    return markdown_table(header, [[cell(row.get(name)) for name in header] for row in rows])


def cell(value: Any) -> str:
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("gpu", __doc__)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=positive, default=420.0, help="of the whole; what is left is distillation")
    parser.add_argument("--teacher", default="nano")
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--text", default="python-stdlib", help="source of the training text")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="rows in a training step on the accelerator")
    parser.add_argument("--student", type=Path, metavar="DIR", help="keep the distilled student there")
    parser.add_argument("--tokens", type=int, default=32768, help="in a call of an operator on the accelerator")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="of the operators")
    parser.add_argument("--only", nargs="+", default=list(ops_timing.variants()), help="operators")
    parser.add_argument("--configs", type=int, default=3, help="configurations that Triton tries for a kernel")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of NAME.json and NAME.md")
    args = parser.parse_args(argv)
    args.matmul_rate = None
    args.cuda, args.deadline = args.device.type == "cuda", time.perf_counter() + args.seconds
    if args.cuda:
        limit_autotuning(args.configs)
    else:
        args.batch, args.seq_len = 2, 64
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if args.cuda else "cpu"
    target = args.output / re.sub(r"[^a-z0-9]+", "-", device.lower())
    results: dict[str, Any] = {**run_info(), "machine": machine(), "fla": fla.installed(), "parts": {}, "failed": {}}
    lines = [f"# {device}", "", "Written by `python -m benchmarks.gpu`.", ""]
    for name in args.parts:
        start = time.perf_counter()
        try:
            rows = PARTS[name](args)
        except Exception:
            results["failed"][name] = traceback.format_exc()
            text = f"```text\n{results['failed'][name]}```"
        else:
            results["parts"][name], text = rows, table(rows)
            results["metrics"] = getattr(args, "metrics", [])
        lines += [f"## {name} ({time.perf_counter() - start:.0f} s)", "", text, ""]
        print("\n".join(lines[-4:]), flush=True)
        write_json(target.with_suffix(".json"), results)
        target.with_suffix(".md").write_text("\n".join(lines))
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    run_as_script(main)
