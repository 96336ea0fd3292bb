"""A student of the real teacher, taken to a Qwen3.5 checkpoint and to a GGUF file, and met there."""

import copy
import math
from pathlib import Path

import pytest
import torch
from export_cases import meet_elsewhere, relative
from llama_cpp import needs_llama_cpp, run
from transformers import AutoModelForCausalLM

import subquad
from subquad.export import export
from subquad.export.target import relative_error, rounding_error
from subquad.modeling.teachers import fetch_smollm2
from subquad.utils import UserError
from tests.modeling.modeling_cases import logits

pytestmark = [pytest.mark.slow, pytest.mark.sample]
PAGE = """The harbour lay quiet in the early light. Two fishermen, brothers who had not spoken to each other for a year,
were mending the same net from opposite ends. Their mother watched them from the window of the bakery, and said nothing;
she had learned that a net, like a quarrel, is finished from the middle. At noon the wind turned to the south, and the
elder brother looked up for the first time. 'There will be rain,' he said. The younger one nodded."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a fresh student, its Qwen3.5 checkpoint and its GGUF file."""
    try:
        fetch_smollm2()
    except UserError as error:
        pytest.skip(f"SmolLM2 is not to be had here: {error}")
    directory = tmp_path_factory.mktemp("smollm2")
    teacher, tokenizer = subquad.load_teacher("smollm2-135m")
    text = tokenizer(PAGE, return_tensors="pt").input_ids
    student = subquad.linearize(teacher, scale_ids=text, export_target="qwen3_5").eval()
    student.save_pretrained(directory / "student")
    tokenizer.save_pretrained(directory / "student")
    export(directory / "student", directory / "served", "qwen3_5")
    return directory


@pytest.fixture(scope="module")
def loaded(place):
    return subquad.load_teacher(place / "student")


def test_a_process_without_subquad_gives_the_same_logits(place, loaded):
    """In float64 to 1e-5 (the delta rule of `transformers` is in float32 even there); in float32 as near as a text
    at once is to the same text token by token."""
    student, tokenizer = loaded
    ids = tokenizer(PAGE, return_tensors="pt").input_ids[:, :80]
    mask = torch.ones_like(ids)
    mask[:, :30] = 0
    ((whole, steps, batch, *_),) = meet_elsewhere({place: (ids, ids, mask)}, torch.float64)
    wide = copy.deepcopy(student).double()
    expected = logits(wide, ids)
    assert relative(whole, expected) < 1e-5
    assert relative(steps, expected) < 1e-5
    assert relative(batch[:, 30:], logits(wide, ids, attention_mask=mask)[:, 30:]) < 1e-5
    narrow = AutoModelForCausalLM.from_pretrained(place / "served", dtype=torch.float32).eval()
    assert relative_error(logits(narrow, ids), logits(student, ids)) < 2 * rounding_error(student, ids)


@needs_llama_cpp
def test_llama_cpp_writes_the_same_and_finds_a_page_as_likely(place, loaded):
    student, tokenizer = loaded
    export(place / "student", place / "student.gguf", "gguf", "f32")
    prompt = tokenizer("The harbour lay quiet in the early light.").input_ids
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])  # which llama.cpp does not write there
    asked = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "suppress_tokens": ends}
    written = student.generate(torch.tensor([prompt]), **asked)
    (answer,) = run(place / "student.gguf", [prompt], 64)
    assert answer["tokens"] == written[0, len(prompt) :].tolist()
    ids = tokenizer(PAGE).input_ids[:48]
    own = logits(student, torch.tensor([ids]))[0, :-1].log_softmax(-1)
    expected = -own.gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    answers = run(place / "student.gguf", [ids[:n] for n in range(1, len(ids))], 1, probabilities=49152)
    told = [
        next(e["logprob"] for e in answer["completion_probabilities"][0]["top_logprobs"] if e["id"] == token)
        for answer, token in zip(answers, ids[1:], strict=True)
    ]
    found = -sum(told) / len(told)
    assert abs(math.exp(found) / math.exp(expected) - 1) < 0.01
