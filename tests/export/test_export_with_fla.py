"""Export beside an importable `fla` on a machine without a GPU, whose kernels cannot run there. The other tests hide
`fla` (conftest.py), so this is a process of its own."""

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
from subquad.export import to_qwen3_5
from transformers import AutoConfig, AutoModelForCausalLM

sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).eval()
student = subquad.linearize(teacher, scale_ids=torch.arange(3, 15)[None], export_target="qwen3_5").eval()
to_qwen3_5(student)
assert importlib.util.find_spec("fla") is not None
"""


def test_no_kernel_is_picked_that_needs_a_gpu():
    hidden = {"CUDA_VISIBLE_DEVICES": "", "SUBQUAD_BACKEND": "auto"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**os.environ, **hidden})
    if run.returncode == 77:
        pytest.skip("fla-core is not installed")
    assert run.returncode == 0, run.stderr
