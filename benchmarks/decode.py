"""Time and memory of one decoded token against the context: a teacher and its students, interleaved in one process.

    python -m benchmarks.decode                                        # nano and SmolLM2's size, batch 1 and 8
    python -m benchmarks.decode --sizes smollm2 --contexts 16384 --batch 1 --dtype bfloat16
    python -m benchmarks.decode --results benchmarks/DECODE.md

Weights are random (time does not depend on them) and a context is put into the cache rather than read: the teacher's
keys and values of that length are drawn, a student's state is that after a few tokens, whatever the length. Students
share what lies outside attention with the teacher. A time is the fastest of some, one model after the other. What does
not fit into free memory is left out, and said.
"""

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import subquad
from benchmarks import ops_timing as bench
from subquad import mixers
from subquad.evaluate.efficiency import cache_bytes, peak_memory
from subquad.modeling.cache import CACHE_ARGUMENT

SIZES = {
    "nano": {
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
EIGHT = ("linear_attention", "retnet", "mamba2", "gla", "metala", "deltanet", "gated_deltanet", "xlstm")
TEACHER = "teacher"


# ---------------------------------------------------------------------- models and their caches


def build(size: str, dtype: torch.dtype, names: list[str]) -> tuple[LlamaConfig, dict[str, Any]]:
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=65536, tie_word_embeddings=True, **SIZES[size])
    teacher = LlamaForCausalLM(config).to(dtype).eval()
    own = dict(teacher.named_parameters())
    models: dict[str, Any] = {TEACHER: teacher}
    for name in names:
        student = subquad.linearize(teacher, name, scale_ids=torch.randint(8, (1, 16))).eval()
        for key, parameter in student.named_parameters():
            if key.removeprefix("base.") in own:
                parameter.data = own[key.removeprefix("base.")].data
        models[name] = student.requires_grad_(False)
    return config, models


def teacher_bytes(config: LlamaConfig, context: int, batch: int, dtype: torch.dtype) -> int:
    heads = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * heads * context * batch * dtype.itemsize


def teacher_cache(config: LlamaConfig, context: int, batch: int, dtype: torch.dtype) -> DynamicCache:
    """Keys and values of `context` tokens, drawn at random."""
    cache = DynamicCache(config=config)
    shape = batch, config.num_key_value_heads, context, config.head_dim
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), layer)
    return cache


