"""Measures an exported student and its teacher under load in a server: vLLM's, or llama.cpp's.

    python -m benchmarks.load --server vllm --student served --teacher teacher --tokenizer teacher --vllm PYTHON
    python -m benchmarks.load --server llama.cpp --student student.gguf --teacher teacher.gguf ...

Both servers run at once and are measured in turn. For each context, one request reads a prompt of that many tokens of
--text ("prompt": tokens per second until the first token). Then 1, 4, 16 requests at once continue it, each with 16
other tokens, and write --count tokens ("generation": tokens per second of all requests between their first and last
token; the median of --repeats). They find the prompt in the server's prefix cache, so reading it is not counted: vLLM
keeps it by itself; for llama.cpp the slot that read it is saved and restored to all slots. Requests are sent by vLLM's
load tool (`vllm bench serve`). "memory" is the server's largest resident size so far: llama.cpp allocates caches of
all requests at its start, vLLM reserves --cache. `max_position_embeddings` of the models must exceed the contexts.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common import Parser, output_file, run_as_script
from subquad.utils import UserError

SUFFIX, RESERVE = 16, 128
LLAMA_CPP = """
import json, sys, time
import xllamacpp
path, context, parallel, threads, slots = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.slot_save_path = path, slots
params.n_ctx, params.n_parallel, params.n_gpu_layers = context * parallel, parallel, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
print("LISTENS " + server.listening_address, flush=True)
while True:
    time.sleep(1)
"""
BENCH = """
import json, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
for line in sys.stdin:  # in one process: to import vLLM takes longer than most runs
    main(parser.parse_args(json.loads(line)))
    print("DONE", flush=True)
"""


@dataclass
class Server:
    """A running server and what was measured of it, by context and number of requests."""

    name: str
    process: subprocess.Popen
    url: str
    model: str
    keeps_prompts: bool
    """Whether it shares a prompt among requests; else a slot is saved and restored."""
    results: dict[tuple[int, int], list[dict[str, float]]] = field(default_factory=dict)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=3600) as answer:
            return json.load(answer)

    def memory(self) -> int:
        """Largest resident size of the process and its children, in bytes."""
        total, pids = 0, [self.process.pid]
        while pids:
            pid = pids.pop()
            status = Path(f"/proc/{pid}/status").read_text()
            total += next((1024 * int(s.split()[1]) for s in status.splitlines() if s.startswith("VmHWM")), 0)
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        return total


@contextmanager
def serve(name: str, model: Path, context: int, args: Any) -> Iterator[Server]:
    """A server of `model` for sequences of `context` tokens."""
    with tempfile.TemporaryDirectory() as work, (Path(work) / "log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        if args.server == "vllm":
            port = 8100 + 7 * os.getpid() % 800 + (name == "teacher")
            url = f"http://127.0.0.1:{port}"
            environment |= {"VLLM_CPU_KVCACHE_SPACE": str(args.cache), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            environment |= {"VLLM_NO_USAGE_STATS": "1"}
            command = [args.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", port]
            command += ["--max-model-len", context, "--dtype", "bfloat16", "--enforce-eager", "--enable-prefix-caching"]
        else:
            settings = json.dumps([str(model), context, max(args.parallel), args.threads, work])
            command, url = [sys.executable, "-c", LLAMA_CPP, settings], ""
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            url = wait_until_ready(process, url, Path(log.name))
            yield Server(name, process, url, str(model), keeps_prompts=args.server == "vllm")
        finally:
            process.terminate()
            process.wait()


def wait_until_ready(process: subprocess.Popen, url: str, log: Path) -> str:
    while process.poll() is None:
        if not url:
            lines = [line for line in log.read_text().splitlines() if line.startswith("LISTENS")]
            url = lines[0].split()[1] if lines else ""
        try:
            if url and urllib.request.urlopen(f"{url}/health", timeout=5).status == 200:
                return url
        except OSError:
            pass
        time.sleep(0.5)
    raise UserError("the server ended:", *log.read_text().splitlines()[-20:])


def read_prompt(server: Server, prompt: str) -> float:
    """Seconds until the first token after `prompt`, which the server keeps."""
    start = time.perf_counter()
    if server.keeps_prompts:
        server.post("/v1/completions", {"model": server.model, "prompt": prompt, "max_tokens": 1})
        return time.perf_counter() - start
    server.post("/completion", {"prompt": prompt, "n_predict": 0, "id_slot": 0, "cache_prompt": True})
    seconds = time.perf_counter() - start
    server.post("/slots/0?action=save", {"filename": "prompt"})
    return seconds


class LoadTool:
    """vLLM's load tool in a process of its own."""

    def __init__(self, python: str, tokenizer: Path, log: Path):
        self.log, self.tokenizer = log, tokenizer
        self.process = subprocess.Popen(
            [python, "-c", BENCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True
        )

    def run(self, server: Server, prompts: list[str], count: int) -> dict[str, Any]:
        """What the tool reports of all `prompts` at once."""
        with tempfile.TemporaryDirectory() as work:
            requests, result = Path(work, "requests.jsonl"), Path(work, "result.json")
            lines = [json.dumps({"prompt": text, "output_tokens": count}) for text in prompts]
            requests.write_text("\n".join(lines) + "\n")
            command: list[Any] = ["--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions"]
            command += ["--model", server.model, "--tokenizer", self.tokenizer, "--num-warmups", 0]
            command += ["--dataset-name", "custom", "--dataset-path", requests, "--custom-output-len", count]
            command += ["--skip-chat-template", "--ignore-eos", "--disable-tqdm", "--save-result"]
            command += ["--num-prompts", len(prompts), "--max-concurrency", len(prompts)]
            command += ["--result-dir", work, "--result-filename", result.name]
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps(list(map(str, command))) + "\n")
            self.process.stdin.flush()
            lines = []
            for line in self.process.stdout:
                if line == "DONE\n":
                    found = json.loads(result.read_text())
                    if found["completed"] == len(prompts):
                        return found
                    break
                lines.append(line.rstrip())
        raise UserError(f"{server.name}: the load tool failed:", *lines[-20:], *self.log.read_text().splitlines()[-20:])


