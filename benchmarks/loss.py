"""The fused loss of stage 3 beside the straightforward one: peak memory and time of loss and gradients.

python -m benchmarks.loss [--tokens 4096] [--vocabulary 49152] [--hidden 576] [--divergence forward] [--dtype float32]
    [--chunk 512] [--json FILE]

straightforward: float32 logits of student and teacher, `F.cross_entropy` and `F.kl_div`, backward.
plain: `subquad.distill.distillation_loss` on the same logits, which every model can take.
fused: `subquad.distill.fused_loss`.

Peak memory: the highest resident size of a fresh process, less what it was before the loss, with inputs in place.
Time: medians of runs that take turns in one process, by the clock, and of the processor time of all threads, which
other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops_timing import peak_rss
from subquad.distill.distillation_loss import Divergence, LossOptions, distillation_loss
from subquad.distill.fused_loss import CHUNK, fused_distillation_loss
from subquad.distill.lm_head import Head

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> Inputs:
    """Hidden states and heads of student and teacher, and labels; logits have a standard deviation of about 2."""
    torch.manual_seed(0)
    h, H = (torch.randn(tokens, hidden, dtype=dtype) for _ in range(2))
    W, U = (torch.randn(vocabulary, hidden, dtype=dtype).mul_(2 * hidden**-0.5) for _ in range(2))
    return h.requires_grad_(), H, W.requires_grad_(), U, torch.randint(vocabulary, (tokens,))


def straightforward(inputs: Inputs, divergence: Divergence, chunk: int) -> Tensor:
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


def plain(inputs: Inputs, divergence: Divergence, chunk: int) -> Tensor:
    h, H, W, U, labels = inputs
    with torch.no_grad():
        teacher = F.linear(H, U)
    # the plain loss shifts labels by itself, so that the last token does not count
    shifted = F.pad(labels[:-1], (1, 0)).unsqueeze(0)
    return distillation_loss(
        F.linear(h, W).unsqueeze(0), teacher.unsqueeze(0), shifted, LossOptions(divergence=divergence)
    )[0]


def fused(inputs: Inputs, divergence: Divergence, chunk: int) -> Tensor:
    h, H, W, U, labels = inputs
    return fused_distillation_loss(h, H, labels, Head(W), Head(U), LossOptions(divergence=divergence), chunk)[0]


WAYS: dict[str, Callable[[Inputs, Divergence, int], Tensor]] = {
    "straightforward": straightforward,
    "plain": plain,
    "fused": fused,
}


def once(way: str, inputs: Inputs, divergence: Divergence, chunk: int) -> float:
    loss = WAYS[way](inputs, divergence, chunk)
    torch.autograd.grad(loss, [inputs[0], inputs[2]])
    return loss.item()


def peak_here(way: str, options: argparse.Namespace) -> int:
    """Bytes above the inputs that one loss with its gradients needs, in this process, which must be fresh."""
    dtype = getattr(torch, options.dtype)
    once(way, make_inputs(8, 64, 16, dtype), options.divergence, options.chunk)  # libraries load, threads start
    inputs = make_inputs(options.tokens, options.vocabulary, options.hidden, dtype)
    before = peak_rss()
    once(way, inputs, options.divergence, options.chunk)
    return peak_rss() - before


def peak(way: str, options: argparse.Namespace) -> int:
    passed = ("tokens", "vocabulary", "hidden", "divergence", "dtype", "chunk")
    arguments = [f"--{name}={getattr(options, name)}" for name in passed]
    command = [sys.executable, "-m", "benchmarks.loss", "--peak", way, *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def times(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median seconds by the clock and of the processor."""
    inputs = make_inputs(options.tokens, options.vocabulary, options.hidden, getattr(torch, options.dtype))
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in options.ways}
    for repeat in range(options.repeats + 1):
        for way, taken in seconds.items():
            start = time.perf_counter(), time.process_time()
            once(way, inputs, options.divergence, options.chunk)
            if repeat:
                taken.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    medians = {way: [statistics.median(kind) for kind in zip(*taken, strict=True)] for way, taken in seconds.items()}
    return {way: (clock, processor) for way, (clock, processor) in medians.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--divergence", choices=("forward", "reverse", "jsd"), default="forward")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", help="write the figures there too")
    parser.add_argument("--peak", choices=WAYS, help="measure the peak of this one in this process, in bytes")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.peak:
        print(peak_here(options.peak, options))
        return
    peaks = {way: peak(way, options) for way in options.ways}
    seconds = times(options)
    print(
        f"{options.tokens} tokens, vocabulary {options.vocabulary}, hidden {options.hidden}, {options.divergence}, "
        f"{options.dtype}, {torch.get_num_threads()} threads"
    )
    first = options.ways[0]
    rows = []
    print(f"{'':16s}{'peak MB':>9s}{'ratio':>8s}{'seconds':>9s}{'ratio':>8s}{'cpu s':>9s}{'ratio':>8s}")
    for way in options.ways:
        figures = (peaks[way] / 1e6, *seconds[way])
        base = (peaks[first] / 1e6, *seconds[first])
        print(f"{way:16s}" + "".join(f"{x:9.1f}{x / y:8.3f}" for x, y in zip(figures, base, strict=True)))
        row = {"way": way, "peak_bytes": peaks[way], "seconds": seconds[way][0], "cpu_seconds": seconds[way][1]}
        rows.append(row)
    if options.json:
        keys = ("tokens", "vocabulary", "hidden", "divergence", "dtype", "chunk", "repeats")
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.processor()}
        with open(options.json, "w") as file:
            json.dump({**about, **{key: getattr(options, key) for key in keys}, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
