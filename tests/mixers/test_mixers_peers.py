"""Kimi Delta Attention and HGRN2 against `fla`'s plain references, from what the mixers hand to their cores."""

import pytest
import torch
import torch.nn.functional as F
from mixer_cases import build, distance, draw

from tests.peers import fla_reference

CASES = [
    ("kda", {}),
    ("kda", {"short_conv": 0, "qk_activation": "none"}),
    ("hgrn2", {}),
    ("hgrn2", {"lower_bound": 0.3}),
]


def peer(name, core, initial_state=None):
    """Output and state of `fla`'s reference for what `core` holds."""
    more = {"initial_state": initial_state, "output_final_state": True}
    if name == "kda":
        recurrent = fla_reference("kda", "naive_recurrent_kda")
        return recurrent(core["q"], core["k"], core["v"], core["log_decay"], core["beta"], **more)
    return fla_reference("gla", "naive_recurrent_gla")(core["q"], core["k"], core["v"], core["log_decay"], **more)


@pytest.mark.parametrize("layout", ["plain", "biased"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: str(case))
def test_output_state_and_gradients_are_the_references(name, options, layout):
    mixer = build(name, layout, **options)
    x = draw(2, 75, 24)
    core, _ = mixer.op_inputs(x, None, None, None)
    core = {key: t.detach().requires_grad_() for key, t in core.items()}
    found, (state,) = mixer.run_op(core, None, None)
    expected, wanted = peer(name, core)
    assert distance(found, expected) < 2e-6
    assert distance(state, wanted) < 2e-6
    weight = draw(*found.shape, seed=3)
    pairs = zip(
        torch.autograd.grad((found * weight).sum(), core.values()),
        torch.autograd.grad((expected * weight).sum(), core.values()),
        strict=True,
    )
    for key, (mine, theirs) in zip(core, pairs, strict=True):
        assert distance(mine, theirs) < 2e-5, key
    more, (last,) = mixer.run_op(core, (state,), None)
    expected, wanted = peer(name, core, state)
    assert distance(more, expected) < 2e-6
    assert distance(last, wanted) < 2e-6


def test_the_whole_of_kda():
    """From x to the layer's output as Kimi Linear has it, the core by `fla`."""
    mixer = build("kda", short_conv=4)
    x = draw(2, 30, 24)

    def convolved(projection, kernel):
        y = F.conv1d(F.pad(projection(x).transpose(1, 2), (3, 0)), kernel.unsqueeze(1), groups=kernel.shape[0])
        return y.transpose(1, 2).unflatten(-1, (3, 8))

    q, k = (
        F.normalize(F.silu(convolved(p, w)), dim=-1)
        for p, w in ((mixer.q_proj, mixer.q_conv), (mixer.k_proj, mixer.k_conv))
    )
    step = F.softplus(mixer.decay_up(mixer.decay_down(x)).unflatten(-1, (3, 8)) + mixer.dt_bias)
    core = {"q": q, "k": k, "v": convolved(mixer.v_proj, mixer.v_conv)}
    core |= {"log_decay": -mixer.A_log.exp()[:, None] * step, "beta": mixer.b_proj(x).sigmoid()}
    o, _ = peer("kda", core)
    o = F.rms_norm(o, (8,), eps=1e-8) * mixer.o_norm * mixer.g_proj(x).unflatten(-1, (3, 8)).sigmoid()
    assert distance(mixer(x)[0], mixer.o_proj(o.flatten(-2))) < 1e-5


@pytest.mark.parametrize("bound", [0.0, 0.3])
def test_the_whole_of_hgrn2(bound):
    mixer = build("hgrn2", lower_bound=bound, qk_activation="silu")
    x = draw(2, 30, 24)
    forget = bound + (1 - bound) * mixer.f_proj(x).unflatten(-1, (3, 8)).sigmoid()
    q, v = F.silu(mixer.q_proj(x)).unflatten(-1, (3, 8)), mixer.v_proj(x).unflatten(-1, (3, 8))
    o, _ = peer("hgrn2", {"q": q, "k": 1 - forget, "v": v, "log_decay": forget.log()})
    o = F.rms_norm(o, (8,), eps=1e-8) * mixer.o_norm
    assert distance(mixer(x)[0], mixer.o_proj(o.flatten(-2))) < 1e-5


@pytest.mark.parametrize("bound", [0.0, 0.4])
def test_fresh_hgrn2_spreads_half_lives_from_one_token_to_the_longest(bound):
    mixer = build("hgrn2", lower_bound=bound, half_life=64.0)
    mixer.reset_parameters()
    core, _ = mixer.op_inputs(draw(1, 3, 24), None, None, None)
    half_lives = -torch.log(torch.tensor(2.0)) / core["log_decay"][0, 0]
    assert torch.allclose(half_lives, 64.0 ** torch.linspace(0, 1, 8).expand(3, 8), rtol=1e-3)


def test_fresh_kda_halves_its_memory_after_the_half_life():
    mixer = build("kda", half_life=20.0)
    mixer.reset_parameters()
    core, _ = mixer.op_inputs(draw(1, 3, 24), None, None, None)
    assert torch.allclose((20 * core["log_decay"]).exp(), torch.tensor(0.5), rtol=1e-4)
    assert torch.allclose(core["beta"], torch.tensor(0.1))
