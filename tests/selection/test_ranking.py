"""Rankings of groups and layers, on teachers whose needed groups are known; readers read what students read."""

import random

import pytest
import torch
from transformers import AutoTokenizer

import subquad
from subquad.data.packing import IGNORE_INDEX
from subquad.data.recall_tasks import PromptSource, draw_needles
from subquad.modeling.attention.discovery import discover_attention
from subquad.selection.ranking import CRITERIA, UNITS, RankedUnit, kept_layer_types, rank_groups
from subquad.selection.texts import KINDS, Texts, plain_texts, retrieval_texts
from subquad.selection.windows import WHOLE, WindowedReader
from subquad.utils import UserError
from tests.helpers.architectures import ARCHITECTURES, build_teacher
from tests.helpers.known_models import INDUCTION_GROUP, induction_model
from tests.helpers.recipes import save_tiny_teacher, sentences
from tests.helpers.students import all_close, checksum

WINDOW, SINKS = 16, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tiny_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return torch.tensor(tokenizer(sentences(400, 3)).input_ids)


@pytest.fixture(scope="module")
def retriever(tokenizer):
    return induction_model(len(tokenizer))


def tiny_teacher(tmp_path, *whole, **changes):
    """A random teacher in which the output of all groups but `whole` is zero."""
    teacher = subquad.load_teacher(save_tiny_teacher(tmp_path, context=512, **changes))[0]
    with torch.no_grad():
        for index, layer in enumerate(teacher.model.layers):
            columns = layer.self_attn.o_proj.weight.unflatten(1, (2, -1))  # key/value heads, their channels
            for head in range(2):
                if (index, head) not in whole:
                    columns[:, head] = 0
    return teacher


# ---------------------------------------------------------------------- texts


def test_endings_ask_about_every_statement(tokenizer, haystack):
    texts = retrieval_texts(tokenizer, haystack, 384, 3, WINDOW, seed=1)
    assert len(texts.contexts) == len(texts.endings) == 3
    for context, ending, labels in zip(*(x.tolist() for x in texts), strict=True):
        answered = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        assert all(ending[i + 1] == labels[i] for i in answered)
        text, asked = tokenizer.decode(context), tokenizer.decode(ending).rstrip(tokenizer.eos_token)
        statements = asked.split("\n")[1:]
        assert len(statements) == len(KINDS)
        for statement in statements:
            assert f"\n{statement}" in text
            assert len(tokenizer(text[text.rindex(f"\n{statement}") :]).input_ids) > WINDOW


def test_needles_have_distinct_names_and_one_length(tokenizer, haystack):
    source = PromptSource(tokenizer, haystack, random.Random(0))
    item = draw_needles(["number", "word", "number"], "sample_text", source, 200, 0.1, 0.5, 0.9)
    assert len(item.context) + max(len(question.query) for question in item.questions) == 200
    assert len({tuple(question.query) for question in item.questions}) == 3
    for question in item.questions:
        statement = question.query + question.answer
        found = [i for i in range(len(item.context)) if item.context[i : i + len(statement)] == statement]
        assert len(found) == 1
        assert abs(found[0] / len(item.context) - question.depth) < 0.2


def test_plain_texts_predict_the_next_tokens():
    texts = plain_texts(torch.arange(1000), length=64, rows=3)
    assert torch.equal(texts.labels, texts.endings + 1)
    assert torch.equal(texts.endings[:, 0], texts.contexts[:, -1] + 1)
    assert texts.contexts.shape[1] + texts.endings.shape[1] == 64


# ---------------------------------------------------------------------- the reader


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "falcon", "gpt_oss"])
def test_reader_equals_students_with_these_windows(model_type):
    """Contexts and endings read with the same windows; then one layer's windows of the endings changed."""
    if model_type not in ARCHITECTURES:
        pytest.skip(f"this version of transformers has no {model_type}")
    teacher = build_teacher(model_type)
    layers = discover_attention(teacher)
    ids = torch.randint(3, 61, (2, 41), generator=torch.Generator().manual_seed(0))
    texts = Texts(ids[:, :24], ids[:, 24:-1], ids[:, 25:].masked_fill(ids[:, 25:] % 3 == 0, IGNORE_INDEX))
    reader = WindowedReader(teacher, layers, SINKS)
    heads = [info.spec.num_kv_heads for info in layers]
    windows = {i: tuple(7 if (i + head) % 2 else WHOLE for head in range(n)) for i, n in enumerate(heads)}

    def student_logits(windows):
        types = {str(i): {"mixer": "attention", "window": list(own), "sinks": SINKS} for i, own in windows.items()}
        student = subquad.linearize(teacher, layer_types=types, attention_layers=layers)
        with torch.no_grad():
            return student(ids[:, :-1], use_cache=False).logits[:, 24:][texts.labels != IGNORE_INDEX]

    logits = reader.read(texts, windows)
    assert all_close(logits, student_logits(windows))
    assert torch.equal(reader.logits({}), logits)
    last = max(windows)
    changed = {last: (3,) * heads[last]}
    # in the last layer, only the tokens of the ending matter
    assert all_close(reader.logits(changed), student_logits({**windows, **changed}))
    assert all_close(reader.logits({0: windows[0]}), logits)
    assert not all_close(reader.logits({0: (1,) * heads[0]}), logits)
    assert all_close(reader.logits({}), logits)
    assert not any("forward" in block.__dict__ for block in reader.blocks)


