"""Every mixer against its paper's equations, token by token in float64; and its initialization."""

import dataclasses
import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from subquad import mixers
from subquad.mixers.options import OutputGate
from tests.helpers.mixers import SPECS, build, draw, rotary
from tests.helpers.ops import error

CASES = [
    ("linear_attention", {}),
    ("linear_attention", {"normalizer": True, "qk_activation": "elu1", "output_norm": False, "rotary": True}),
    ("retnet", {"qk_activation": "none"}),
    ("mamba2", {}),
    ("mamba2", {"discretization": "zoh", "output_gate": "sigmoid"}),
    ("linear_attention", {"normalizer": True, "qk_activation": "hedgehog", "rotary": True}),
    ("gla", {"qk_activation": "relu"}),
    ("gla", {"expand_k": 2}),
    ("metala", {"qk_activation": "hedgehog", "expand_k": 0.5}),
    ("gated_deltanet", {"qk_activation": "hedgehog"}),
    ("metala", {"short_conv": 4}),
    ("deltanet", {}),
    ("gated_deltanet", {"rotary": True}),
    ("gated_deltanet", {"v_activation": "silu", "biases": False, "norm_eps": 1e-3}),
    ("xlstm", {}),
    ("xlstm", {"output_gate": "none", "output_norm": False}),
]
CASES += [(name, {**options, "state_heads": "key_value"}) for name, options in CASES]


