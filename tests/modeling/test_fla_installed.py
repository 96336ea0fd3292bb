"""Students on a machine with `fla` but without a GPU, where `transformers` selects Triton kernels that cannot run.

The other tests hide `fla` (conftest.py), so this test starts another process.
"""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import importlib.util
assert importlib.util.find_spec("fla") is not None
import torch
torch.set_num_threads(1)
import subquad
from subquad import mixers
from transformers import AutoConfig, AutoModelForCausalLM

sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).eval()
text = torch.arange(3, 15)[None]
for mixer in mixers.names():
    student = subquad.linearize(teacher, mixer, scale_ids=text)
    assert student.generate(text, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 15)
    student(input_ids=torch.randint(3, 61, (2, 70)), labels=torch.randint(3, 61, (2, 70))).loss.backward()
"""


def test_students_run_without_a_gpu():
    hidden = {"CUDA_VISIBLE_DEVICES": "", "SUBQUAD_BACKEND": "auto"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**os.environ, **hidden})
    if "assert importlib.util.find_spec" in run.stderr:
        pytest.skip("fla-core is not installed")
    assert run.returncode == 0, run.stderr
