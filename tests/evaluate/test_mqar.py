"""Associative recall that is learned: the task is Zoology's, and the mixers come out in the published order."""

import pytest
import torch

from subquad.analysis.mqar import ALIKE, Setting, accuracy, build, mqar_results, sequences, train
from subquad.utils import UserError

TINY = Setting(pairs=3, vocabulary=12, width=16, heads=2, layers=1, steps=2, batch=4)


def test_every_key_is_asked_for_once_and_has_its_value():
    setting = Setting(pairs=5, vocabulary=40)
    tokens, targets = sequences(setting, 50, torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (50, setting.length)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        told = dict(zip(row[:10:2], row[1:10:2], strict=True))
        assert len(told) == len(set(told.values())) == 5
        assert max(told) < 20 <= min(told.values())
        assert sorted(row[10::2]) == sorted(told)
        for place, (token, target) in enumerate(zip(row, wanted, strict=True)):
            asked = place >= 10 and place % 2 == 0
            assert target == (told[token] if asked else -100)
    assert len({tuple(row) for row in tokens[:, 10::2].argsort(1).tolist()}) > 10  # in an order of its own each time


def test_a_model_that_was_taught_nothing_guesses():
    setting = Setting(pairs=4, vocabulary=32, width=16, heads=2)
    right, asked = accuracy(build("gla", setting), setting)
    assert asked == 256 * 4
    assert right < 0.1


def test_models_hold_nothing_of_a_teacher_and_the_same_every_time():
    one, same = build("deltanet", TINY), build("deltanet", TINY)
    mixer = one.mixer_layers[0].mixer
    assert (mixer.o_norm == 1).all()
    assert mixer.q_conv.shape[-1] == 4
    assert {name: getattr(mixer.options, name) for name in ALIKE} == ALIKE
    assert mixer.spec.num_heads * mixer.spec.head_dim**2 == TINY.state
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    train(one, TINY)
    train(same, TINY)
    assert torch.equal(mixer.q_proj.weight, same.mixer_layers[0].mixer.q_proj.weight)
    assert not torch.equal(mixer.q_proj.weight, build("deltanet", TINY).mixer_layers[0].mixer.q_proj.weight)


def test_rows_name_mixer_and_state():
    found = mqar_results(["gla", "softmax"], heads=(1, 2), setting=TINY)
    assert [(row.model, row.task) for row in found] == [
        (name, f"mqar_state_{state}") for name in ("gla", "softmax") for state in (256, 128)
    ]
    assert {row.length for row in found} == {12}
    assert all(0 <= row.value <= 1 and row.n == 256 * 3 for row in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delta", "additive"),
    [pytest.param("deltanet", "gla", marks=pytest.mark.sample), ("gated_deltanet", "mamba2")],
)
def test_the_delta_rule_recalls_more_than_addition_at_equal_state(delta, additive):
    """As published (arXiv 2406.06484, section 5.1): as many keys as a head has directions, which addition confuses."""
    found = {row.model: row for row in mqar_results([delta, additive], heads=[4])}
    print({name: f"{row.value:.3f} +- {row.stderr:.3f}" for name, row in found.items()})
    assert found[delta].task == found[additive].task == "mqar_state_256"
    assert found[additive].value > 0.125  # it has learned that the answer is one of the values told
    assert found[delta].value > found[additive].value + 0.1


def test_mistakes_are_said():
    with pytest.raises(UserError, match="heads: got 3 for a width of 32; expected heads of an even size"):
        Setting(heads=3)
    with pytest.raises(UserError, match="pairs: got 70 for a vocabulary of 128; expected 1 to 64"):
        Setting(pairs=70, vocabulary=128)
    with pytest.raises(UserError, match="unknown mixer 'glaa'"):
        mqar_results(["glaa"], setting=TINY)
