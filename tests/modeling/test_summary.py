"""What `subquad inspect` says, against students that are there."""

import json

import pytest
import torch
from family_cases import PLANS, family, student
from modeling_cases import ALL, logits, student_of

import subquad
from subquad.modeling.model_card import model_card
from subquad.modeling.summary import (
    layer_ranges,
    meta_model,
    read_config,
    student_cache_bytes,
    summary,
    teacher_cache_bytes,
)
from subquad.utils import UserError


@pytest.mark.parametrize("mixer", ALL)
def test_bytes_and_parameters_are_those_of_the_student_at_work(make_teacher, ids, mixer):
    teacher = make_teacher("wide-biased-tied")
    model = student_of(teacher, mixer)
    cache = model.new_cache()
    logits(model, ids[:1], past_key_values=cache)
    outlined = meta_model(model.config)
    assert student_cache_bytes(outlined, 11) == cache.nbytes()
    assert outlined.num_parameters() == model.num_parameters()
    theirs = teacher(ids[:1], use_cache=True).past_key_values
    assert teacher_cache_bytes(model.config, 11) == sum(4 * (x.keys.numel() + x.values.numel()) for x in theirs.layers)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_bigcode", "gpt_oss"])
def test_bytes_of_windows_and_shared_heads(name, plan):
    model = student(name, plan)
    ids = torch.randint(3, 61, (1, 21))
    cache = model.new_cache()
    logits(model, ids, past_key_values=cache)
    places = sum(layer.states[2].nbytes for layer in cache.layers if type(layer).__name__ == "SlidingWindowCacheLayer")
    assert student_cache_bytes(meta_model(model.config), 21) == cache.nbytes() - places
    theirs = family(name)(ids, use_cache=True).past_key_values
    assert teacher_cache_bytes(model.config, 21) == sum(4 * (x.keys.numel() + x.values.numel()) for x in theirs.layers)


def test_halves_are_counted_as_halves(teacher, tmp_path):
    student_of(teacher.to(torch.bfloat16), "softmax").save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert student_cache_bytes(meta_model(config), 10) == teacher_cache_bytes(config, 10) == 2 * 10 * 2 * (8 + 8) * 2
    assert "bfloat16" in summary(config)


def test_neighbours_that_are_alike_are_one_run(make_teacher):
    teacher = make_teacher(num_hidden_layers=6)
    model = subquad.linearize(
        teacher, layer_types={"default": "gla", "2": "attention", "4,5": {"mixer": "gla", "decay_rank": 2}}
    )
    labels = [label for label, _ in layer_ranges(model.config)]
    assert labels == ["0-1", "2", "3", "4-5"]
    text = summary(model.config)
    assert "  0-1  gla\n  2    attention\n  3    gla\n  4-5  gla (decay_rank=2)\n" in text
    assert text.count("half_life=") == 2


def test_learned_positions_are_told():
    assert "learned positions: at most 64 tokens" in summary(student("gpt2", "retnet").config)
    assert "64 learned positions" in model_card(student("gpt2", "retnet").config, "gpt2")


def test_anything_else_than_a_student_is_refused(teacher, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(tmp_path)
    teacher.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="llama"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
