"""Recall: items have the requested form, a copying model solves them, a model without attention is at chance."""

import copy
import random

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import subquad
from subquad.analysis.recall import answer_all, recall_results
from subquad.data.recall_tasks import COPY_TOKENS, TASKS, Item, PromptSource, Question, make_items
from subquad.evaluate.results import select
from subquad.export import convert
from subquad.utils import UserError, eval_mode
from tests.helpers.exports import REGULAR, saved_student
from tests.helpers.known_models import Copier
from tests.helpers.recipes import EOS, save_tiny_teacher, sentences
from tests.helpers.results import select_one

LENGTH = 192
WITH_DEPTH = [task for task in TASKS if task != "copy"]
DEPTHS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tiny_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return torch.tensor(tokenizer(sentences(400, 3)).input_ids)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A random Llama over the tokenizer's vocabulary."""
    return subquad.load_teacher(save_tiny_teacher(tmp_path_factory.mktemp("teacher"), context=512))[0]


def items_of(task, tokenizer, haystack, length=LENGTH, depths=DEPTHS, items=3, seed=0) -> list[Item]:
    return list(make_items(task, PromptSource(tokenizer, haystack, random.Random(seed)), length, depths, items))


def questions_of(*args, **kwargs) -> list[tuple[Item, Question]]:
    return [(item, question) for item in items_of(*args, **kwargs) for question in item.questions]


# ---------------------------------------------------------------------- items


@pytest.mark.parametrize("length", [160, 191])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_the_requested_length(task, tokenizer, haystack, length):
    items = items_of(task, tokenizer, haystack, length)
    assert {len(item.context) + len(q.query) for item in items for q in item.questions} == {length}
    assert sum(len(item.questions) for item in items) == 3 * len(DEPTHS)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_begin_with_the_tokenizers_prefix(task, tokenizer, haystack):
    """Llama and Gemma need their beginning-of-text token."""
    with_prefix = copy.deepcopy(tokenizer)
    template = TemplateProcessing(single=f"{EOS} $A {EOS}", special_tokens=[(EOS, with_prefix.bos_token_id)])
    with_prefix._tokenizer.post_processor = template
    for used, prefix in ((tokenizer, []), (with_prefix, [with_prefix.bos_token_id])):
        for item in items_of(task, used, haystack):
            assert item.context[: len(prefix)] == prefix
            assert with_prefix.bos_token_id not in item.context[len(prefix) :]
            assert {len(item.context) + len(question.query) for question in item.questions} == {LENGTH}


@pytest.mark.parametrize("task", WITH_DEPTH)
def test_answers_are_at_the_requested_depth(task, tokenizer, haystack):
    for item, question in questions_of(task, tokenizer, haystack):
        context, answer = item.context, question.answer
        positions = [i for i in range(len(context)) if context[i : i + len(answer)] == answer]
        before = next(i for i in positions if context[i - 1] == question.query[-1])
        # the answer is within a statement of some tokens
        assert abs(before / len(context) - question.depth) < 0.35 * (1 if "uuid" in task else 0.5)


@pytest.mark.parametrize("task", TASKS)
def test_distractors_differ_from_the_answer(task, tokenizer, haystack):
    for _, question in questions_of(task, tokenizer, haystack):
        assert len(question.distractors) == 3
        assert len({tuple(candidate) for candidate in (question.answer, *question.distractors)}) == 4
        if "uuid" not in task:
            assert {len(other) for other in question.distractors} == {len(question.answer)}


def test_copy_repeats_the_sequence(tokenizer, haystack):
    for item, question in questions_of("copy", tokenizer, haystack, length=101):
        whole = [*item.context, *question.query, *question.answer][1:]
        half = len(whole) // 2
        assert whole[:half] == whole[half:]
        assert len(question.answer) == COPY_TOKENS


def test_keys_and_values_of_assoc_tokens_are_distinct(tokenizer, haystack):
    for item, question in questions_of("assoc_tokens", tokenizer, haystack, items=1):
        (key,), (value,) = question.query, question.answer
        assert item.context[item.context.index(key) + 1] == value
        for token in (key, value, *(token for other in question.distractors for token in other)):
            assert item.context.count(token) == 1


def test_items_depend_only_on_the_seed(tokenizer, haystack):
    def contexts(seed):
        return [item.context for task in TASKS for item in items_of(task, tokenizer, haystack, seed=seed)]

    assert contexts(1) == contexts(1)
    assert contexts(1) != contexts(2)


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("task", TASKS)
def test_copying_model_solves_all_tasks(task, tokenizer, haystack):
    found = recall_results(Copier(len(tokenizer)), tokenizer, haystack, [task], [LENGTH], DEPTHS, items=2)
    for metric in ("acc", "acc_generated"):
        assert {result.value for result in select(found, metric=metric)} == {1}
    assert select_one(found, metric="acc", depth=None).stderr == 0
    assert select_one(found, metric="acc", depth=None).n == 6


