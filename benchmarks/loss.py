"""Measures peak memory and time of stage 3's loss with its gradients: the fused loss against the straightforward one.

    python -m benchmarks.loss [--tokens 4096] [--vocabulary 49152] [--hidden 576] [--divergence forward]
        [--dtype float32] [--chunk 512] [--json FILE]

straightforward: float32 logits of student and teacher, `F.cross_entropy`, `F.kl_div`, backward.
fused: `subquad.distill.distillation_loss` on the hidden states.

Peak memory is the highest resident size of a new process less that before the loss, when inputs exist. Times are
medians of interleaved runs in one process: wall-clock time, and the processor time of all threads, which depends less
on other load.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ROOT, Parser, machine, output_file, peak_rss, run_as_script, write_json
from subquad.config import EndToEndStage
from subquad.distill.distillation_loss import CHUNK, distillation_loss
from subquad.distill.lm_head import Head

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> Inputs:
    """Hidden states and heads of student and teacher, and labels; logits have a standard deviation of about 2."""
    torch.manual_seed(0)
    h, H = (torch.randn(tokens, hidden, dtype=dtype) for _ in range(2))
    W, U = (torch.randn(vocabulary, hidden, dtype=dtype).mul_(2 * hidden**-0.5) for _ in range(2))
    return h.requires_grad_(), H, W.requires_grad_(), U, torch.randint(vocabulary, (tokens,))


def straightforward(inputs: Inputs, divergence: str, chunk: int) -> Tensor:
    h, H, W, U, labels = inputs
    student = F.linear(h, W).float()
    with torch.no_grad():
        teacher = F.linear(H, U).float()
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    ce = F.cross_entropy(student, labels)
    if divergence == "forward":
        return ce + F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    if divergence == "reverse":
        return ce + F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    half = torch.tensor(0.5).log()
    log_m = torch.logaddexp(log_p + half, log_q + half)
    sides = [F.kl_div(log_m, side, log_target=True, reduction="batchmean") for side in (log_p, log_q)]
    return ce + 0.5 * sides[0] + 0.5 * sides[1]


def fused(inputs: Inputs, divergence: str, chunk: int) -> Tensor:
    h, H, W, U, labels = inputs
    stage = EndToEndStage(tokens=1, lr=1.0, divergence=divergence)
    return distillation_loss(h, H, labels, Head(W), Head(U), stage, chunk)[0]


LOSSES: dict[str, Callable[[Inputs, str, int], Tensor]] = {
    "straightforward": straightforward,
    "fused": fused,
}


def run_once(name: str, inputs: Inputs, divergence: str, chunk: int) -> float:
    loss = LOSSES[name](inputs, divergence, chunk)
    torch.autograd.grad(loss, [inputs[0], inputs[2]])
    return loss.item()


def peak_in_this_process(name: str, args: argparse.Namespace) -> int:
    """Bytes above the inputs that one loss with its gradients takes; the process must be new."""
    dtype = getattr(torch, args.dtype)
    run_once(name, make_inputs(8, 64, 16, dtype), args.divergence, args.chunk)  # loads libraries, starts threads
    inputs = make_inputs(args.tokens, args.vocabulary, args.hidden, dtype)
    before = peak_rss()
    run_once(name, inputs, args.divergence, args.chunk)
    return peak_rss() - before


def peak(name: str, args: argparse.Namespace) -> int:
    passed = ("tokens", "vocabulary", "hidden", "divergence", "dtype", "chunk")
    options = [f"--{option}={getattr(args, option)}" for option in passed]
    command = [sys.executable, "-m", "benchmarks.loss", "--peak", name, *options]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def times(args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median seconds of each loss: wall-clock and processor time."""
    inputs = make_inputs(args.tokens, args.vocabulary, args.hidden, getattr(torch, args.dtype))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in args.losses}
    for repeat in range(args.repeats + 1):
        for name, samples in seconds.items():
            start = time.perf_counter(), time.process_time()
            run_once(name, inputs, args.divergence, args.chunk)
            if repeat:
                samples.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {
        name: (statistics.median(wall for wall, _ in samples), statistics.median(cpu for _, cpu in samples))
        for name, samples in seconds.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("loss", __doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576, help="hidden size")
    parser.add_argument("--divergence", choices=("forward", "reverse", "jsd"), default="forward")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="tokens per chunk of the fused loss")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="ratios are to the first")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all results there")
    parser.add_argument("--peak", choices=LOSSES, help="only print the peak bytes of this loss in this process")
    args = parser.parse_args(argv)
    if args.peak:
        print(peak_in_this_process(args.peak, args))
        return 0
    peaks = {name: peak(name, args) for name in args.losses}
    seconds = times(args)
    print(
        f"{args.tokens} tokens, vocabulary {args.vocabulary}, hidden {args.hidden}, {args.divergence}, "
        f"{args.dtype}, {torch.get_num_threads()} threads"
    )
    print(f"{'':16s}{'peak MB':>9s}{'ratio':>8s}{'seconds':>9s}{'ratio':>8s}{'cpu s':>9s}{'ratio':>8s}")
    first = args.losses[0]
    base = (peaks[first] / 1e6, *seconds[first])
    results = []
    for name in args.losses:
        numbers = (peaks[name] / 1e6, *seconds[name])
        print(f"{name:16s}" + "".join(f"{x:9.1f}{x / y:8.3f}" for x, y in zip(numbers, base, strict=True)))
        wall, cpu = seconds[name]
        results.append({"loss": name, "peak_bytes": peaks[name], "seconds": wall, "cpu_seconds": cpu})
    options = ("tokens", "vocabulary", "hidden", "divergence", "dtype", "chunk", "repeats")
    settings = {option: getattr(args, option) for option in options}
    write_json(args.json, {"machine": machine(), **settings, "results": results})
    return 0


if __name__ == "__main__":
    run_as_script(main)
