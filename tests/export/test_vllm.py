"""Exported models in vLLM on the CPU, in bfloat16, against `transformers`."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from subquad.export import export
from tests.helpers.exports import IRREGULAR, PURE, needs_group_norm, saved_student
from tests.helpers.hosts import VLLM, host_python, run_script
from tests.helpers.students import logits

pytestmark = [pytest.mark.slow, needs_group_norm]
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 64,  # vLLM's kernel of the delta rule refuses 32 on the CPU
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
    "max_position_embeddings": 1024,
}
WINDOW = {"mixer": "attention", "window": 32}
CASES = {
    "qwen3_5-pure": ("qwen3_5", PURE),
    "qwen3_5-hybrid": ("qwen3_5", IRREGULAR),
    "granite_hybrid-pure": ("granite_hybrid", {"default": "mamba2"}),
    "granite_hybrid-hybrid": ("granite_hybrid", {"default": "mamba2", "0,3": "attention"}),
    "ministral-all": ("ministral", {"default": WINDOW}),
    "ministral-some": ("ministral", {"default": WINDOW, "1": "attention"}),
}
CACHING = [target != "granite_hybrid" for target, _ in CASES.values()]
"""Prefix caching; vLLM's Mamba-2 on the CPU fails with it (an IndexError once a prompt has more than one chunk)."""
COUNT = 64
SCRIPT = """
import gc, json, sys
from vllm import LLM, SamplingParams
directories, prompts, turns, count = json.loads(sys.stdin.read())

def scores(steps, ids):
    return [step[token].logprob for step, token in zip(steps, ids)]

def answers(model, prompts, **options):
    params = SamplingParams(temperature=0, max_tokens=count, logprobs=0, ignore_eos=True, **options)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "scores": scores((output.prompt_logprobs or [])[1:], output.prompt_token_ids[1:])
            + scores(output.outputs[0].logprobs, output.outputs[0].token_ids),
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]

found = []
for directory, caching in directories:
    options = {"max_model_len": 1024, "enforce_eager": True, "enable_prefix_caching": caching, "seed": 0}
    model = LLM(directory, dtype="bfloat16", **options)
    batch = answers(model, prompts, prompt_logprobs=0)
    found.append(batch + [answers(model, [turn])[0] for turn in turns])
    del model
    gc.collect()
print("FOUND" + json.dumps(found))
"""
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directories = []
    for name, (target, layers) in CASES.items():
        directory = tmp_path_factory.mktemp(name)
        export(saved_student(directory, layers, target, **SIZES), directory / "served", target)
        directories.append(directory / "served")
    return directories


def test_vllm_is_as_near_to_float32_as_transformers_in_bfloat16(served):
    """Log probabilities of prompts in a batch and of greedy tokens, and of a prompt whose first block is cached."""
    ids = torch.randint(3, 300, (700,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts, turns = [ids[:23], ids[30:37], ids[40:90]], [ids[:600], ids[:560] + ids[600:640]]
    python = host_python(VLLM)
    directories = list(zip(map(str, served), CACHING, strict=True))
    outputs = run_script(python, SCRIPT, directories, prompts, turns, COUNT, env={**os.environ, **ENVIRONMENT})
    for directory, caching, answers in zip(served, CACHING, outputs, strict=True):
        exact, rounded = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
            for dtype in (torch.float32, torch.bfloat16)
        )
        errors, rounding = [], []
        for prompt, answer in zip(prompts + turns, answers, strict=True):
            text = torch.tensor([prompt + answer["tokens"]])
            found = torch.tensor(answer["scores"])
            wanted, near = (logits(model, text)[0, :-1].float().log_softmax(-1) for model in (exact, rounded))
            own, beside = (scores.gather(1, text[0, 1:, None])[-len(found) :, 0] for scores in (wanted, near))
            errors.append(found - own)
            rounding.append(beside - own)
            gap = near.max(-1).values[-COUNT:] - beside[-COUNT:]  # zero where transformers takes the same token
            assert gap.max() < 0.5
            assert (gap == 0).float().mean() > 0.8
        assert torch.cat(errors).square().mean().sqrt() < 1.5 * torch.cat(rounding).square().mean().sqrt()
        assert (answers[-1]["cached"] > 0) == caching
