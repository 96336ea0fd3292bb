"""MQAR: the task is that of Zoology, and the mixers have the published order."""

import pytest
import torch

from subquad.analysis.mqar import (
    SHARED_OPTIONS,
    MQARSettings,
    accuracy,
    build_model,
    mqar_results,
    sequences,
    train_model,
)
from subquad.utils import UserError

TINY = MQARSettings(pairs=3, vocabulary=12, width=16, heads=2, layers=1, steps=2, batch=4)


def test_every_key_is_queried_once_with_its_value():
    setting = MQARSettings(pairs=5, vocabulary=40)
    tokens, targets = sequences(setting, 50, torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (50, setting.length)
    for row, expected in zip(tokens.tolist(), targets.tolist(), strict=True):
        values = dict(zip(row[:10:2], row[1:10:2], strict=True))
        assert len(values) == len(set(values.values())) == 5
        assert max(values) < 20 <= min(values.values())
        assert sorted(row[10::2]) == sorted(values)
        for position, (token, target) in enumerate(zip(row, expected, strict=True)):
            queried = position >= 10 and position % 2 == 0
            assert target == (values[token] if queried else -100)
    assert len({tuple(row) for row in tokens[:, 10::2].argsort(1).tolist()}) > 10  # in different orders


def test_untrained_model_guesses():
    setting = MQARSettings(pairs=4, vocabulary=32, width=16, heads=2)
    right, asked = accuracy(build_model("gla", setting), setting)
    assert asked == 256 * 4
    assert right < 0.1


def test_models_are_random_and_reproducible():
    model, same = build_model("deltanet", TINY), build_model("deltanet", TINY)
    mixer = model.mixer_layers[0].mixer
    assert (mixer.o_norm == 1).all()
    assert mixer.q_conv.shape[-1] == 4
    assert {name: getattr(mixer.options, name) for name in SHARED_OPTIONS} == SHARED_OPTIONS
    assert mixer.spec.num_heads * mixer.spec.head_dim**2 == TINY.state
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    train_model(model, TINY)
    train_model(same, TINY)
    assert torch.equal(mixer.q_proj.weight, same.mixer_layers[0].mixer.q_proj.weight)
    assert not torch.equal(mixer.q_proj.weight, build_model("deltanet", TINY).mixer_layers[0].mixer.q_proj.weight)


def test_results_name_mixer_and_state():
    found = mqar_results(["gla", "softmax"], heads=(1, 2), setting=TINY)
    assert [(result.model, result.task) for result in found] == [
        (name, f"mqar_state_{state}") for name in ("gla", "softmax") for state in (256, 128)
    ]
    assert {result.length for result in found} == {12}
    assert all(0 <= result.value <= 1 and result.n == 256 * 3 for result in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delta", "additive"),
    [pytest.param("deltanet", "gla", marks=pytest.mark.sample), ("gated_deltanet", "mamba2")],
)
def test_delta_rule_recalls_more_at_equal_state(delta, additive):
    """arXiv 2406.06484, section 5.1: with as many keys as head dimensions, additive updates interfere."""
    found = {result.model: result for result in mqar_results([delta, additive], heads=[4])}
    print({name: f"{result.value:.3f} +- {result.stderr:.3f}" for name, result in found.items()})
    assert found[delta].task == found[additive].task == "mqar_state_256"
    assert found[additive].value > 0.125  # more than guessing among the values shown
    assert found[delta].value > found[additive].value + 0.1


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="heads: got 3"):
        MQARSettings(heads=3)
    with pytest.raises(UserError, match="pairs: got 70"):
        MQARSettings(pairs=70, vocabulary=128)
    with pytest.raises(UserError, match="glaa"):
        mqar_results(["glaa"], setting=TINY)