def rotated(x, cos, sin):
    """Pairs of channels (c, c + K/2) as complex numbers, times e^(i angle)."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[..., :half], sin[..., :half])[:, None]
    return torch.cat([z.real, z.imag], -1)


def gate_values(mixer, x, H):
    """Decay, beta and input gate of each token, `[T, H, 1 or K]`, as the papers define them; H is the number of
    states."""
    name, params = mixer.name, dict(mixer.named_parameters())
    linear = lambda part: F.linear(x, params[f"{part}.weight"], params.get(f"{part}.bias"))  # noqa: E731
    one = torch.ones(x.shape[0], H, 1, dtype=x.dtype)
    decay, beta, input_gate = one, None, one
    if name == "retnet":
        decay = one * torch.tensor([1 - 2.0 ** (-5 - h) for h in range(H)], dtype=x.dtype)[:, None]
    elif name == "mamba2":
        dt = F.softplus(linear("a_proj"))[..., None]
        zoh = mixer.options.discretization == "zoh"
        decay = torch.exp(-dt * params["A_log"].exp()[:, None]) if zoh else torch.exp(-dt)
        input_gate = dt if zoh else one
    elif name in ("gla", "metala"):
        logits = F.linear(linear("decay_down"), params["decay_up.weight"], params["decay_up.bias"])
        decay = torch.sigmoid(logits).pow(1 / 16).unflatten(-1, (H, -1))
    elif name in ("deltanet", "gated_deltanet"):
        beta = torch.sigmoid(linear("b_proj"))[..., None]
        if name == "gated_deltanet":
            decay = torch.exp(-params["A_log"].exp() * F.softplus(linear("a_proj") + params["dt_bias"]))[..., None]
    elif name == "xlstm":
        decay, input_gate = torch.sigmoid(linear("f_proj"))[..., None], linear("i_proj").exp()[..., None]
    return decay, beta, input_gate


def reference_output(mixer, x, cos, sin):
    """The mixer's output for x `[T, hidden]` in float64, by the equations."""
    spec, options, params = mixer.spec, mixer.options, dict(mixer.named_parameters())
    T, H = x.shape[0], spec.num_heads
    G = spec.num_kv_heads if options.state_heads == "key_value" else H

    def projected(part):
        y = F.linear(x, params[f"{part}_proj.weight"], params.get(f"{part}_proj.bias"))
        if f"{part}_conv" in params:
            kernel, W = params[f"{part}_conv"], options.short_conv
            y = torch.stack([sum(kernel[:, W - 1 - d] * y[t - d] for d in range(min(W, t + 1))) for t in range(T)])
        return y.unflatten(-1, (H if part == "q" else G, -1))

    def for_queries(y):
        """State g of G is read by query heads g H / G to (g + 1) H / G - 1."""
        return None if y is None else y[:, [h * G // H for h in range(H)]]

    def feature_map(part):
        y = rotated(projected(part), cos, sin) if options.rotary else projected(part)
        if f"{part}_map" in params:
            maps = params[f"{part}_map"]
            y = torch.stack([y[:, head] @ maps[head].T for head in range(len(maps))], 1)
        if options.qk_activation == "hedgehog":
            features = [(sign * y).exp() for sign in (1, -1)]
            y = torch.cat([f / f.sum(-1, keepdim=True) for f in features], -1)
        y = {"silu": lambda z: z / (1 + torch.exp(-z)), "elu1": lambda z: torch.where(z > 0, z + 1, z.exp())}.get(
            options.qk_activation, lambda z: z.clamp_min(0) if options.qk_activation == "relu" else z
        )(y)
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() if "deltanet" in mixer.name else y

    decay, beta, input_gate = gate_values(mixer, x, G)
    q, v = feature_map("q"), projected("v")
    K = q.shape[-1]
    q = q / math.sqrt(K)
    if getattr(options, "v_activation", "none") == "silu":
        v = v / (1 + torch.exp(-v))
    k = 1 - decay.expand(T, G, K) if mixer.name == "metala" else feature_map("k")
    k, v, decay, beta, input_gate = map(for_queries, (k, v, decay, beta, input_gate))
    outputs = []
    S, n = torch.zeros(H, K, v.shape[-1], dtype=x.dtype), torch.zeros(H, K, dtype=x.dtype)
    for t in range(T):
        S, n = decay[t].unsqueeze(-1) * S, decay[t] * n
        new = v[t] if beta is None else beta[t] * (v[t] - torch.einsum("hk,hkv->hv", k[t], S))
        S = S + torch.einsum("hk,hv->hkv", input_gate[t] * k[t], new)
        n = n + input_gate[t] * k[t]
        o, total = torch.einsum("hk,hkv->hv", q[t], S), (q[t] * n).sum(-1, keepdim=True)
        if mixer.name == "xlstm":
            o = o / total.abs().clamp_min(1)
        if getattr(options, "normalizer", False):
            o = o / (total + 1e-6)
        if mixer.name == "mamba2":
            o = o + params["D"][:, None] * v[t]
        if mixer.name == "metala":
            o = o + (q[t] * params["self_augmentation"] * k[t]).sum(-1, keepdim=True) * v[t]
        outputs.append(o)
    return norm_gate_and_project(mixer, params, x, torch.stack(outputs))


def norm_gate_and_project(mixer, params, x, o):
    gate = torch.ones_like(o)
    if mixer.options.output_gate != "none":
        g = F.linear(x, params["g_proj.weight"], params.get("g_proj.bias")).unflatten(-1, (o.shape[1], -1))
        gate = torch.sigmoid(g) * (g if mixer.options.output_gate == "swish" else 1)
    before, after = (gate, 1) if mixer.name == "mamba2" else (1, gate)
    o = o * before
    if mixer.options.output_norm:
        eps = getattr(mixer.options, "norm_eps", 1e-8)
        o = o / (o.square().mean(-1, keepdim=True) + eps).sqrt() * params["o_norm"]
    return F.linear((o * after).flatten(-2), params["o_proj.weight"], params.get("o_proj.bias"))


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o}" if o else n for n, o in CASES])
def test_mixer_matches_its_equations(name, options):
    mixer = build(name, "biased", dtype=torch.float64, **options)
    x = draw(14, 24, dtype=torch.float64)
    positions = rotary(torch.arange(14)[None], dtype=torch.float64)
    found, _ = mixer(x[None], positions)
    expected = reference_output(mixer, x, positions[0][0], positions[1][0])
    # RetNet's decays are float32 constants
    assert error(found[0], expected) < (1e-6 if name == "retnet" else 1e-9)


@pytest.mark.parametrize("name", mixers.MIXERS)
def test_both_choices_are_equal_where_each_query_head_has_its_own_keys(name):
    x, positions = draw(2, 9, 24), rotary(torch.arange(9)[None])
    own, shared = (build(name, "plain", short_conv=4, state_heads=heads) for heads in ("query", "key_value"))
    shared.load_state_dict(own.state_dict())
    assert torch.equal(own(x, positions)[0], shared(x, positions)[0])


@pytest.mark.parametrize("name", mixers.MIXERS)
def test_states_of_key_value_heads_have_their_share_of_the_bytes(name):
    x = draw(2, 3, 24)
    own, shared = (build(name, "biased", short_conv=0, state_heads=h)(x)[1] for h in ("query", "key_value"))
    assert all(len(a[0]) == 2 * len(b[0]) == 4 for a, b in zip(own, shared, strict=True))


@pytest.mark.parametrize("gate", get_args(OutputGate))
@pytest.mark.parametrize("name", mixers.MIXERS)
def test_set_output_scale_sets_the_rms_of_each_head(name, gate):
    # Projections of usual size, so that the norm's epsilon is negligible relative to the op's output.
    spec = dataclasses.replace(SPECS["plain"], initializer_range=0.3)
    mixer = mixers.create(name, spec, output_gate=gate)
    rms = torch.tensor([0.02, 0.5, 3.0])
    mixer.set_output_scale(rms)
    seen = []
    mixer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mixer(draw(2, 30, 24), rotary(torch.arange(30)[None]))
    found = seen[0].unflatten(-1, (3, 8)).square().mean((0, 1, 3)).sqrt()
    assert torch.allclose(found, rms, rtol=0.02)


def initial_inputs(name, **options):
    """The inputs of the op where all parameters were random and are reset."""
    mixer = build(name, **options)
    mixer.reset_parameters()
    return mixer.op_inputs(draw(2, 4, 24))[0]


@pytest.mark.parametrize("name", ["gla", "mamba2", "gated_deltanet", "xlstm", "kda"])
def test_initial_decay_over_the_half_life_is_one_half(name):
    op_inputs = initial_inputs(name, half_life=20.0)
    log_decay = F.logsigmoid(op_inputs["forget_gate"]) if name == "xlstm" else op_inputs["log_decay"]
    assert torch.allclose((20 * log_decay).exp(), torch.tensor(0.5), rtol=1e-4)


def test_half_lives_are_spread_over_the_states():
    log_decay = initial_inputs("gated_deltanet", half_life=3.0, longest_half_life=48.0)["log_decay"][0, 0]
    assert torch.allclose(math.log(0.5) / log_decay, torch.tensor([3.0, 12.0, 48.0]), rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), [("metala", {}), ("hgrn2", {}), ("hgrn2", {"lower_bound": 0.4})], ids=str)
