"""Continuations against `generate`, and repetition against hand-counted cases."""

import pytest
import torch

import subquad
from subquad.evaluate.generation import (
    agreement_results,
    common_prefix,
    continuations,
    repeated_ngram_share,
    repetition_results,
)
from tests.helpers.results import select_one


@pytest.mark.parametrize("mixer", ["softmax", "gated_deltanet", "xlstm"])
def test_continuations_equal_generate(make_teacher, mixer):
    teacher = make_teacher("qwen3")
    model = teacher if mixer == "softmax" else subquad.linearize(teacher, mixer).eval()
    prompts = torch.randint(3, 61, (5, 7))
    found = continuations(model, prompts, 9, batch_size=2)
    expected = model.generate(prompts, do_sample=False, max_new_tokens=9, min_new_tokens=9, eos_token_id=60)
    free = (found != 60).all(1)  # `generate` suppresses the end-of-text token
    assert free.any()
    assert torch.equal(found[free], expected[free, 7:])
    assert model.training is False


def test_common_prefix_and_agreement():
    a = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [9, 2, 3, 4]])
    b = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 4], [1, 2, 3, 4]])
    assert common_prefix(a, b).tolist() == [4, 2, 0]
    results = agreement_results("text", a, b, lengths=(2, 4, 256))
    assert select_one(results, metric="common_prefix").value == 2
    assert select_one(results, metric="same_continuation", length=2).value == pytest.approx(2 / 3)
    assert select_one(results, metric="same_continuation", length=4).value == pytest.approx(1 / 3)
    assert len(results) == 3


def test_repetition_and_degenerate_rate():
    circle = torch.tensor([[1, 2, 3] * 10])
    straight = torch.arange(30)[None]
    assert repeated_ngram_share(circle).item() == pytest.approx(1 - 3 / 27)
    assert repeated_ngram_share(straight).item() == 0
    assert repeated_ngram_share(straight[:, :3]).item() == 0
    results = repetition_results("text", torch.cat([circle, straight]))
    assert select_one(results, metric="degenerate_rate").value == 0.5
