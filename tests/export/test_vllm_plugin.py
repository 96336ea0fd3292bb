"""Students in vLLM on the CPU by the plug-in, without export, against `transformers` in the same dtype."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import subquad
from tests.helpers.hosts import VLLM, host_python, run_script
from tests.helpers.recipes import save_tiny_teacher
from tests.helpers.students import MIXERS, logits, make_student

pytestmark = pytest.mark.slow
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
STUDENTS = {
    "mixers": [{"mixer": name} for name in MIXERS],
    "attention": [{"mixer": "gla"}, {"mixer": "attention"}, {"mixer": "xlstm"}, {"mixer": "attention"}],
    "windows": [
        {"mixer": "attention", "window": 9, "sinks": 2},
        {"mixer": "gated_deltanet", "window": 5, "sinks": 2},
        {"mixer": "xlstm", "window": 8, "memory": "all"},
        {"mixer": "attention"},
    ],
}
"""The layers of each student."""
COUNT = 24
OPTIONS = {"max_model_len": 1024, "enforce_eager": True, "seed": 0, "max_num_seqs": 2, "max_num_batched_tokens": 64}
"""Prompts of more than 64 tokens are read in pieces; more requests than two wait for a page that was used before."""
SCRIPT = """
import gc, json, sys
from vllm import LLM, SamplingParams
runs, prompts, more, count = json.loads(sys.stdin.read())
params = SamplingParams(temperature=0, max_tokens=count, logprobs=0, prompt_logprobs=0, ignore_eos=True)
greedy = SamplingParams(temperature=0, max_tokens=count, logprobs=0, ignore_eos=True)

def scores(steps, ids):
    return [step[token].logprob for step, token in zip(steps or [], ids)]

def answers(model, prompts, params):
    outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [
        {
            "tokens": [*output.prompt_token_ids, *output.outputs[0].token_ids],
            "scores": scores((output.prompt_logprobs or [])[1:], output.prompt_token_ids[1:])
            + scores(output.outputs[0].logprobs, output.outputs[0].token_ids),
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]

found = []
for directory, options in runs:
    model = LLM(directory, **options)
    first = answers(model, prompts, params)
    second = [answers(model, [first[-1]["tokens"] + ids], greedy)[0] for ids in more]
    found.append(first + second)
    del model
    gc.collect()
print("FOUND" + json.dumps(found))
"""
ENTRY_POINT = "[vllm.general_plugins]\nsubquad = subquad.serving.vllm_plugin:register\n"


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    saved = {}
    for name, layers in STUDENTS.items():
        directory = tmp_path_factory.mktemp(name)
        save_tiny_teacher(directory / "teacher", num_hidden_layers=len(layers), **SIZES)
        teacher, tokenizer = subquad.load_teacher(directory / "teacher")
        student = make_student(teacher, layer_types={str(index): layer for index, layer in enumerate(layers)})
        student.save_pretrained(directory / "student")
        tokenizer.save_pretrained(directory / "student")
        saved[name] = directory / "student"
    return saved


def served(directory: Path, runs: list) -> list:
    """The answers of vLLM, in whose environment Subquad is not installed but found: its files and its entry point."""
    info = directory / "subquad-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: subquad\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    ids = torch.randint(3, 300, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [ids[:23], ids[30:37], ids[40:41], ids[50:100], ids[100:300]]
    environment = {"PYTHONPATH": f"{Path(subquad.__file__).parents[1]}{os.pathsep}{directory}"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    more = [ids[300:310], ids[310:320]]
    return run_script(host_python(VLLM), SCRIPT, runs, prompts, more, COUNT, env={**os.environ, **environment})


def errors(directory: Path, answers: list, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between the log probabilities of vLLM and of `transformers` for the same tokens, and how much less
    probable than the most probable one each generated token is in `transformers`."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    found, gaps = [], []
    for answer in answers:
        tokens = torch.tensor([answer["tokens"]])
        expected = logits(model, tokens)[0, :-1].float().log_softmax(-1)
        own = expected.gather(1, tokens[0, 1:, None])[:, 0]
        found.append(torch.tensor(answer["scores"]) - own[-len(answer["scores"]) :])
        gaps.append(expected[-COUNT:].max(-1).values - own[-COUNT:])
    return torch.cat(found), torch.cat(gaps)


def test_students_in_vllm_equal_those_in_transformers(students, tmp_path):
    """In float32: a batch of unequal prompts, long ones in pieces, more requests than places, and second turns, with
    and without the prefix cache."""
    caching = [False, True]
    runs = [(str(path), {**OPTIONS, "dtype": "float32"}) for path in students.values()]
    runs = [(path, {**options, "enable_prefix_caching": on}) for path, options in runs for on in caching]
    outputs = served(tmp_path, runs)
    for (directory, options), answers in zip(runs, outputs, strict=True):
        found, gaps = errors(directory, answers, torch.float32)
        assert found.abs().max() < 1e-3, directory
        assert gaps.max() < 1e-3, directory
        assert (answers[-1]["cached"] > 0) == options["enable_prefix_caching"], directory


def test_students_in_vllm_in_bfloat16(students, tmp_path):
    """As near to float32 as `transformers` in bfloat16."""
    runs = [(str(path), {**OPTIONS, "dtype": "bfloat16"}) for path in students.values()]
    for (directory, _), answers in zip(runs, served(tmp_path, runs), strict=True):
        exact, _ = errors(directory, answers, torch.float32)
        between, gaps = errors(directory, answers, torch.bfloat16)
        rounding = (exact - between).square().mean().sqrt()  # of `transformers`
        assert exact.square().mean().sqrt() < 1.5 * rounding, directory
        assert gaps.max() < 0.5, directory
