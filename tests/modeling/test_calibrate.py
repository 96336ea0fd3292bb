"""Calibration: it finds the mixer from which its target was made, state by state."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import subquad
from subquad.mixers import AttentionSpec, create
from subquad.mixers.exportable import VALUE_RMS_INIT
from subquad.mixers.norms import head_norm
from subquad.modeling.attention.activations import LayerActivations
from subquad.modeling.attention.discovery import AttentionInfo, discover_attention
from subquad.modeling.calibrate import LayerCalibrator
from subquad.modeling.calibrate_far import FarCalibrator
from subquad.modeling.modeling_subquad import make_mixer_layer
from tests.helpers.students import MIXERS, logits
from tests.helpers.teachers import layer_activations, tiny_teacher

SPEC = AttentionSpec(24, num_heads=4, num_kv_heads=2, head_dim=8, value_dim=6)
EXPORTED = {"v_activation": "silu", "biases": False}
PLANTED = {
    "half_life": (16.0, 64.0, 256.0, 32.0),
    "beta_init": (0.06, 0.5, 0.12, 0.25),
    "value_scale": (3.0, 0.3, 1.0, 0.1),
    "qk_scale": (3.0, 0.3, 1.0, 10.0),
}
CASES = [(name, {}, parameter) for name in MIXERS for parameter, _ in subquad.mixers.get(name).CALIBRATED_PARAMS]
CASES += [(name, EXPORTED, scale) for name in ("gated_deltanet", "kda") for scale in ("value_scale", "qk_scale")]


@torch.no_grad()
@pytest.mark.parametrize("state_heads", ["query", "key_value"])
@pytest.mark.parametrize(("name", "options", "parameter"), CASES, ids=str)
def test_planted_values_of_each_state_are_found(name, options, parameter, state_heads):
    torch.manual_seed(0)
    mixer = create(name, SPEC, state_heads=state_heads, **options)
    for projection in mixer.projections().values():
        projection.weight.mul_(20.0)
    x = torch.randn(1, 300, 24) + torch.randn(24)
    mixer.init_from_teacher(torch.rand(4) + 0.5, x[0])
    planted = torch.tensor(PLANTED[parameter], dtype=torch.float64)[: mixer.num_states]
    getattr(mixer, f"set_{parameter}")(planted)
    target = head_norm(mixer.pre_norm_output(x), 1.0)
    getattr(mixer, f"set_{parameter}")(mixer.per_state(PLANTED[parameter][0]))
    attention = torch.nn.ModuleDict({"o_proj": torch.nn.Linear(24, 24, bias=False)})
    info = AttentionInfo(0, "", attention, SPEC, {}, "o_proj")
    calibrator = LayerCalibrator(mixer, info, LayerActivations((x,), {}, x, target.flatten(2)))
    mixer.CALIBRATED_PARAMS = tuple(grid for grid in mixer.CALIBRATED_PARAMS if grid[0] == parameter)
    found, errors = calibrator.search({})
    assert errors.shape == planted.shape
    assert torch.equal(found[parameter], planted)


@pytest.mark.parametrize(("state_heads", "rms"), [("query", (1, 7, 3, 4)), ("key_value", (5, 12.5**0.5))])
def test_values_before_their_silu_have_the_rms_of_the_heads_of_a_state(state_heads, rms):
    mixer = create("gated_deltanet", SPEC, state_heads=state_heads, **EXPORTED)
    mixer.init_from_teacher(torch.tensor([1.0, 7.0, 3.0, 4.0]), torch.randn(40, 24))
    expected = VALUE_RMS_INIT / torch.tensor(rms).repeat_interleave(SPEC.value_dim)
    torch.testing.assert_close(mixer.v_conv[:, -1].detach(), expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_linearize_calibrates_shared_states(make_teacher, ids, mixer):
    teacher = make_teacher("wide-biased-tied")
    students = [
        subquad.linearize(teacher, mixer, state_heads="key_value", qk_activation="silu", rotary=False, **given)
        for given in ({"scale_ids": ids}, {"calibration_ids": ids})
    ]
    plain, calibrated = (logits(student, ids) for student in students)
    expected = logits(teacher, ids)
    assert (calibrated - expected).square().mean() < (plain - expected).square().mean()


@torch.no_grad()
def test_options_that_are_given_stay(make_teacher, ids):
    """Half-lives and beta, at which a gate gives its bias: not those of the grid."""
    given = {"half_life": 3.0, "longest_half_life": 12.0, "beta_init": 0.9, "qk_activation": "silu"}
    layer = subquad.linearize(make_teacher("plain"), "gated_deltanet", calibration_ids=ids, **given).mixer_layers[0]
    x = torch.zeros(1, 1, layer.mixer.spec.hidden_size)
    gates = layer.mixer.gates(x, {})
    half_lives = torch.tensor([3.0, 3.0 * 4 ** (1 / 3), 3.0 * 4 ** (2 / 3), 12.0])
    torch.testing.assert_close(math.log(0.5) / gates["log_decay"][0, 0], half_lives, rtol=1e-4, atol=0)
    torch.testing.assert_close(gates["beta"], torch.full_like(gates["beta"], 0.9))


@torch.no_grad()
@pytest.mark.parametrize(
    ("mixer", "given"), [("gated_deltanet", "elu1"), ("metala", "elu1"), ("xlstm", "elu1"), ("mamba2", "hedgehog")]
)
def test_what_is_computed_once_for_all_candidates_is_that_of_each(mixer, given):
    """Errors of a memory after a search: those of a calibrator that has measured nothing else."""
    teacher = tiny_teacher()
    ids = torch.randint(32, (2, 30), generator=torch.Generator().manual_seed(0))
    info = discover_attention(teacher)[0]
    (recorded, *_) = layer_activations(teacher, [info], ids)
    options = {"mixer": mixer, "window": [5, 9], "sinks": 2, "state_heads": "key_value", "qk_activation": given}

    def calibrator(full_lse=None):
        torch.manual_seed(0)
        layer = make_mixer_layer(copy.copy(info.module), info.spec, 0, options)
        layer.reset_parameters()
        found = FarCalibrator(layer, info, recorded, full_lse)
        found.mixer.init_from_teacher(torch.ones(info.spec.num_heads), found.x)
        return found

    used = calibrator()
    measured = []
    used.errors_and_scale = lambda: measured.append(0) or FarCalibrator.errors_and_scale(used)
    params, _ = used.search({})
    params, errors = used.search(params)
    grid = [len(values) for _, values in used.grid]
    assert len(measured) == grid[0] if len(grid) == 1 else len(measured) <= 2 * sum(grid)
    for activation in (given, "relu"):
        fresh = calibrator(used.recorder.full_lse)
        for found in (used, fresh):
            found.mixer.options = replace(found.mixer.options, qk_activation=activation)
            found.apply(params)
        expected, scale = fresh.errors_and_scale()
        assert torch.allclose(used.state_errors(params), expected, rtol=1e-5)
        assert torch.allclose(used.errors_and_scale()[1], scale, rtol=1e-4)
        if activation == given:
            assert torch.equal(used.state_errors(params), errors)
            once = len(measured)
            used.state_errors(params)
            assert len(measured) == once
