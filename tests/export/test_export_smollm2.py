"""Export of a SmolLM2 student to Qwen3.5 and to a GGUF file."""

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import subquad
from subquad.export import export
from subquad.export.converter import rounding_error
from subquad.modeling.teachers import fetch_smollm2
from subquad.utils import UserError
from tests.helpers.exports import run_without_subquad
from tests.helpers.llama_cpp import needs_llama_cpp, run
from tests.helpers.ops import error
from tests.helpers.students import logits

pytestmark = [pytest.mark.slow, pytest.mark.sample]
PAGE = """The harbour lay quiet in the early light. Two fishermen, brothers who had not spoken to each other for a year,
were mending the same net from opposite ends. Their mother watched them from the window of the bakery, and said nothing;
she had learned that a net, like a quarrel, is finished from the middle. At noon the wind turned to the south, and the
elder brother looked up for the first time. 'There will be rain,' he said. The younger one nodded."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A directory with an untrained student and its Qwen3.5 checkpoint."""
    try:
        fetch_smollm2()
    except UserError as error:
        pytest.skip(f"SmolLM2 is not available: {error}")
    directory = tmp_path_factory.mktemp("smollm2")
    teacher, tokenizer = subquad.load_teacher("smollm2-135m")
    text = tokenizer(PAGE, return_tensors="pt").input_ids
    student = subquad.linearize(teacher, scale_ids=text, export_target="qwen3_5").eval()
    student.save_pretrained(directory / "student")
    tokenizer.save_pretrained(directory / "student")
    export(directory / "student", directory / "served", "qwen3_5")
    return directory


@pytest.fixture(scope="module")
def student_and_tokenizer(directory):
    return subquad.load_teacher(directory / "student")


def test_served_model_has_the_students_logits_without_subquad(directory, student_and_tokenizer):
    """In float64 to 1e-5 (the delta rule of `transformers` is always in float32); in float32 to twice the student's own
    rounding error."""
    student, tokenizer = student_and_tokenizer
    ids = tokenizer(PAGE, return_tensors="pt").input_ids[:, :80]
    mask = torch.ones_like(ids)
    mask[:, :30] = 0
    ((whole, steps, batch, *_),) = run_without_subquad({directory: (ids, ids, mask)}, torch.float64)
    wide = copy.deepcopy(student).double()
    expected = logits(wide, ids)
    assert error(whole, expected) < 1e-5
    assert error(steps, expected) < 1e-5
    assert error(batch[:, 30:], logits(wide, ids, attention_mask=mask)[:, 30:]) < 1e-5
    narrow = AutoModelForCausalLM.from_pretrained(directory / "served", dtype=torch.float32).eval()
    assert error(logits(narrow, ids), logits(student, ids)) < 2 * rounding_error(student, ids)


@needs_llama_cpp
def test_llama_cpp_gives_the_same_tokens_and_perplexity(directory, student_and_tokenizer):
    student, tokenizer = student_and_tokenizer
    export(directory / "student", directory / "student.gguf", "gguf", "f32")
    prompt = tokenizer("The harbour lay quiet in the early light.").input_ids
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])  # which llama.cpp does not generate here
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "suppress_tokens": ends}
    generated = student.generate(torch.tensor([prompt]), **options)
    (answer,) = run(directory / "student.gguf", [prompt], 64)
    assert answer["tokens"] == generated[0, len(prompt) :].tolist()
    ids = tokenizer(PAGE).input_ids[:48]
    log_probs = logits(student, torch.tensor([ids]))[0, :-1].log_softmax(-1)
    expected = -log_probs.gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    answers = run(directory / "student.gguf", [ids[:n] for n in range(1, len(ids))], 1, probabilities=49152)
    found_log_probs = [
        next(e["logprob"] for e in answer["completion_probabilities"][0]["top_logprobs"] if e["id"] == token)
        for answer, token in zip(answers, ids[1:], strict=True)
    ]
    found = -sum(found_log_probs) / len(found_log_probs)
    assert abs(math.exp(found) / math.exp(expected) - 1) < 0.01
