"""Needles in repeated text against those of lm-eval's RULER (arXiv 2404.06654), where what it needs is installed."""

import random
import re

import pytest
import torch

import subquad
from subquad.data.recall_tasks import PromptSource, make_items

pytest.importorskip("lm_eval", reason="RULER is in lm-eval (extra: eval)")
nltk = pytest.importorskip("nltk", reason="lm-eval's RULER needs nltk")
pytest.importorskip("wonderwords", reason="lm-eval's RULER needs wonderwords")

LENGTH, ANSWER_TOKENS, ITEMS = 1024, 128, 20
VALUES = {"number": r"\d{5,}", "uuid": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"}


def ruler_prompts(kind, tokenizer, monkeypatch):
    monkeypatch.setattr(nltk.data, "find", str)  # it would download what splits essays into sentences
    from lm_eval.tasks.ruler import niah_utils, prepare_niah

    random.seed(0)
    options = {"type_needle_k": "words", "type_needle_v": f"{kind}s", "num_samples": ITEMS, "TOKENIZER": tokenizer}
    haystack, template = prepare_niah.get_haystack(type_haystack="repeat"), niah_utils.TEMPLATE
    for item in prepare_niah.generate_samples(
        haystack, type_haystack="repeat", template=template, max_seq_length=LENGTH + ANSWER_TOKENS, **options
    ):
        key = re.search(r"for (\S+) mentioned", item["gen_prefix"])[1]
        yield f"{item['input']} {item['gen_prefix']}", key, item["outputs"][0], item["length"] - ANSWER_TOKENS


def our_prompts(kind, tokenizer, monkeypatch):
    source = PromptSource(tokenizer, torch.arange(0), random.Random(0))
    depths = [i / (ITEMS - 1) for i in range(ITEMS)]
    for item in make_items(f"needle_{kind}_repeated", source, LENGTH, depths, 1):
        (question,) = item.questions
        prompt = item.context + question.query
        key = re.search(r"of the (\S+) is", tokenizer.decode(question.query))[1]
        yield tokenizer.decode(prompt), key, tokenizer.decode(question.answer).strip(), len(prompt)


@pytest.mark.parametrize("kind", list(VALUES))
@pytest.mark.parametrize("prompts", [our_prompts, ruler_prompts])
def test_a_prompt_states_one_value_and_asks_for_it(prompts, kind, monkeypatch):
    tokenizer = subquad.load_teacher("nano")[1]
    places = []
    for prompt, key, answer, tokens in prompts(kind, tokenizer, monkeypatch):
        assert re.findall(VALUES[kind], prompt) == [answer]  # without the needle, nothing to find
        assert re.search(rf"{key} is:? ({VALUES[kind]})", prompt)[1] == answer
        assert key in prompt[-100:]
        assert 0.8 * LENGTH < tokens <= LENGTH
        places.append(prompt.index(answer) / len(prompt))
    assert len(places) == ITEMS
    assert min(places) < 0.2
    assert max(places) > 0.75