def test_initial_half_lives_run_from_one_token_to_the_longest(name, options):
    op_inputs = initial_inputs(name, half_life=128.0, **options)
    half_lives = math.log(0.5) / op_inputs["log_decay"][0, 0]
    assert torch.allclose(half_lives, 128.0 ** torch.linspace(0, 1, 8).expand(3, 8), rtol=1e-3)


def test_retnet_decay_per_head():
    log_decay = initial_inputs("retnet")["log_decay"]
    assert torch.allclose(log_decay.exp(), 1 - torch.tensor([1 / 32, 1 / 64, 1 / 128]).expand(2, 4, 3))


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
def test_initial_beta(name):
    assert torch.allclose(initial_inputs(name, beta_init=0.2)["beta"], torch.tensor(0.2))


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("name", mixers.MIXERS)
def test_initial_short_conv_is_the_identity(name, width):
    def fresh(short_conv):
        torch.manual_seed(0)
        return mixers.create(name, SPECS["plain"], short_conv=short_conv)

    x, positions = draw(2, 9, 24), rotary(torch.arange(9)[None])
    assert torch.equal(fresh(width)(x, positions)[0], fresh(0)(x, positions)[0])


def test_initial_maps_keep_the_products_of_queries_and_keys():

    def products(expand_k):
        torch.manual_seed(0)
        mixer = mixers.create("linear_attention", SPECS["biased"], expand_k=expand_k, qk_activation="none")
        inputs, _ = mixer.op_inputs(draw(2, 9, 24))
        return torch.einsum("bthk,bshk->bhts", inputs["q"], mixer.for_queries(inputs["k"]))

    assert error(products(3), 3 * products(1)) < 1e-5


def test_rotary_does_not_change_channels_beyond_its_size():
    mixer = build("retnet", short_conv=0, qk_activation="none")
    x = draw(1, 6, 24)
    op_inputs, _ = mixer.op_inputs(x, rotary(torch.arange(6)[None], head_dim=4))
    plain, _ = build("retnet", short_conv=0, qk_activation="none", rotary=False).op_inputs(x)
    assert torch.equal(op_inputs["q"][..., 4:], plain["q"][..., 4:])
    assert not torch.allclose(op_inputs["q"][:, 1:, :, :4], plain["q"][:, 1:, :, :4])