def student_cache(student, batch: int):
    """The state after eight tokens: its size is that after any number."""
    cache = student.new_cache()
    student(torch.randint(8, (batch, 8)), use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache


def free_bytes() -> int:
    with open("/proc/meminfo") as info:
        return 1024 * next(int(line.split()[1]) for line in info if line.startswith("MemAvailable"))


# ---------------------------------------------------------------------- what is measured


@torch.no_grad()
def measure(
    models: dict, config: LlamaConfig, context: int, batch: int, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """One row a model: milliseconds of a step, what the cache holds, what a step takes besides."""
    fits = 1.2 * teacher_bytes(config, context, batch, dtype) + 2**30 < free_bytes()
    measured = {name: model for name, model in models.items() if fits or name != TEACHER}
    caches = {
        name: teacher_cache(config, context, batch, dtype) if name == TEACHER else student_cache(model, batch)
        for name, model in measured.items()
    }
    token = torch.zeros(batch, 1, dtype=torch.long)
    steps = {
        name: (lambda model=model, name=name: model(token, use_cache=True, **{CACHE_ARGUMENT: caches[name]}))
        for name, model in measured.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    fastest = {name: min(values) for name, values in seconds.items()}
    held = {name: cache_bytes(cache) for name, cache in caches.items()}
    held.setdefault(TEACHER, teacher_bytes(config, context, batch, dtype))
    return [
        {
            "model": name,
            "context": context,
            "batch": batch,
            "ms_per_token": 1e3 * fastest[name] if name in fastest else None,
            "times_faster": fastest[TEACHER] / fastest[name] if name in fastest and fits else None,
            "cache_bytes": held[name],
            "times_smaller": held[TEACHER] / held[name],
            "step_bytes": peak_memory(steps[name], torch.device("cpu"))[1] if name in steps else None,
        }
        for name in models
    ]


@torch.no_grad()
def python_share(student, batch: int, repeats: int) -> dict[str, float]:
    """Of a step: its milliseconds, those of the mixers, and the share that is Python of ours around tensor operations:
    what a mixer takes above a recording of the same operations (TorchScript's, run one by one, nothing fused)."""
    cache = student_cache(student, batch)
    token = torch.zeros(batch, 1, dtype=torch.long)
    block = student.mixer_layers[0]
    x = torch.randn(batch, 1, block.spec.hidden_size, dtype=student.dtype)
    position = student.base.model.rotary_emb(x, torch.tensor([[9]]))
    states = cache.layers[0].states
    mixer = block.mixer

    def run(x, cos, sin, *states):
        y, after = mixer(x, (cos, sin), None, states)
        return (y, *after)

    given = (x, *position, *states)
    with warnings.catch_warnings(), patch("torch.compiler.is_compiling", return_value=True):
        # or values are checked, which is Python of ours, and nothing that a recording can hold
        warnings.simplefilter("ignore")
        recorded = torch.jit.trace(make_fx(run)(*given), given, check_trace=False)
    times: dict[str, list[float]] = {"step": [], "block": [], "plain": []}
    layer, kwargs = cache.layers[0], {"position_embeddings": position, CACHE_ARGUMENT: cache}
    with torch.jit.optimized_execution(False):
        for repeat in range(10 * repeats + 5):
            layer.states = states
            for name, call in (
                ("step", lambda: student(token, use_cache=True, **{CACHE_ARGUMENT: cache})),
                ("block", lambda: block(x, **kwargs)),
                ("plain", lambda: recorded(*given)),
            ):
                start = time.perf_counter()
                call()
                if repeat >= 5:
                    times[name].append(time.perf_counter() - start)
    step, ours, plain = (1e3 * min(values) for values in times.values())
    layers = len(student.mixer_layers)
    return {"step_ms": step, "mixers_ms": layers * ours, "share": layers * max(0.0, ours - plain) / step}


# ---------------------------------------------------------------------- tables


def human(size: float | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f} MiB"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | ms a step | times faster | cache | times smaller | a step besides |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        took = "does not fit" if row["ms_per_token"] is None else f"{row['ms_per_token']:.2f}"
        faster = "" if row["times_faster"] is None else f"{row['times_faster']:.2f}"
        held = f"{human(row['cache_bytes'])} | {row['times_smaller']:.1f} | {human(row['step_bytes'])}"
        lines.append(f"| {row['model']} | {took} | {faster} | {held} |")
    return "\n".join(lines)


def flatness(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Slowest context over fastest, and largest cache over smallest, of each model."""
    lines = ["| model | time: slowest context over fastest | cache: largest over smallest |", "|---|---|---|"]
    for name in names:
        own = [row for row in rows if row["model"] == name]
        took = [row["ms_per_token"] for row in own if row["ms_per_token"] is not None]
        held = [row["cache_bytes"] for row in own]
        lines.append(f"| {name} | {max(took) / min(took):.2f} | {max(held) / min(held):.2f} |")
    return "\n".join(lines)


def shares(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| student | ms a step | of it the mixers | of it Python around their operations |", "|---|---|---|---|"]
    lines += [f"| {n} | {r['step_ms']:.2f} | {r['mixers_ms']:.2f} | {r['share']:.0%} |" for n, r in rows.items()]
    return "\n".join(lines)


def report(args: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """Title, text and figures of each table, as soon as it is there."""
    dtype = getattr(torch, args.dtype)
    for size in args.sizes:
        config, models = build(size, dtype, args.mixers)
        for batch in args.batch:
            rows: list[dict[str, Any]] = []
            for context in args.contexts:
                found = measure(models, config, context, batch, dtype, args.repeats)
                rows += found
                yield f"{size}, {args.dtype}, batch {batch}, context {context:,}", table(found), found
            yield f"{size}, {args.dtype}, batch {batch}: against the context", flatness(rows, list(models)), None
            spent = {name: python_share(models[name], batch, args.repeats) for name in args.mixers}
            yield f"{size}, {args.dtype}, batch {batch}: where a step goes", shares(spent), spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--mixers", nargs="+", choices=list(mixers.REGISTRY), default=list(EIGHT))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--results", type=Path, help="write the tables there, as Markdown")
    args = parser.parse_args()
    machine = {**bench.machine(), "memory": f"{free_bytes() / 2**30:.0f} GiB free"}
    described = ", ".join(f"{name} {value}" for name, value in machine.items())
    print(described)
    written = ["# Decoding: a teacher and its students", "", "Written by `python -m benchmarks.decode --results`.", ""]
    written += [described, ""]
    figures = {}
    for title, text, numbers in report(args):
        print(f"\n{title}\n\n{text}", flush=True)
        written += [f"## {title}", "", text, ""]
        figures[title] = numbers
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "tables": figures}, indent=1) + "\n")
    if args.results:
        args.results.write_text("\n".join(written))


if __name__ == "__main__":
    main()
