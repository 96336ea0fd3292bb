"""Kimi Delta Attention and HGRN2 against `fla`'s PyTorch references."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.mixers import build, draw
from tests.helpers.ops import error
from tests.helpers.references import fla_reference

CASES = [
    ("kda", {}),
    ("kda", {"short_conv": 0, "qk_activation": "none"}),
    ("hgrn2", {}),
    ("hgrn2", {"lower_bound": 0.3}),
]


def fla_output(name, op_inputs, initial_state=None):
    """Output and state of `fla`'s reference for the same inputs."""
    family = "kda" if name == "kda" else "gla"
    given = (op_inputs[key] for key in ("q", "k", "v", "log_decay", "beta") if key in op_inputs)
    reference = fla_reference(family, f"naive_recurrent_{family}")
    return reference(*given, initial_state=initial_state, output_final_state=True)


@pytest.mark.parametrize("spec", ["plain", "biased"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: str(case))
def test_output_state_and_gradients_match_fla(name, options, spec):
    mixer = build(name, spec, **options)
    x = draw(2, 75, 24)
    op_inputs, _ = mixer.op_inputs(x)
    op_inputs = {key: t.detach().requires_grad_() for key, t in op_inputs.items()}
    found, (state,) = mixer.run_op(op_inputs)
    expected, expected_state = fla_output(name, op_inputs)
    assert error(found, expected) < 2e-6
    assert error(state, expected_state) < 2e-6
    weight = draw(*found.shape, seed=3)
    pairs = zip(
        torch.autograd.grad((found * weight).sum(), op_inputs.values()),
        torch.autograd.grad((expected * weight).sum(), op_inputs.values()),
        strict=True,
    )
    for key, (found_grad, expected_grad) in zip(op_inputs, pairs, strict=True):
        assert error(found_grad, expected_grad) < 2e-5, key
    continued, (last,) = mixer.run_op(op_inputs, (state,))
    expected, expected_state = fla_output(name, op_inputs, state)
    assert error(continued, expected) < 2e-6
    assert error(last, expected_state) < 2e-6


@pytest.mark.parametrize("low_rank", [False, True])
def test_kda_layer_matches_kimi_linear(low_rank):
    """The whole layer, from x to the output, with `fla`'s op."""
    exported = {"v_activation": "silu", "biases": False, "low_rank_gate": True}
    mixer = build("kda", short_conv=4, **(exported if low_rank else {}))
    x = draw(2, 30, 24)

    def convolved(projection, kernel):
        y = F.conv1d(F.pad(projection(x).transpose(1, 2), (3, 0)), kernel.unsqueeze(1), groups=kernel.shape[0])
        return y.transpose(1, 2).unflatten(-1, (3, 8))

    q, k = (
        F.normalize(F.silu(convolved(p, w)), dim=-1)
        for p, w in ((mixer.q_proj, mixer.q_conv), (mixer.k_proj, mixer.k_conv))
    )
    step = F.softplus(mixer.decay_up(mixer.decay_down(x)).unflatten(-1, (3, 8)) + mixer.dt_bias)
    v = convolved(mixer.v_proj, mixer.v_conv)
    op_inputs = {"q": q, "k": k, "v": F.silu(v) if low_rank else v}
    op_inputs |= {"log_decay": -mixer.A_log.exp()[:, None] * step, "beta": mixer.b_proj(x).sigmoid()}
    o, _ = fla_output("kda", op_inputs)
    gate = mixer.g_proj(mixer.g_down(x) if low_rank else x).unflatten(-1, (3, 8)).sigmoid()
    o = F.rms_norm(o, (8,), eps=1e-8) * mixer.o_norm * gate
    assert error(mixer(x)[0], mixer.o_proj(o.flatten(-2))) < 1e-5


@pytest.mark.parametrize("bound", [0.0, 0.3])
def test_hgrn2_layer_matches_its_equations(bound):
    mixer = build("hgrn2", lower_bound=bound, qk_activation="silu")
    x = draw(2, 30, 24)
    forget = bound + (1 - bound) * mixer.f_proj(x).unflatten(-1, (3, 8)).sigmoid()
    q, v = F.silu(mixer.q_proj(x)).unflatten(-1, (3, 8)), mixer.v_proj(x).unflatten(-1, (3, 8))
    o, _ = fla_output("hgrn2", {"q": q, "k": 1 - forget, "v": v, "log_decay": forget.log()})
    o = F.rms_norm(o, (8,), eps=1e-8) * mixer.o_norm
    assert error(mixer(x)[0], mixer.o_proj(o.flatten(-2))) < 1e-5
