"""Options of attention beside a memory: those that are refused, and how `linearize` takes them."""

import pytest
import torch

import subquad
from subquad.utils import UserError
from tests.helpers.architectures import cached_teacher
from tests.helpers.near_far import near_far_student, near_far_types
from tests.helpers.students import SCALE_IDS, logits
from tests.helpers.teachers import tiny_teacher

WRONG = [
    ({"short_conv": 4}, "short_conv: a mixer with a window has none"),
    ({"output_gate": "swish"}, "output_gate: a mixer with a window has none"),
    ({"rotary": True}, "rotary: a mixer with a window has none"),
    ({"qk_norm": True}, "qk_norm: a mixer with a window has none"),
    ({"merge": "denominator"}, "merge: got 'denominator', expected qk_activation to be one of elu1, relu"),
    ({"merge": "lolcats", "qk_activation": "silu"}, "got 'lolcats', expected qk_activation to be one of elu1, relu"),
    ({"mixer": "deltanet", "merge": "denominator", "qk_activation": "elu1"}, "got 'denominator' with deltanet"),
    ({"merge": "mas"}, "merge: got 'mas'; did you mean 'mass'"),
    ({"memory": "inside"}, "memory: got 'inside'; did you mean 'outside'"),
    ({"memory_heads": [True]}, r"memory_heads: got \[True\]"),
    ({"window": None}, "window: got None"),
    ({"window": 0}, "window: got 0"),
    ({"window": [4, 0]}, "window: got "),
    ({"sinks": -1}, "sinks: got -1"),
    ({"half_lif": 3.0}, "half_lif.*did you mean 'half_life'"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=str)
def test_wrong_options_are_refused(wrong, message):
    types = {"default": {"mixer": "gla", "window": 8, "sinks": 2, **wrong}}
    with pytest.raises(UserError, match=f"layer_types: default: .*{message}"):
        subquad.linearize(cached_teacher("llama"), layer_types=types, scale_ids=SCALE_IDS)


@pytest.mark.parametrize("given", [{"sinks": 4}, {"merge": "add"}, {"memory": "all"}])
def test_a_window_is_needed(given):
    with pytest.raises(UserError, match="window: missing; expected a number of tokens for"):
        subquad.linearize(cached_teacher("llama"), "gla", scale_ids=SCALE_IDS, **given)


def test_features_of_ones_are_for_memories():
    with pytest.raises(UserError, match="qk_activation: got 'ones' without a window, expected one"):
        subquad.linearize(cached_teacher("llama"), "gla", scale_ids=SCALE_IDS, qk_activation="ones")


def test_wrong_numbers_of_windows_are_refused():
    with pytest.raises(UserError, match="window: got 3 numbers for layer 0, expected one number, or one for each of"):
        near_far_student(tiny_teacher(), near_far_types("gla", [4, 4, 4]))


def test_linearize_takes_a_window_as_an_option():
    teacher, ids = cached_teacher("llama"), torch.arange(3, 23)[None].expand(2, -1)
    student = subquad.linearize(teacher, "gla", window=6, sinks=2, scale_ids=SCALE_IDS)
    assert student.config.layer_specs == [near_far_types("gla", 6, 2)["default"]] * 2
    expected = subquad.linearize(teacher, layer_types=near_far_types("gla", 6, 2), scale_ids=SCALE_IDS)
    assert torch.equal(logits(student, ids), logits(expected, ids))
