"""Export without a GPU where `fla` is installed, whose kernels need one. The other tests hide `fla` (conftest.py), so
this one runs a subprocess."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import importlib.util
if importlib.util.find_spec("fla") is None:
    raise SystemExit(77)
import torch
torch.set_num_threads(1)
import subquad
from subquad.export import convert
from transformers import AutoConfig, AutoModelForCausalLM

sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).eval()
student = subquad.linearize(teacher, scale_ids=torch.arange(3, 15)[None], export_target="qwen3_5").eval()
convert(student, "qwen3_5")
assert importlib.util.find_spec("fla") is not None
"""


def test_export_selects_no_gpu_kernel():
    hidden = {"CUDA_VISIBLE_DEVICES": "", "SUBQUAD_BACKEND": "auto"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**os.environ, **hidden})
    if done.returncode == 77:
        pytest.skip("fla-core is not installed")
    assert done.returncode == 0, done.stderr
