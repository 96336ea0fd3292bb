"""The uniform window of equal bytes."""

import pytest
import torch

import subquad
from subquad.evaluate.baselines import CONTEXT, equal_bytes, uniform_window, windowed_teacher
from subquad.evaluate.results import Result
from subquad.evaluate.runner import EvalModel, Evaluation
from subquad.evaluate.suites import Settings
from tests.helpers.students import SCALE_IDS
from tests.helpers.teachers import byte_tokenizer, tiny_teacher

TOKEN = 2 * 2 * 2 * 8 * 4
"""Bytes of a cached token: keys and values of two layers with two heads of eight channels in float32."""
ROTATION = TOKEN // 2
"""Bytes of the rotations at which late queries read sinks: cos and sin of eight channels in two layers."""


def student_of(teacher, layer_types):
    return subquad.linearize(teacher, layer_types=layer_types, scale_ids=SCALE_IDS)


def test_window_of_equal_bytes_computed_by_hand():
    """Two layers with four heads of states of 8 x 8 numbers are 2,048 bytes, those of eight tokens: four sinks, the
    last three, which a window of four keeps for the next query, and the rotations are 1,920."""
    student = student_of(tiny_teacher(), {"default": "gla"})
    assert equal_bytes(student) == (8 * TOKEN, CONTEXT * TOKEN, 4)


@pytest.mark.parametrize("name", ["plain", "mistral"])
@pytest.mark.parametrize(
    "layer_types",
    [
        {"default": "gated_deltanet"},
        {"0": "gla", "1": "attention"},
        {"0": {"mixer": "attention", "window": [3, "full"], "sinks": 1}, "1": "gla"},
    ],
)
def test_the_window_is_the_largest_that_is_not_larger(name, layer_types):
    teacher = tiny_teacher(name)
    size, whole, window = equal_bytes(student_of(teacher, layer_types))
    if window is None:  # the teacher's own window is smaller
        assert name == "mistral"
        assert size >= whole
        return
    assert cache_size(teacher, window) <= size
    assert all(cache_size(teacher, more) > size for more in range(window + 1, window + 9))


def cache_size(teacher, window):
    """Of the real cache, after as many tokens as fill the window."""
    ids = torch.randint(3, 61, (1, min(CONTEXT, window + 8)))
    return windowed_teacher(teacher, window)(ids, use_cache=True).past_key_values.nbytes()


def test_no_window_beside_what_saves_nothing_or_is_one():
    teacher = tiny_teacher()
    kept = student_of(teacher, {"default": "attention"})
    assert equal_bytes(kept) == (CONTEXT * TOKEN, CONTEXT * TOKEN, None)
    assert equal_bytes(windowed_teacher(teacher, 7))[::2] == (10 * TOKEN + ROTATION, None)
    # one without sinks is another student: the window of equal bytes has them
    assert equal_bytes(student_of(teacher, {"default": {"mixer": "attention", "window": 7}}))[::2] == (6 * TOKEN, 2)


def test_the_dtype_of_the_student_counts():
    student = student_of(tiny_teacher(), {"0": "attention", "1": {"mixer": "attention", "window": 9}})
    size, whole, window = equal_bytes(student)
    assert equal_bytes(student.to(torch.bfloat16)) == (size // 2, whole // 2, window)


def test_students_of_equal_bytes_share_a_window():
    teacher, tokenizer = tiny_teacher(vocab_size=256), byte_tokenizer()
    made = {
        "gla": {"default": "gla"},
        "retnet": {"default": "retnet"},
        "wide": {"default": {"mixer": "attention", "window": 9}},
        "window": {"default": uniform_window(20)},
    }
    students = [EvalModel(name, student_of(teacher, types), tokenizer) for name, types in made.items()]
    evaluation = Evaluation(students, EvalModel("it", teacher, tokenizer), Settings())
    windows = ["it, window 4 + 4 sinks"]
    assert [model.name for model in evaluation.models] == [*made, *windows, "it"]
    assert evaluation.caches["gla"] == [
        Result("cache", "state_bytes", 8.0 * TOKEN, length=CONTEXT),
        Result("cache", "equal_window", 4.0),
    ]
    assert evaluation.caches[windows[0]] == [Result("cache", "state_bytes", 7.0 * TOKEN + ROTATION, length=CONTEXT)]
    assert [result.metric for result in evaluation.caches["window"]] == ["state_bytes"]
    assert evaluation.caches["it"] == [Result("cache", "state_bytes", float(CONTEXT * TOKEN), length=CONTEXT)]
    assert Evaluation(students, None, Settings()).models == students
    assert [m.name for m in Evaluation(students, evaluation.teacher, Settings(baselines=())).models] == [*made, "it"]


def test_a_teacher_that_is_no_transformer_leaves_the_evaluation():
    teacher, tokenizer = tiny_teacher(vocab_size=256), byte_tokenizer()
    student = student_of(teacher, {"default": "gla"})
    evaluation = Evaluation([EvalModel("a", student, tokenizer)], EvalModel("b", student, tokenizer), Settings())
    assert [model.name for model in evaluation.models] == ["a", "b"]
    assert list(evaluation.failed) == ["b, window 4 + 4 sinks"]
