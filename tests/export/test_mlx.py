"""Export for mlx-lm: the files, and the model in mlx-lm on the CPU against `transformers`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3NextForCausalLM

import subquad
from subquad.export import convert, export
from subquad.export.mlx import mlx_config
from subquad.modeling.export_target import ExportError
from tests.helpers.exports import IRREGULAR, KDA, LLAMA3, PURE, REGULAR, saved_student, student_of
from tests.helpers.hosts import MLX, host_python, run_script
from tests.helpers.ops import error
from tests.helpers.students import logits

SOME_WINDOWS = {"default": {"mixer": "attention", "window": 16}, "1": "attention"}
TEXT = "The old fox sees 1234 small  rivers.\n\nThe cafe\u0301's red stone 5 is near."
"""Qwen3.5's tokenizer splits the accent and the digits otherwise."""
CASES = {
    "pure": ("qwen3_5", PURE, {}),
    "regular": ("qwen3_5", REGULAR, {"tie_word_embeddings": True}),
    "llama3": ("qwen3_5", REGULAR, {"rope_parameters": LLAMA3}),
    "kda": ("kimi_linear", KDA, {}),
    "windows": ("ministral", SOME_WINDOWS, {"rope_parameters": LLAMA3}),
}
QWEN3_5_CASES = [case for case, (target, _, _) in CASES.items() if target == "qwen3_5"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A directory for each case, with a student, and it for `transformers` in `served` and for mlx-lm in `mlx`."""
    found = {}
    for name, (target, layers, changes) in CASES.items():
        directory = tmp_path_factory.mktemp(name)
        saved_student(directory, layers, target, max_position_embeddings=512, **changes)
        export(directory / "student", directory / "served", target)
        assert "as mlx in" in export(directory / "student", directory / "mlx", "mlx")
        found[name] = directory
    return found


@pytest.mark.parametrize("case", QWEN3_5_CASES)
def test_files_hold_a_qwen3_next_with_the_students_logits_and_tokenizer(case, directories):
    directory = directories[case]
    config = AutoConfig.from_pretrained(directory / "mlx")
    model = Qwen3NextForCausalLM(config).eval()
    weights = load_file(directory / "mlx" / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("conv1d.weight"):
            weights[name] = tensor.transpose(1, 2)
        elif name.endswith("norm.weight") and "linear_attn" not in name:
            weights[name] = tensor - 1
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if config.tie_word_embeddings else [], [])
    model.tie_weights()
    student, tokenizer = subquad.load_teacher(directory / "student")
    ids = torch.randint(3, 300, (2, 50), generator=torch.Generator().manual_seed(3))
    assert error(logits(model, ids), logits(student, ids)) < 1e-5
    assert AutoTokenizer.from_pretrained(directory / "mlx")(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_qwen3_5_as_model_type_would_replace_the_tokenizer(directories, tmp_path):
    """The reason why the files name a Qwen3-Next; without it one directory could serve `transformers` and MLX."""
    served = directories["regular"] / "served"
    tokenizer = AutoTokenizer.from_pretrained(served)
    tokenizer.save_pretrained(tmp_path)
    text_config = json.loads((served / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text_config}))
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids != tokenizer(TEXT).input_ids


def test_what_mlx_does_not_have_is_refused_and_nothing_is_written(tmp_path):
    saved_student(tmp_path, IRREGULAR)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match=r"layers with attention: got 0, 3; MLX expects them at a regular interval"):
        export(tmp_path / "student", tmp_path / "mlx", "mlx")
    assert sorted(tmp_path.iterdir()) == before
    config = convert(student_of(), "qwen3_5").config
    config.linear_conv_kernel_dim = 1
    with pytest.raises(ExportError, match="short_conv: got 1"):
        mlx_config(config)
    config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ExportError, match="rope_type: got 'dynamic'"):
        mlx_config(config)


# ---------------------------------------------------------------------- mlx-lm

SCRIPT = """
import json, sys
import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import make_prompt_cache
directories, text, ids, prompts, count = json.loads(sys.stdin.read())

def greedy(model, prompt, cache=None):
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache)]

found = []
for directory in directories:
    model, tokenizer = load(directory)
    logits = model(mx.array([ids])).astype(mx.float32)[0]
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    cache = make_prompt_cache(model)
    first = greedy(model, prompts[0], cache)
    second = greedy(model, prompts[1], cache)
    batch = batch_generate(model, tokenizer, prompts, max_tokens=count, return_token_ids=True)
    found.append([tokenizer.encode(text), log_probs.tolist(), first, second, batch.token_ids, str(logits.dtype)])
print("FOUND" + json.dumps(found))
"""
COUNT = 64


def in_mlx(directories, ids, prompts):
    return run_script(host_python(MLX), SCRIPT, list(map(str, directories)), TEXT, ids, prompts, COUNT)


def greedy(model, prompt):
    options = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def until_end(tokens, end):
    return tokens[: tokens.index(end)] if end in tokens else tokens


@pytest.mark.slow
@pytest.mark.sample
def test_mlx_gives_the_log_probabilities_tokens_and_turns_of_transformers(directories):
    ids = torch.randint(3, 300, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [ids[:23], ids[30:37], ids[40:90]]
    outputs = in_mlx([directory / "mlx" for directory in directories.values()], ids, prompts)
    for directory, (tokens, log_probs, first, second, batch, _) in zip(directories.values(), outputs, strict=True):
        model = AutoModelForCausalLM.from_pretrained(directory / "served", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory / "served")
        assert tokens == tokenizer(TEXT).input_ids
        expected = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
        assert (torch.tensor(log_probs) - expected).abs().max() < 1e-3
        assert first == greedy(model, prompts[0])
        assert second == greedy(model, prompts[0] + first + prompts[1])
        assert batch == [until_end(greedy(model, prompt), tokenizer.eos_token_id) for prompt in prompts]
