"""llama.cpp at work on a GGUF file, in a process of its own: what it writes, and how likely it finds a text."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp (llama.cpp as a wheel) is not installed"
)

SCRIPT = """
import json, sys, urllib.request
import xllamacpp
path, prompts, count, probabilities = json.loads(sys.stdin.read())
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 512, 1, 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it sums in 16 bits
server = xllamacpp.Server(params)
asked = {"n_predict": count, "n_probs": probabilities, "temperature": 0, "top_k": 1, "ignore_eos": True}
found = []
for prompt in prompts:
    body = json.dumps({**asked, "prompt": prompt, "return_tokens": True, "cache_prompt": True}).encode()
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + "/completion", body, kind)
    found.append(json.loads(urllib.request.urlopen(request).read()))
print("FOUND" + json.dumps(found))
"""


def run(path: Path, prompts: list, count: int, probabilities: int = 1) -> list[dict]:
    """What llama.cpp's server answers to each prompt (text, or tokens): `count` tokens, always the likeliest."""
    given = json.dumps([str(path), prompts, count, probabilities])
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=given, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND")), None)
    assert line is not None, done.stderr[-2000:]
    return json.loads(line.removeprefix("FOUND"))


def log_probabilities(answer: dict) -> list[tuple[int, float]]:
    """The place of each written token that llama.cpp tells the log probability of, and that; those which are not yet
    whole characters are left out."""
    found, at = [], 0
    for step in answer["completion_probabilities"]:
        at = answer["tokens"].index(step["id"], at)
        found.append((at, step["logprob"]))
        at += 1
    return found