@pytest.mark.parametrize("task", TASKS)
def test_model_without_attention_is_at_chance(task, tokenizer, haystack, reader):
    """Zero attention output: a prediction depends on the last token only."""
    with torch.no_grad():
        for layer in reader.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    found = recall_results(reader, tokenizer, haystack, [task], [LENGTH], DEPTHS, items=40)
    acc = select_one(found, metric="acc", depth=None)
    assert select_one(found, metric="chance", depth=None).value == 0.25
    assert abs(acc.value - 0.25) < 4 * (0.25 * 0.75 / 120) ** 0.5
    assert select_one(found, metric="acc_generated", depth=None).value < 0.1
    assert acc.n == 120


def test_ties_count_as_chance(tokenizer, haystack):
    class Indifferent(Copier):
        def predict(self, row):
            return torch.zeros_like(row)

    found = recall_results(Indifferent(len(tokenizer)), tokenizer, haystack, ["assoc_tokens"], [64], DEPTHS, items=2)
    assert {result.value for result in select(found, metric="acc")} == {0.25}


def test_results_by_length_and_depth(tokenizer, haystack):
    found = recall_results(
        Copier(len(tokenizer)), tokenizer, haystack, ["induction", "copy"], [48, 64], DEPTHS, items=2
    )
    for task, depths in (("induction", {None, *DEPTHS}), ("copy", {None})):
        results = select(found, task=task, metric="acc")
        assert {(result.length, result.depth) for result in results} == {
            (length, d) for length in (48, 64) for d in depths
        }
    assert select_one(found, task="induction", metric="acc", length=48, depth=0.5).n == 2


@pytest.mark.parametrize("layer_types", [None, {"default": "gated_deltanet"}, {"default": "gla", "1": "attention"}])
def test_scores_match_full_forward_and_generate(layer_types, reader):
    """Likelihoods equal those of the whole text; `generated` marks the answer that `generate` writes."""
    model = reader
    if layer_types is not None:
        model = subquad.linearize(reader, layer_types=layer_types, scale_ids=torch.arange(12)[None])
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(3, 300, (3, 30), generator=generator)
    model.eval()
    written = model.generate(contexts, do_sample=False, min_new_tokens=4, max_new_tokens=4)[:, 30:]
    items = []
    for context, answer in zip(contexts.tolist(), written.tolist(), strict=True):
        wrong = [*answer[:2], (answer[2] + 1) % 300, *answer[3:]]
        long = wrong + wrong[:2]
        questions = [
            Question(context[28:], answer, [wrong, long], None),
            Question(context[28:], wrong, [answer, long], 1),
        ]
        items.append(Item(context[:28], questions))
    found = list(answer_all(model, items))
    assert [answer.acc_generated for answer in found] == [1, 1, 1, 0, 0, 0]
    for answer, (question, item) in zip(found, [(i.questions[n], i) for n in (0, 1) for i in items], strict=True):
        text = torch.tensor([item.context + question.query + question.answer])
        with torch.no_grad():
            log_p = model(text, use_cache=False).logits[0].log_softmax(-1)
        expected = log_p[29:33].gather(-1, torch.tensor(question.answer)[:, None]).mean().item()
        assert answer.loglikelihood == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert answer.depth == question.depth


def test_batch_size_does_not_change_answers(tokenizer, haystack, reader, monkeypatch):
    items = items_of("needle_word", tokenizer, haystack)
    with eval_mode(reader):
        together = list(answer_all(reader, items))
        monkeypatch.setattr("subquad.analysis.recall.BATCH_TOKENS", 1)
        alone = list(answer_all(reader, items))
    assert [a.depth for a in alone] == [a.depth for a in together]
    for field in ("loglikelihood", "acc"):
        assert [getattr(a, field) for a in alone] == pytest.approx([getattr(a, field) for a in together], rel=1e-4)


def test_teachers_with_recurrent_layers_of_transformers(tokenizer, haystack, tmp_path):
    """A Qwen3.5 answers as the student from which it was converted."""
    student = subquad.load_teacher(saved_student(tmp_path, REGULAR))[0]
    items = items_of("needle_word", tokenizer, haystack)
    with eval_mode(student):
        expected = list(answer_all(student, items))
    found = list(answer_all(convert(student, "qwen3_5"), items))
    for field in ("loglikelihood", "acc"):
        assert [getattr(a, field) for a in found] == pytest.approx([getattr(a, field) for a in expected], rel=1e-3)


# ---------------------------------------------------------------------- errors


def test_invalid_arguments_are_refused(tokenizer, haystack):
    for message, tasks, lengths, options in (
        ("did you mean 'needle_number'", ["needle_numbr"], [64], {}),
        ("length: got 12", ["needle_word"], [12], {}),
        ("haystack: got 20", ["needle_word"], [LENGTH], {"haystack": haystack[:20]}),
        ("depths", ["copy"], [64], {"depths": [50]}),
        ("tokenizer: has 299", ["assoc_tokens"], [4096], {}),
    ):
        with pytest.raises(UserError, match=message):
            recall_results(
                Copier(len(tokenizer)), tokenizer, **{"haystack": haystack, **options}, tasks=tasks, lengths=lengths
            )