# ---------------------------------------------------------------------- criteria


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("by", ["retrieval", "halo", "kl"])
def test_the_group_that_retrieves_is_first(by, unit, retriever, tokenizer, haystack):
    before = checksum(retriever)
    ranking = rank_groups(retriever, tokenizer, haystack, by, unit, keep=1, window=WINDOW, sinks=SINKS)
    layer, head = INDUCTION_GROUP
    assert ranking[0][:2] == (layer, head if unit == "group" else None)
    assert len(ranking) == len({each[:2] for each in ranking}) == (4 if unit == "group" else 2)
    assert ranking[0].score > 0.1
    assert all(abs(each.score) < 1e-3 for each in ranking[1:])
    assert checksum(retriever) == before


@pytest.mark.parametrize("group", [(0, 1), (1, 0)])
def test_kl_ranks_the_only_group_with_an_output_first(group, tmp_path, tokenizer, haystack):
    teacher = tiny_teacher(tmp_path, group)
    ranking = rank_groups(teacher, tokenizer, haystack, "kl", keep=1, window=4, sinks=1)
    assert ranking[0][:2] == group
    assert ranking[0].score > 10 * max(abs(each.score) for each in ranking[1:])


def test_candidates_are_measured_again_without_the_others(tmp_path, tokenizer, haystack, monkeypatch):
    teacher = tiny_teacher(tmp_path, (0, 0), (0, 1), (1, 0), (1, 1))
    monkeypatch.setattr("subquad.selection.ranking.CANDIDATES", 1)
    ranking = rank_groups(teacher, tokenizer, haystack, keep=2, window=WINDOW, sinks=SINKS)
    candidates = [each[:2] for each in ranking[:2]]

    reader = WindowedReader(teacher, discover_attention(teacher), SINKS)
    texts = retrieval_texts(tokenizer, haystack, 384, 4, WINDOW, seed=0)

    def loss(*whole):
        windows = {i: tuple(WHOLE if (i, head) in whole else WINDOW for head in range(2)) for i in range(2)}
        return reader.loss(reader.logits(windows))

    every = [(i, head) for i in range(2) for head in range(2)]
    reader.read(texts, dict.fromkeys(range(2), (WHOLE, WHOLE)))
    first = {one: loss(*(each for each in every if each != one)) - loss(*every) for one in every}
    assert {*candidates} == {*sorted(first, key=first.get)[2:]}
    assert [each.score for each in ranking[2:]] == pytest.approx(sorted(first.values())[:2][::-1], abs=1e-5)
    reader.read(texts, {i: tuple(WHOLE if (i, head) in candidates else WINDOW for head in range(2)) for i in range(2)})
    second = [loss(other) - loss(*candidates) for other in candidates[::-1]]
    assert [each.score for each in ranking[:2]] == pytest.approx(second, abs=1e-5)
    assert second[0] > second[1]


def test_uniform_layers_are_evenly_spaced(tmp_path, tokenizer, haystack):
    teacher = tiny_teacher(tmp_path, num_hidden_layers=6)
    ranking = rank_groups(teacher, tokenizer, haystack, "uniform", "layer", keep=3)
    assert [each.layer for each in ranking if each.score == 1] == [1, 3, 5]
    assert [each.layer for each in ranking[3:]] == [0, 2, 4]


def test_layers_with_the_teachers_own_window_are_last(tokenizer, haystack):
    teacher = build_teacher("gemma2", vocab_size=len(tokenizer), max_position_embeddings=512)
    local = [info.spec.window is not None for info in discover_attention(teacher)]
    assert local == [True, False]
    ranking = rank_groups(teacher, tokenizer, haystack, "kl", "layer", keep=1, window=WINDOW)
    assert [each.layer for each in ranking] == [1, 0]
    assert ranking[1].score == 0


def test_kept_layer_types_build_the_student(retriever, tokenizer):
    heads = [info.spec.num_kv_heads for info in discover_attention(retriever)]
    types = kept_layer_types([RankedUnit(1, 0, 1.0)], heads, WINDOW, SINKS)
    assert types["1"] == {"mixer": "attention", "window": ["full", WINDOW], "sinks": SINKS}
    student = subquad.linearize(retriever, layer_types=types)
    assert [layer.windows for layer in student.mixer_layers] == [(WINDOW, WINDOW), (None, WINDOW)]
    for kept in ([RankedUnit(0, None, 1.0)], [RankedUnit(0, 1, 1.0), RankedUnit(0, 0, 1.0)]):
        assert kept_layer_types(kept, heads, WINDOW, SINKS)["0"] == "attention"


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "retreival"}, "by: got 'retreival'; did you mean 'retrieval'"),
        ({"unit": "head"}, "unit: got 'head'; expected one of group, layer"),
        ({"by": "uniform"}, "got 'uniform' for groups, expected it for layers"),
        ({"keep": 5}, "keep: got 5, expected a number from 1 to 4, the number of groups"),
        ({"keep": 0}, "keep: got 0"),
        ({"window": 200}, "window: got 200, expected at most 128"),
        ({"haystack": torch.arange(50), "by": "kl"}, "haystack: got 50 tokens of text"),
        ({"haystack": torch.arange(50)}, "haystack: got 50 tokens of text"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(options, message, retriever, tokenizer, haystack):
    given = {"haystack": haystack, **options}
    with pytest.raises(UserError, match=message):
        rank_groups(retriever, tokenizer, **{"keep": 1, **given})


def test_every_criterion_has_a_source():
    assert all("arXiv" in function.__doc__ for name, function in CRITERIA.items() if name != "uniform")