def generate(server: Server, prompts: list[str], count: int, tool: LoadTool) -> dict[str, float]:
    """Tokens per second of all `prompts` at once, seconds until the first token, and MB of the server."""
    if not server.keeps_prompts:
        for i in range(len(prompts)):
            server.post(f"/slots/{i}?action=restore", {"filename": "prompt"})
    found = tool.run(server, prompts, count)
    return {
        "generation": len(prompts) * 1000 / found["median_tpot_ms"],
        "first": found["median_ttft_ms"] / 1000,
        "memory": server.memory() / 1e6,
    }


def measure_context(servers: list[Server], context: int, prompts: list[str], tool: LoadTool, args: Any) -> None:
    """`prompts`: the common prompt, then the continuations."""
    for server in servers:
        server.results[context, 0] = [{"prompt": context / read_prompt(server, prompts[0])}]
        print(server.name, context, server.results[context, 0], file=sys.stderr, flush=True)
    for parallel in args.parallel:
        texts = [f"{prompts[0]} {text}" for text in prompts[1 : parallel + 1]]
        for _ in range(args.repeats):
            for server in servers:
                found = generate(server, texts, args.count, tool)
                server.results.setdefault((context, parallel), []).append(found)
                print(server.name, context, parallel, found, file=sys.stderr, flush=True)


def measure(args: Any, tool: LoadTool) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(args.tokenizer)
    largest, most = max(args.contexts), max(args.parallel)
    text = args.text.read_text(encoding="utf-8")[: 8 * (largest + SUFFIX * most)]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    models = {"student": args.student, "teacher": args.teacher}
    results: list[Server] = []
    # llama.cpp allocates for a context when it starts; vLLM serves all contexts.
    groups = [args.contexts] if args.server == "vllm" else [[context] for context in args.contexts]
    for contexts in groups:
        with ExitStack() as stack:
            started = [
                stack.enter_context(serve(name, model, max(contexts) + SUFFIX + args.count + RESERVE, args))
                for name, model in models.items()
            ]
            for context in contexts:
                pieces = [ids[i : i + SUFFIX] for i in range(context, context + SUFFIX * most, SUFFIX)]
                prompts = [tokenizer.decode(piece) for piece in [ids[:context], *pieces]]
                measure_context(started, context, prompts, tool, args)
                write_results([*results, *started], args.output)
            results += started


def write_results(servers: list[Server], output: Path) -> None:
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "context", "requests", "prompt", "generation", "first", "memory"])
        for server in servers:
            for (context, parallel), found in server.results.items():
                medians = {name: statistics.median(run[name] for run in found) for name in found[0]}
                cells = [f"{medians[n]:.4g}" if n in medians else "" for n in ("prompt", "generation", "first")]
                memory = [f"{medians['memory']:.0f}" if parallel else ""]
                writer.writerow([server.name, context, parallel or 1, *cells, *memory])


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("load", __doc__)
    parser.add_argument("--server", choices=("vllm", "llama.cpp"), required=True)
    parser.add_argument("--student", type=Path, required=True, help="the exported directory or GGUF file")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="the teacher's directory")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="of an environment with vLLM and pandas")
    numbers: Any = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser.add_argument("--contexts", type=numbers, default=[1024, 4096, 16384], metavar="LIST")
    parser.add_argument("--parallel", type=numbers, default=[1, 4, 16], metavar="LIST")
    parser.add_argument("--count", type=int, default=64, help="tokens that each request writes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of each server")
    parser.add_argument("--cache", type=int, default=4, help="GiB of vLLM's cache")
    parser.add_argument("--output", type=output_file, required=True, metavar="CSV")
    args = parser.parse_args(argv)
    with tempfile.NamedTemporaryFile() as log:
        tool = LoadTool(args.vllm, args.tokenizer, Path(log.name))
        try:
            measure(args, tool)
        finally:
            tool.process.kill()
    return 0


if __name__ == "__main__":
    run_as_script(main)
