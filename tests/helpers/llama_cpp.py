"""Runs llama.cpp on a GGUF file in a subprocess: generated tokens and log probabilities."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.helpers.hosts import run_script

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
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it adds in 16 bits
server = xllamacpp.Server(params)
options = {"n_predict": count, "n_probs": probabilities, "temperature": 0, "top_k": 1, "ignore_eos": True}
found = []
for prompt in prompts:
    body = json.dumps({**options, "prompt": prompt, "return_tokens": True, "cache_prompt": True}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + "/completion", body, headers)
    found.append(json.loads(urllib.request.urlopen(request).read()))
print("FOUND" + json.dumps(found))
"""


def run(path: Path, prompts: list, count: int, probabilities: int = 1) -> list[dict]:
    """The answers of llama.cpp's server to each prompt (text or token ids): `count` greedy tokens."""
    return run_script(sys.executable, SCRIPT, str(path), prompts, count, probabilities)


def log_probabilities(answer: dict) -> list[tuple[int, float]]:
    """Index and log probability of the generated tokens; llama.cpp omits tokens that do not end a character."""
    found, index = [], 0
    for step in answer["completion_probabilities"]:
        index = answer["tokens"].index(step["id"], index)
        found.append((index, step["logprob"]))
        index += 1
    return found
