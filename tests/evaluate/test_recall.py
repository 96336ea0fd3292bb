"""Recall: a model that copies solves it, one that cannot read is at chance, and items are what they say."""

import copy
import random

import pytest
import torch
from handmade import Copier
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from workshop import EOS, sentences, tiny_teacher

import subquad
from subquad.analysis.recall import answers, ask, recall_results
from subquad.analysis.recall_tasks import COPIED, TASKS, Item, Question, Source, make
from subquad.evaluate.results import one, select
from subquad.utils import UserError, eval_mode

LENGTH = 192
WITH_DEPTH = [task for task in TASKS if task != "copy"]
DEPTHS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return torch.tensor(tokenizer(sentences(400, 3)).input_ids)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A random Llama over the tokenizer's vocabulary."""
    return subquad.load_teacher(tiny_teacher(tmp_path_factory.mktemp("teacher"), context=512))[0]


def made(task, tokenizer, haystack, length=LENGTH, depths=DEPTHS, items=3, seed=0) -> list[Item]:
    return list(make(task, Source(tokenizer, haystack, random.Random(seed)), length, depths, items))


# ---------------------------------------------------------------------- items


@pytest.mark.parametrize("length", [160, 191])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_exactly_the_length_that_was_asked_for(task, tokenizer, haystack, length):
    items = made(task, tokenizer, haystack, length)
    assert {len(item.context) + len(q.ask) for item in items for q in item.questions} == {length}
    assert sum(len(item.questions) for item in items) == 3 * len(DEPTHS)


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_begins_as_the_tokenizer_begins_every_text(task, tokenizer, haystack):
    """Llama's and Gemma's do with a token that their models cannot do without."""
    begun = copy.deepcopy(tokenizer)
    template = TemplateProcessing(single=f"{EOS} $A {EOS}", special_tokens=[(EOS, begun.bos_token_id)])
    begun._tokenizer.post_processor = template
    for made_with, start in ((tokenizer, []), (begun, [begun.bos_token_id])):
        for item in made(task, made_with, haystack):
            assert item.context.tolist()[: len(start)] == start
            assert begun.bos_token_id not in item.context.tolist()[len(start) :]
            assert {len(item.context) + len(question.ask) for question in item.questions} == {LENGTH}


@pytest.mark.parametrize("task", WITH_DEPTH)
def test_answers_stand_where_the_depth_says(task, tokenizer, haystack):
    for item in made(task, tokenizer, haystack):
        for question in item.questions:
            context, answer = item.context.tolist(), question.answer.tolist()
            places = [i for i in range(len(context)) if context[i : i + len(answer)] == answer]
            before = next(i for i in places if context[i - 1] == question.ask[-1])
            # a statement of some tokens stands around the answer
            assert abs(before / len(context) - question.depth) < 0.35 * (1 if "uuid" in task else 0.5)


@pytest.mark.parametrize("task", TASKS)
def test_distractors_are_other_answers(task, tokenizer, haystack):
    for item in made(task, tokenizer, haystack):
        for question in item.questions:
            others = [other.tolist() for other in question.distractors]
            assert len(others) == 3
            assert question.answer.tolist() not in others
            assert len({tuple(other) for other in others}) == 3
            if "uuid" not in task:
                assert {len(other) for other in others} == {len(question.answer)}


def test_the_repeated_sequence_is_repeated(tokenizer, haystack):
    for item in made("copy", tokenizer, haystack, length=101):
        (question,) = item.questions
        whole = [*item.context.tolist(), *question.ask.tolist(), *question.answer.tolist()][1:]
        half = len(whole) // 2
        assert whole[:half] == whole[half:]
        assert len(question.answer) == COPIED


def test_pairs_of_tokens_are_told_apart(tokenizer, haystack):
    (item,) = made("assoc_tokens", tokenizer, haystack, items=1)
    context = item.context.tolist()
    for question in item.questions:
        key, value = question.ask.item(), question.answer.item()
        assert context.count(key) == context.count(value) == 1
        assert context[context.index(key) + 1] == value
        for other in question.distractors:
            assert context.count(other.item()) == 1


def test_the_same_seed_asks_the_same(tokenizer, haystack):
    def asked(seed):
        return [item.context.tolist() for task in TASKS for item in made(task, tokenizer, haystack, seed=seed)]

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_copies_solves_it(task, tokenizer, haystack):
    found = recall_results(Copier(len(tokenizer)), tokenizer, haystack, [task], [LENGTH], DEPTHS, items=2)
    for metric in ("acc", "acc_generated"):
        assert {row.value for row in select(found, metric=metric)} == {1}
    assert one(found, metric="acc", depth=None).stderr == 0
    assert one(found, metric="acc", depth=None).n == 6


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_cannot_read_is_at_chance(task, tokenizer, haystack, reader):
    """Each token follows from the one before it alone: no attention."""
    with torch.no_grad():
        for layer in reader.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    found = recall_results(reader, tokenizer, haystack, [task], [LENGTH], DEPTHS, items=40)
    acc = one(found, metric="acc", depth=None)
    assert one(found, metric="chance", depth=None).value == 0.25
    assert abs(acc.value - 0.25) < 4 * (0.25 * 0.75 / 120) ** 0.5
    assert one(found, metric="acc_generated", depth=None).value < 0.1
    assert acc.n == 120


