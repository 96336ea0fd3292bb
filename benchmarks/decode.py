"""Times one decoded token of a teacher and its students against the context, and measures cache and peak memory.

    python -m benchmarks.decode                                        # nano and SmolLM2's size, batch 1 and 8
    python -m benchmarks.decode --sizes smollm2 --contexts 16384 --batch 1 --dtype bfloat16
    python -m benchmarks.decode --results benchmarks/DECODE.md

Weights are random, since time does not depend on them. The context is written into the cache without a prefill: random
keys and values of that length for the teacher, the state after eight tokens for a student, whose size is that after any
number. Students share everything outside attention with the teacher. Models are timed in turns, and the fastest step
counts. A teacher whose cache does not fit into free memory is marked so.
"""

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import subquad
from benchmarks.common import Parser, in_words, machine, markdown_table, output_file, run_as_script, write_json
from subquad import mixers
from subquad.evaluate.efficiency import peak_memory
from subquad.modeling.cache import CACHE_ARGUMENT, cache_bytes

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
DEFAULT_MIXERS = ("linear_attention", "retnet", "mamba2", "gla", "metala", "deltanet", "gated_deltanet", "xlstm")
TEACHER = "teacher"


# ---------------------------------------------------------------------- models and caches


def build(size: str, dtype: torch.dtype, names: list[str]) -> tuple[LlamaConfig, dict[str, Any]]:
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=65536, tie_word_embeddings=True, **SIZES[size])
    teacher = LlamaForCausalLM(config).to(dtype).eval()
    shared = dict(teacher.named_parameters())
    models: dict[str, Any] = {TEACHER: teacher}
    for name in names:
        student = subquad.linearize(teacher, name, scale_ids=torch.randint(8, (1, 16))).eval()
        for key, parameter in student.named_parameters():
            if key.removeprefix("base.") in shared:
                parameter.data = shared[key.removeprefix("base.")].data
        models[name] = student.requires_grad_(False)
    return config, models


def teacher_bytes(config: LlamaConfig, context: int, batch: int, dtype: torch.dtype) -> int:
    heads = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * heads * context * batch * dtype.itemsize


def teacher_cache(
    config: LlamaConfig, context: int, batch: int, dtype: torch.dtype, device: torch.device | None = None
) -> DynamicCache:
    """Random keys and values of `context` tokens."""
    cache = DynamicCache(config=config)
    shape = batch, config.num_key_value_heads, context, config.head_dim
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=dtype, device=device) for _ in range(2)), layer)
    return cache


