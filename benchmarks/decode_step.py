"""Where the time of one decoded token goes: kernels, or Python and dispatch; and what `torch.compile` makes of it.

    python -m benchmarks.decode_step --dtype bfloat16                       # gated_deltanet in SmolLM2's size
    python -m benchmarks.decode_step --sizes nano --mixers gla xlstm --compile

Weights are random, and the cache is that after eight tokens: time depends on neither. `step` is the fastest of the
steps without a profiler. `kernels` is the time of the operations that compute, as torch.profiler measures it: the self
CPU time of those that neither return a view, nor only allocate, nor only call others. It is the least sum over single
profiled steps. The rest of the step is outside of kernels: Python, dispatch, views, allocation. Each kernel's own
dispatch counts as kernel, so that the share is a lower bound. `operations` counts all calls of operators, nested ones
included; it does not depend on the machine.

With `--compile`, `compiled` is the fastest step of `student.get_compiled_call`, timed in turns with the others, and
`first call` the time of its first step, compilation included.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import CompileConfig

from benchmarks.common import Parser, in_words, machine, markdown_table, output_file, run_as_script, write_json
from benchmarks.decode import SIZES, build, student_cache
from subquad import mixers
from subquad.modeling.cache import CACHE_ARGUMENT

NOT_KERNELS = ("_to_copy", "_unsafe_view", "clone", "contiguous", "empty", "linear", "matmul", "resize", "square", "to")
"""Operators that allocate or call others, by the beginning of their names; views are recognized by their schema."""


def is_kernel(name: str) -> bool:
    """Whether the operator `name`, as the profiler names it, computes."""
    operator = name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, operator, None)
    if packet is None:
        return True
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    is_view = any(result.alias_info and not result.alias_info.is_write for s in schemas for result in s.returns)
    return not is_view and not operator.startswith(NOT_KERNELS)


def profiled(step: Callable[[], object]) -> tuple[float, int]:
    """Milliseconds of the kernels of one step, and the number of its operations."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    operators = [e for e in profiler.key_averages() if "::" in e.key]
    kernels = sum(e.self_cpu_time_total for e in operators if is_kernel(e.key))
    return kernels / 1e3, sum(e.count for e in operators)


def seconds_of(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@torch.no_grad()
def measure(student: Any, batch: int, repeats: int, compiled: bool) -> dict[str, float]:
    """Milliseconds of a step and of its kernels, the share outside of them, and the number of operations."""
    token = torch.zeros(batch, 1, dtype=torch.long)
    calls = {"step": student}
    if compiled:
        calls["compiled"] = student.get_compiled_call(CompileConfig())
    caches = {name: student_cache(student, batch) for name in calls}
    steps = {
        name: (lambda call=call, name=name: call(input_ids=token, use_cache=True, **{CACHE_ARGUMENT: caches[name]}))
        for name, call in calls.items()
    }
    first = {name: seconds_of(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    kernels, operations = [], 0
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            if repeat >= 2:
                times[name].append(1e3 * seconds_of(step))
        in_kernels, operations = profiled(steps["step"])
        kernels.append(in_kernels)
    fastest = {f"{name}_ms": min(values) for name, values in times.items()}
    outside = 1 - min(kernels) / fastest["step_ms"]
    result = {**fastest, "kernels_ms": min(kernels), "outside_kernels": outside, "operations": float(operations)}
    return {**result, "first_call_s": first["compiled"]} if compiled else result


def table(results: dict[str, dict[str, float]]) -> str:
    header = ["student", "step, ms", "kernels, ms", "outside of kernels", "operations"]
    compiled = any("compiled_ms" in r for r in results.values())
    cells = []
    for name, r in results.items():
        row = [name, f"{r['step_ms']:.2f}", f"{r['kernels_ms']:.2f}", f"{r['outside_kernels']:.0%}"]
        row += [f"{r['operations']:,.0f}"]
        if compiled:
            row += [f"{r['compiled_ms']:.2f}", f"{r['step_ms'] / r['compiled_ms']:.2f}", f"{r['first_call_s']:.0f}"]
        cells.append(tuple(row))
    return markdown_table((*header, *(("compiled, ms", "speedup", "first call, s") if compiled else ())), cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("decode_step", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["smollm2"], help="of the teacher")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--mixers", nargs="+", choices=list(mixers.MIXERS), default=["gated_deltanet"])
    parser.add_argument("--repeats", type=int, default=30, help="steps of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also measure the compiled step")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all results there")
    args: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(in_words(machine()))
    numbers = {}
    for size in args.sizes:
        _, models = build(size, getattr(torch, args.dtype), args.mixers)
        results = {name: measure(models[name], args.batch, args.repeats, args.compile) for name in args.mixers}
        numbers[size] = results
        print(f"\n{size}, {args.dtype}, batch {args.batch}\n\n{table(results)}", flush=True)
    write_json(args.json, {"machine": machine(), "results": numbers})
    return 0


if __name__ == "__main__":
    run_as_script(main)
