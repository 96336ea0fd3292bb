"""Time and memory of one decoded token against the context: a teacher and its students, interleaved in one process.

    python -m benchmarks.decode --size smollm2 --contexts 1024 4096 16384 --batch 1 --json out.json

Weights are random (time does not depend on them) and a context is put into the cache rather than read: the teacher's
keys and values of that length are drawn, a student's state is that after a few tokens, whatever the length.
"""

import argparse
import json
import platform
import statistics
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import subquad
from subquad import mixers
from subquad.evaluate.efficiency import cache_bytes
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


def teacher_cache(config: LlamaConfig, context: int, batch: int) -> DynamicCache:
    """Keys and values of `context` tokens, drawn at random."""
    cache = DynamicCache(config=config)
    shape = batch, config.num_key_value_heads, context, config.head_dim
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def student_cache(student, batch: int):
    """The state after eight tokens: its size is that after any number."""
    cache = student.new_cache()
    student(torch.randint(8, (batch, 8)), use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache


@torch.no_grad()
def measure(models: dict, config: LlamaConfig, context: int, batch: int, repeats: int) -> list[dict]:
    caches = {
        name: teacher_cache(config, context, batch) if name == "teacher" else student_cache(model, batch)
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    token = torch.zeros(batch, 1, dtype=torch.long)
    for repeat in range(repeats + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(token, use_cache=True, **{CACHE_ARGUMENT: caches[name]})
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "model": name,
            "context": context,
            "batch": batch,
            "ms_per_token": round(1e3 * medians[name], 3),
            "times_faster": round(medians["teacher"] / medians[name], 2),
            "cache_bytes": cache_bytes(caches[name]),
        }
        for name in models
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="nano")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--mixers", nargs="+", default=list(mixers.REGISTRY))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="write the rows there too")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=65536, **SIZES[args.size])
    teacher = LlamaForCausalLM(config).eval()
    calibration = torch.randint(8, (1, 16))
    students = {name: subquad.linearize(teacher, name, calibration=calibration).eval() for name in args.mixers}
    models = {"teacher": teacher, **students}
    rows = []
    for batch in args.batch:
        for context in args.contexts:
            found = measure(models, config, context, batch, args.repeats)
            rows += found
            print(f"\n{args.size}, batch {batch}, context {context:,}")
            print("| model | ms per token | times faster | cache |\n|---|---|---|---|")
            for row in found:
                mib = row["cache_bytes"] / 2**20
                print(f"| {row['model']} | {row['ms_per_token']} | {row['times_faster']} | {mib:.1f} MiB |", flush=True)
    if args.json:
        head = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.processor()}
        with open(args.json, "w") as file:
            json.dump({**head, "size": args.size, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
