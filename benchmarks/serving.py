"""Tokens per second of GGUF files under llama.cpp on the CPU, behind prompts of different lengths.

    python -m benchmarks.serving student.gguf teacher.gguf --contexts 1024,16384 --threads 2

Each file and context is a process of its own: the prompt (drawn at random; time does not depend on it) is read, then 64
tokens are written one by one. llama.cpp comes as a wheel, `pip install xllamacpp`; the times are its own.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import gguf

WRITTEN = 64
SCRIPT = """
import json, sys
import xllamacpp
path, tokens, count, threads = json.loads(sys.stdin.read())
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = len(tokens) + count + 64, 1, 0, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
asked = {"prompt": tokens, "max_tokens": count, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
print("FOUND" + json.dumps(server.handle_completions(asked)["timings"]))
"""


def measure(path: Path, context: int, threads: int) -> tuple[float, float]:
    """Tokens a second while the prompt is read, and while tokens are written behind it."""
    vocabulary = len(gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].data)
    draw = random.Random(0)
    tokens = [draw.randrange(min(vocabulary, 256), vocabulary) for _ in range(context)]
    given = json.dumps([str(path), tokens, WRITTEN, threads])
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=given, capture_output=True, text=True, check=False)
    found = next((line for line in done.stdout.splitlines() if line.startswith("FOUND")), None)
    if found is None:
        raise SystemExit(f"llama.cpp could not run {path}:\n{done.stderr[-2000:]}")
    times = json.loads(found.removeprefix("FOUND"))
    return times["prompt_per_second"], times["predicted_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--contexts", default="1024,16384")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print("| file | MB | context | prompt, tokens/s | written, tokens/s |\n|---|---|---|---|---|")
    for context in map(int, args.contexts.split(",")):
        for path in args.files:
            read, written = measure(path, context, args.threads)
            size = path.stat().st_size / 1e6
            print(f"| {path.name} | {size:.0f} | {context:,} | {read:.0f} | {written:.1f} |", flush=True)


if __name__ == "__main__":
    main()