def test_one_that_finds_all_answers_alike_is_at_chance_exactly(tokenizer, haystack):
    class Indifferent(Copier):
        def follow(self, row):
            return torch.zeros_like(row)

    found = recall_results(Indifferent(len(tokenizer)), tokenizer, haystack, ["assoc_tokens"], [64], DEPTHS, items=2)
    assert {row.value for row in select(found, metric="acc")} == {0.25}


def test_rows_are_by_length_and_depth(tokenizer, haystack):
    found = recall_results(
        Copier(len(tokenizer)), tokenizer, haystack, ["induction", "copy"], [48, 64], DEPTHS, items=2
    )
    for task, depths in (("induction", {None, *DEPTHS}), ("copy", {None})):
        rows = select(found, task=task, metric="acc")
        assert {(row.length, row.depth) for row in rows} == {(length, d) for length in (48, 64) for d in depths}
    assert one(found, task="induction", metric="acc", length=48, depth=0.5).n == 2


@pytest.mark.parametrize("plan", [None, {"default": "gated_deltanet"}, {"default": "gla", "1": "attention"}])
def test_scores_are_those_of_whole_texts_and_of_generation(plan, reader):
    """The likelihood of an answer is that in the whole text; the answer that `generate` writes is generated."""
    model = reader if plan is None else subquad.linearize(reader, layer_types=plan, scale_ids=torch.arange(12)[None])
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(3, 300, (3, 30), generator=generator)
    model.eval()
    written = model.generate(contexts, do_sample=False, min_new_tokens=4, max_new_tokens=4)[:, 30:]
    items = []
    for context, answer in zip(contexts, written, strict=True):
        wrong = answer.clone()
        wrong[2] = (wrong[2] + 1) % 300
        long = torch.cat([wrong, wrong[:2]])
        questions = (
            Question(context[28:], answer, (wrong, long), None),
            Question(context[28:], wrong, (answer, long), 1),
        )
        items.append(Item(context[:28], questions))
    found = list(ask(model, items))
    assert [answer.generated for answer in found] == [1, 1, 1, 0, 0, 0]
    for answer, (question, item) in zip(found, [(i.questions[n], i) for n in (0, 1) for i in items], strict=True):
        text = torch.cat([item.context, question.ask, question.answer])
        with torch.no_grad():
            log_p = model(text[None], use_cache=False).logits[0].log_softmax(-1)
        expected = log_p[29:33].gather(-1, question.answer[:, None]).mean().item()
        assert answer.log_likelihood == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert answer.depth == question.depth


def test_batches_do_not_change_the_answers(tokenizer, haystack, reader, monkeypatch):
    items = made("needle_word", tokenizer, haystack)
    with eval_mode(reader):
        together = list(answers(reader, items))
        monkeypatch.setattr("subquad.analysis.recall.BATCH_TOKENS", 1)
        alone = list(answers(reader, items))
    assert [a.depth for a in alone] == [a.depth for a in together]
    for field in ("log_likelihood", "correct"):
        assert [getattr(a, field) for a in alone] == pytest.approx([getattr(a, field) for a in together], rel=1e-4)


# ---------------------------------------------------------------------- mistakes


def test_mistakes_are_said(tokenizer, haystack):
    model = Copier(len(tokenizer))
    with pytest.raises(UserError, match="unknown recall task 'needle_numbr'; did you mean 'needle_number'"):
        recall_results(model, tokenizer, haystack, ["needle_numbr"])
    with pytest.raises(UserError, match=r"length: got 12, expected at least \d+ tokens, which its needle_word takes"):
        recall_results(model, tokenizer, haystack, ["needle_word"], [12])
    with pytest.raises(UserError, match=r"haystack: got 20 tokens of text, expected at least \d+"):
        recall_results(model, tokenizer, haystack[:20], ["needle_word"], [LENGTH])
    with pytest.raises(UserError, match=r"depths: got \[50\], expected numbers from 0 to 1"):
        recall_results(model, tokenizer, haystack, ["copy"], [64], [50])
    with pytest.raises(UserError, match=r"recall needs \d+ different tokens, of which the tokenizer has 299"):
        recall_results(model, tokenizer, haystack, ["assoc_tokens"], [4096])
