"""Measures tokens per second of GGUF files in llama.cpp on the CPU, after prompts of several lengths.

    python -m benchmarks.serving student.gguf teacher.gguf --contexts 1024,16384 --threads 2

Each file and context runs in its own process: it reads a random prompt, then generates 64 tokens. llama.cpp comes as a
wheel, `pip install xllamacpp`; the times are those it reports.
"""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf

from benchmarks.common import Parser, run_as_script
from subquad.utils import UserError

GENERATED = 64
SCRIPT = """
import json, sys
import xllamacpp
path, tokens, count, threads = json.loads(sys.stdin.read())
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = len(tokens) + count + 64, 1, 0, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
request = {"prompt": tokens, "max_tokens": count, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
print("TIMINGS" + json.dumps(server.handle_completions(request)["timings"]))
"""


def measure(path: Path, context: int, threads: int) -> tuple[float, float]:
    """Tokens per second of the prompt and of generation."""
    vocabulary = len(gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].data)
    generator = random.Random(0)
    tokens = [generator.randrange(min(vocabulary, 256), vocabulary) for _ in range(context)]
    arguments = json.dumps([str(path), tokens, GENERATED, threads])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=arguments, capture_output=True, text=True, check=False
    )
    line = next((line for line in result.stdout.splitlines() if line.startswith("TIMINGS")), None)
    if line is None:
        raise UserError(f"llama.cpp failed on {path}:", *result.stderr.splitlines()[-20:])
    times = json.loads(line.removeprefix("TIMINGS"))
    return times["prompt_per_second"], times["predicted_per_second"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("serving", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="GGUF files")
    parser.add_argument("--contexts", default="1024,16384", metavar="LIST", help="prompt lengths in tokens")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    print("| file | MB | context | prompt, tokens/s | generation, tokens/s |\n|---|---|---|---|---|")
    for context in map(int, args.contexts.split(",")):
        for path in args.files:
            prompt, generation = measure(path, context, args.threads)
            size = path.stat().st_size / 1e6
            print(f"| {path.name} | {size:.0f} | {context:,} | {prompt:.0f} | {generation:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    run_as_script(main)