def student_cache(student, batch: int):
    """The state after eight tokens."""
    cache = student.new_cache()
    student(torch.randint(8, (batch, 8)), use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache


def free_bytes() -> int:
    with open("/proc/meminfo") as info:
        return 1024 * next(int(line.split()[1]) for line in info if line.startswith("MemAvailable"))


# ---------------------------------------------------------------------- measurements


@torch.no_grad()
def measure(
    models: dict, config: LlamaConfig, context: int, batch: int, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """For each model: milliseconds per step, bytes of its cache, and bytes that a step allocates in addition."""
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
    sizes = {name: cache_bytes(cache) for name, cache in caches.items()}
    sizes.setdefault(TEACHER, teacher_bytes(config, context, batch, dtype))
    return [
        {
            "model": name,
            "context": context,
            "batch": batch,
            "ms_per_token": 1e3 * fastest[name] if name in fastest else None,
            "speedup": fastest[TEACHER] / fastest[name] if name in fastest and fits else None,
            "cache_bytes": sizes[name],
            "cache_ratio": sizes[TEACHER] / sizes[name],
            "step_bytes": peak_memory(steps[name], torch.device("cpu"))[1] if name in steps else None,
        }
        for name in models
    ]


@torch.no_grad()
def python_share(student, batch: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a step and of its mixers, and the share of the step that is Python overhead of the mixers.

    The overhead is the time of a mixer less that of a recording of its operations by TorchScript, without fusion.
    """
    cache = student_cache(student, batch)
    token = torch.zeros(batch, 1, dtype=torch.long)
    layer = student.mixer_layers[0]
    x = torch.randn(batch, 1, layer.spec.hidden_size, dtype=student.dtype)
    position = student.base.model.rotary_emb(x, torch.tensor([[9]]))
    states = cache.layers[0].states

    def run(x, cos, sin, *states):
        y, new_states = layer.mixer(x, (cos, sin), None, states)
        return (y, *new_states)

    inputs = (x, *position, *states)
    with warnings.catch_warnings(), patch("torch.compiler.is_compiling", return_value=True):
        # Pretend to compile, since a recording cannot contain the checks of argument values.
        warnings.simplefilter("ignore")
        recording = torch.jit.trace(make_fx(run)(*inputs), inputs, check_trace=False)
    times: dict[str, list[float]] = {"step": [], "mixer": [], "recording": []}
    cache_layer, kwargs = cache.layers[0], {"position_embeddings": position, CACHE_ARGUMENT: cache}
    with torch.jit.optimized_execution(False):
        for repeat in range(10 * repeats + 5):
            cache_layer.states = states
            for name, call in (
                ("step", lambda: student(token, use_cache=True, **{CACHE_ARGUMENT: cache})),
                ("mixer", lambda: layer(x, **kwargs)),
                ("recording", lambda: recording(*inputs)),
            ):
                start = time.perf_counter()
                call()
                if repeat >= 5:
                    times[name].append(time.perf_counter() - start)
    step, mixer, recorded = (1e3 * min(values) for values in times.values())
    count = len(student.mixer_layers)
    return {"step_ms": step, "mixers_ms": count * mixer, "share": count * max(0.0, mixer - recorded) / step}


# ---------------------------------------------------------------------- tables


def mebibytes(size: float | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f} MiB"


def timing_table(results: list[dict[str, Any]]) -> str:
    cells = []
    for r in results:
        milliseconds = "does not fit" if r["ms_per_token"] is None else f"{r['ms_per_token']:.2f}"
        speedup = "" if r["speedup"] is None else f"{r['speedup']:.2f}"
        sizes = mebibytes(r["cache_bytes"]), f"{r['cache_ratio']:.1f}", mebibytes(r["step_bytes"])
        cells.append((r["model"], milliseconds, speedup, *sizes))
    header = "model", "ms per step", "speedup", "cache", "cache ratio", "step memory"
    return markdown_table(header, cells)


def scaling_table(results: list[dict[str, Any]], names: list[str]) -> str:
    """The slowest context over the fastest, and the largest cache over the smallest, of each model."""
    cells = []
    for name in names:
        own = [r for r in results if r["model"] == name]
        milliseconds = [r["ms_per_token"] for r in own if r["ms_per_token"] is not None]
        sizes = [r["cache_bytes"] for r in own]
        cells.append((name, f"{max(milliseconds) / min(milliseconds):.2f}", f"{max(sizes) / min(sizes):.2f}"))
    return markdown_table(
        ("model", "time, slowest / fastest over contexts", "cache, largest / smallest over contexts"), cells
    )


def share_table(shares: dict[str, dict[str, float]]) -> str:
    cells = [(n, f"{s['step_ms']:.2f}", f"{s['mixers_ms']:.2f}", f"{s['share']:.0%}") for n, s in shares.items()]
    return markdown_table(("student", "ms per step", "mixers, ms", "Python overhead of the mixers"), cells)


def tables(args: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """Yields title, text and numbers of each table as soon as it is complete."""
    dtype = getattr(torch, args.dtype)
    for size in args.sizes:
        config, models = build(size, dtype, args.mixers)
        for batch in args.batch:
            title = f"{size}, {args.dtype}, batch {batch}"
            results: list[dict[str, Any]] = []
            for context in args.contexts:
                measured = measure(models, config, context, batch, dtype, args.repeats)
                results += measured
                yield f"{title}, context {context:,}", timing_table(measured), measured
            yield f"{title}: scaling with the context", scaling_table(results, list(models)), None
            shares = {name: python_share(models[name], batch, args.repeats) for name in args.mixers}
            yield f"{title}: time of a step", share_table(shares), shares


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("decode", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of the teacher")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768], help="in tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--mixers", nargs="+", choices=list(mixers.MIXERS), default=list(DEFAULT_MIXERS))
    parser.add_argument("--repeats", type=int, default=11, help="steps of each model")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all results there")
    parser.add_argument("--results", type=output_file, metavar="FILE", help="write the tables there, as Markdown")
    args = parser.parse_args(argv)
    description = {**machine(), "memory": f"{free_bytes() / 2**30:.0f} GiB free"}
    print(in_words(description))
    lines = ["# Decoding: a teacher and its students", "", "Written by `python -m benchmarks.decode --results`.", ""]
    lines += [in_words(description), ""]
    numbers = {}
    for title, text, values in tables(args):
        print(f"\n{title}\n\n{text}", flush=True)
        lines += [f"## {title}", "", text, ""]
        numbers[title] = values
    write_json(args.json, {"machine": description, "tables": numbers})
    if args.results:
        args.results.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_as_script(main)
