"""Students and their export on a machine with `fla` but without a GPU, where `transformers` selects Triton kernels that
cannot run. The other tests hide `fla` (conftest.py), so this one starts another process."""

import pytest

from tests.helpers.processes import run_python

SCRIPT = """
import importlib.util
if importlib.util.find_spec("fla") is None:
    print("fla-core is not installed")
    raise SystemExit
import torch
torch.set_num_threads(1)
import subquad
from subquad import mixers
from subquad.export import convert
from transformers import AutoConfig, AutoModelForCausalLM

sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).eval()
text = torch.arange(3, 15)[None]
convert(subquad.linearize(teacher, scale_ids=text, export_target="qwen3_5").eval(), "qwen3_5")
assert importlib.util.find_spec("fla") is not None
for mixer in mixers.names():
    student = subquad.linearize(teacher, mixer, scale_ids=text)
    assert student.generate(text, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 15)
    student(input_ids=torch.randint(3, 61, (2, 70)), labels=torch.randint(3, 61, (2, 70))).loss.backward()
"""


def test_students_run_and_are_exported_without_a_gpu():
    output = run_python("-c", SCRIPT, environment={"CUDA_VISIBLE_DEVICES": "", "SUBQUAD_BACKEND": "auto"})
    if "not installed" in output:
        pytest.skip(output.strip())
